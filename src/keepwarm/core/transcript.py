"""What a line has said and heard: texts and special tokens, by the ids that were fed."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain

from keepwarm.core.errors import InvariantBroken
from keepwarm.core.ports import Detokenizer, Message, Piece


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

    def checked(self, new_detokenizer: Callable[[], Detokenizer] | None) -> "Span":
        """Return the span of a foreign file, whole only if its ids really spell its text.

        Ids that do not are never fed for the text: it is encoded anew when it comes up.
        `new_detokenizer` makes a fresh one; None where the ids are another tokenizer's. Takes time
        in proportion to the number of ids.
        """
        return replace(self, is_whole=self.is_special or self._is_spelled(new_detokenizer))

    def _is_spelled(self, new_detokenizer: Callable[[], Detokenizer] | None) -> bool:
        if new_detokenizer is None or not self.is_whole:
            return False
        detokenizer = new_detokenizer()
        text = "".join(map(detokenizer.push, self.token_ids))
        is_text_only = all(map(detokenizer.has_text, self.token_ids))
        return is_text_only and text == self.text and not detokenizer.pending


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

    def extended(self, more: Span) -> "Transcript":
        """Return the transcript with its open text continued: by a reply, or by bare ids."""
        if not more.text and not more.token_ids:
            return self
        *closed, open_span = self.spans
        joined = Span(
            None if open_span.text is None or more.text is None else open_span.text + more.text,
            open_span.token_ids + more.token_ids,
            open_span.is_whole and more.is_whole,
        )
        return Transcript((*closed, joined))

    def truncated(self, num_tokens: int) -> "Transcript":
        """Return the first `num_tokens` ids. A text that is cut in two is known by its ids only."""
        spans: list[Span] = []
        room = num_tokens
        for span in self.spans:
            if len(span.token_ids) > room:
                if not span.is_special:
                    spans.append(Span(None, span.token_ids[:room]) if room else NO_TEXT)
                break
            spans.append(span)
            room -= len(span.token_ids)
        return Transcript(tuple(spans))

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


def take_turns(pieces: Sequence[Piece]) -> Iterator[Piece]:
    """Yield the pieces in a transcript's order: text, special token, text, ..., text.

    Neighbouring texts become one, and an empty text stands between neighbouring special tokens.
    """
    text = ""
    for piece in pieces:
        if piece.special_id is None:
            text += piece.text
        else:
            yield Piece(text)
            yield piece
            text = ""
    yield Piece(text)


MAX_KEY_CHARS = 255
MAX_DIGEST_CHARS = 64


def is_receipt_key(key: str) -> bool:
    """Whether the key can name a request: 1 to 255 printable characters."""
    return 0 < len(key) <= MAX_KEY_CHARS and key.isprintable()


@dataclass(frozen=True, slots=True)
class Receipt:
    """What stays of a request that may be sent twice: its key, and what its answer said.

    `digest` tells a repeated request from another one under the same key.
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
        """Return the turn for a fork or an import: a receipt answers for the agent asked."""
        return replace(self, receipt=None)
