"""What a line has said and heard: texts, special tokens and turns, by the ids that were fed."""

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain

from keepwarm.core.errors import InvariantBroken
from keepwarm.core.ports import Message, Piece


@dataclass(frozen=True, slots=True)
class Span:
    """A special token, or the text between two special tokens, with the ids as they were fed.

    `text` is what was sent or delivered, never a decoding. It is None where only ids are known.
    `is_whole`: the ids are those of the text, no more and no less. A reply's are not where a stop
    string cut its last token, or where it has tokens without a text (a special token, the first
    bytes of a character that never came).
    """

    text: str | None
    token_ids: tuple[int, ...]
    is_whole: bool = True
    is_special: bool = False

    def says(self, piece: Piece) -> bool:
        """Whether the stored ids may stand for the piece without asking a tokenizer."""
        if self.is_special:
            return self.token_ids == (piece.special_id,)
        if self.text == "" and self.token_ids:
            return False  # ids for no text are a lie, whatever wrote them
        return self.is_whole and piece.special_id is None and self.text == piece.text


NO_TEXT = Span("", ())


@dataclass(frozen=True)
class Transcript:
    """A line's spans: a text, a special token, a text, and so on; first and last is a text.

    A text may be empty. The last one is open: a reply continues it.
    """

    spans: tuple[Span, ...] = (NO_TEXT,)

    @cached_property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(chain.from_iterable(span.token_ids for span in self.spans))

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    def check(self) -> None:
        """Texts and special tokens take turns, and no ids stand for an empty text."""
        for position, span in enumerate(self.spans):
            if span.text == "" and span.token_ids and span.is_whole:
                raise InvariantBroken(f"span {position} has ids and no text: {span}")
            if span.is_special != bool(position % 2):
                raise InvariantBroken(f"span {position} of {len(self.spans)} out of turn: {span}")
        if len(self.spans) % 2 == 0:
            raise InvariantBroken(f"a transcript of {len(self.spans)} spans has no open text")


EMPTY = Transcript()


MAX_KEY_CHARS = 255
MAX_DIGEST_CHARS = 64


def is_receipt_key(key: str) -> bool:
    """Whether a request may be known by it: 1 to 255 characters that can be seen."""
    return 0 < len(key) <= MAX_KEY_CHARS and key.isprintable()


@dataclass(frozen=True, slots=True)
class Receipt:
    """What a request left behind that may be sent twice: its key, and what its answer said.

    `digest` tells the same request from another one under the same key.
    """

    key: str
    digest: str
    finish_reason: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Turn:
    """Where a line stood when a turn had ended; `messages` None where they were not given."""

    num_tokens: int
    messages: tuple[Message, ...] | None
    receipt: Receipt | None = None

    def without_receipt(self) -> "Turn":
        """As an agent of another name has it: what was asked under a key was asked of the first."""
        return replace(self, receipt=None)
