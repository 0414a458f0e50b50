"""Encodes the texts of one prompt, each once, on whichever thread holds the prompt.

Encoding is the slow part of reading a prompt, so it asks a guard before every text. On the engine's
thread the guard is an `EncodingBudget`: a long prompt raises TooMuchToEncode and is read on a
reader's thread instead. There the guard raises Cancelled once the request has gone.
"""

from collections.abc import Callable, Sequence

from keepwarm.core.ports import Piece, Tokenizer
from keepwarm.core.transcript import NO_TEXT, Span

ENCODED_HERE = 4096
"""How many characters of a prompt the engine's thread encodes itself: 1 to 4 ms."""

MAX_TOKENS_OF_CHARACTER = 8
"""More than a character has bytes in UTF-8, and so more than it can have tokens."""

Guard = Callable[[int], None]
"""Called with the number of characters about to be encoded, and with 0 between other work. Raises
to stop there; what was encoded so far is kept."""


class TooMuchToEncode(Exception):
    """The prompt needs more encoding than this thread may do."""


class Cancelled(Exception):
    """The request that this work was for has been cancelled."""


def unguarded(num_characters: int) -> None:
    """Guard work that may take as long as it takes."""


class EncodingBudget:
    """A guard for the engine's thread: raises TooMuchToEncode when its characters are used up."""

    def __init__(self, num_characters: int = ENCODED_HERE) -> None:
        self._left = num_characters

    def __call__(self, num_characters: int) -> None:
        self._left -= num_characters
        if self._left < 0:
            raise TooMuchToEncode


class PromptEncoder:
    """Turns pieces of one prompt into spans, and remembers each text that it has encoded.

    It goes from thread to thread with its prompt; the thread that holds it sets `guard`. A text
    between two special tokens has ids of its own, so work can stop and go on between texts.
    """

    def __init__(self, tokenizer: Tokenizer, guard: Guard = unguarded) -> None:
        self.guard = guard
        self._tokenizer = tokenizer
        self._spans: dict[str, Span] = {"": NO_TEXT}

    def __repr__(self) -> str:
        return f"PromptEncoder({len(self._spans) - 1} texts)"

    def span(self, piece: Piece) -> Span:
        """Return the piece with its ids. Raises what the guard raises, and InvalidRequest."""
        if piece.special_id is not None:
            return Span(piece.text, (piece.special_id,), is_special=True)
        span = self._spans.get(piece.text)
        if span is None:
            self.guard(len(piece.text))
            span = Span(piece.text, tuple(self._tokenizer.encode(piece.text)))
            self._spans[piece.text] = span
        return span

    def ends_amid(self, token_ids: Sequence[int]) -> bool:
        """Whether the last of these ids begin a character and do not end it."""
        detokenizer = self._tokenizer.detokenizer()
        for token_id in token_ids[-MAX_TOKENS_OF_CHARACTER:]:
            detokenizer.push(token_id)
        return detokenizer.pending
