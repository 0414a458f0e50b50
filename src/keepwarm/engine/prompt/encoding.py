"""Encoding the texts of one prompt, each once, on whichever thread has the prompt."""

from collections.abc import Callable, Sequence

ENCODED_HERE = 4096
"""So many characters of a prompt are encoded on a thread that others wait for: 1 to 4 ms."""

Guard = Callable[[int], None]
"""Asked before so many characters are encoded, and with 0 between other things; it may raise."""


class TooMuchToEncode(Exception):
    """More than may be encoded on this thread."""


class NobodyWaits(Exception):
    """Nobody waits for it any more."""


def unguarded(num_characters: int) -> None:
    """On a thread that nobody waits for."""


class Allowance:
    """A guard for a thread that others wait for: raises TooMuchToEncode when it is used up."""

    def __init__(self, num_characters: int = ENCODED_HERE) -> None:
        self._left = num_characters

    def __call__(self, num_characters: int) -> None:
        self._left -= num_characters
        if self._left < 0:
            raise TooMuchToEncode


class PieceEncoder:
    """Encodes a text once. It goes from thread to thread with its prompt; the last one guards it.

    A text between two special tokens has ids of its own, so this is where work can stop and go on.
    """

    def __init__(self, encode: Callable[[str], Sequence[int]], guard: Guard = unguarded) -> None:
        self.guard = guard
        self._encode = encode
        self._known: dict[str, Sequence[int]] = {}

    def __repr__(self) -> str:
        return f"PieceEncoder({len(self._known)} texts)"

    def __call__(self, text: str) -> Sequence[int]:
        token_ids = self._known.get(text)
        if token_ids is None:
            self.guard(len(text))
            token_ids = self._known[text] = self._encode(text)
        return token_ids
