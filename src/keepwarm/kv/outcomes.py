"""What a step of the batch brought for a sequence."""

from dataclasses import dataclass

from keepwarm.core.sequence import TokenSequence


@dataclass(frozen=True, slots=True)
class Opened:
    """The sequence has its row; the KV of its prompt that was kept anywhere is in its slab."""

    sequence: TokenSequence


@dataclass(frozen=True, slots=True)
class Advanced:
    """More of the sequence's prompt has its KV."""

    sequence: TokenSequence


@dataclass(frozen=True, slots=True)
class Sampled:
    """A decode step gave the sequence its next token, which is in its ids already."""

    sequence: TokenSequence
    token_id: int


@dataclass(frozen=True, slots=True)
class Restored:
    """A prefetch is complete: its line is hot and rests again. It has left the batch."""

    sequence: TokenSequence


@dataclass(frozen=True, slots=True)
class Broken:
    """The sequence cannot go on. It has left the batch."""

    sequence: TokenSequence
    error: Exception


Outcome = Opened | Advanced | Sampled | Restored | Broken
