"""The sequences that have no row yet, or had to give theirs up."""

from collections.abc import Iterator

from keepwarm.core.policies import admission_order
from keepwarm.core.sequence import Phase, TokenSequence


class SequenceQueue:
    """Owns who waits for a row, and counts how often each was passed over."""

    def __init__(self) -> None:
        self._waiting: list[TokenSequence] = []

    def __repr__(self) -> str:
        return f"SequenceQueue({len(self._waiting)} waiting)"

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[TokenSequence]:
        return iter(self._waiting)

    def __contains__(self, sequence: object) -> bool:
        return sequence in self._waiting

    def add(self, sequence: TokenSequence) -> None:
        sequence.phase = Phase.WAITING
        self._waiting.append(sequence)

    def remove(self, sequence: TokenSequence) -> None:
        self._waiting.remove(sequence)

    def in_order(self) -> list[TokenSequence]:
        """Return the sequences in the order of their admission."""
        return admission_order(self._waiting)

    def note_passed(self, admitted: TokenSequence) -> None:
        """Count one more admission before those that came earlier: waiting raises a priority."""
        for other in self._waiting:
            other.num_passed_over += other.arrival < admitted.arrival
