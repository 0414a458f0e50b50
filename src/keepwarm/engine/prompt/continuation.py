"""Token-exact continuation: what a line knows of its own text, and how a new prompt continues it.

A line is keyed by the ids that were fed. When the text of a new prompt says again what the line has
seen or said, the stored ids stand for it, whatever a tokenizer would make of that text today.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property
from itertools import zip_longest
from typing import Protocol

from keepwarm.core.block import common_prefix
from keepwarm.core.errors import InvalidRequest
from keepwarm.core.plain import NotPlain, plain_object
from keepwarm.core.ports import ROLES, Detokenizer, Message, Piece
from keepwarm.core.transcript import EMPTY, NO_TEXT, Span, Transcript
from keepwarm.engine.prompt.reply_text import Reply

Encode = Callable[[str], Sequence[int]]
EndsAmid = Callable[[Sequence[int]], bool]
"""Whether the last of these ids begin a character and do not end it."""

EXCERPT_CHARACTERS = 40


class Reason(StrEnum):
    """Why a prompt leaves what its line knows."""

    NEW_LINE = "new_line"
    """Nothing was known, or no more than how other conversations begin."""
    NEW_MESSAGE = "new_message"
    """All that was known is kept, and more follows: a plain continuation."""
    EDITED_TEXT = "edited_text"
    SHORTENED_TEXT = "shortened_text"
    """A part of the text is gone: a template trims, or strips the thinking of earlier turns."""
    EDITED_SPECIAL = "edited_special"
    """Another special token stands there: the messages have another structure."""
    RETOKENISED = "retokenised"
    """The stored text is there, but its ids may not stand for it: it goes on, or was cut."""
    OTHER_IDS = "other_ids"
    """Only ids are known of one side, and they differ."""
    NOT_COMPUTED = "not_computed"
    """The prompt left its line earlier, and KV was found beyond: of a request with this prompt that
    was broken off, or of another agent. It ends here."""


@dataclass(frozen=True, slots=True)
class Divergence:
    """The first token that the line does not have, and why; with what stands there in either."""

    token_index: int
    reason: Reason
    known_text: str = ""
    new_text: str = ""


@dataclass(frozen=True)
class Prompt:
    """A whole prompt in ids, and how it continues what the line knows.

    `num_spliced` ids were kept because their text came back; `num_shared` ids are the same as
    before, spliced or not. `known` is what the line had; `is_of_ids`: the prompt was given as ids.
    `num_mended` spans did not say the prompt's text and were encoded anew: a bug, counted.
    """

    transcript: Transcript
    num_spliced: int
    num_shared: int
    known: Transcript = EMPTY
    is_of_ids: bool = False
    num_mended: int = 0

    @cached_property
    def divergence(self) -> Divergence | None:
        """None when the line knows the whole prompt."""
        if self.is_of_ids:
            return _divergence_of_ids(self.known, self.num_shared, self.transcript.num_tokens)
        return _divergence(self.known, self.transcript, self.num_shared)

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.transcript.token_ids


class Continuation(Protocol):
    """What a request's prompt becomes on one line or another.

    `adapted`: what was changed in its messages for the model's template.
    """

    @property
    def adapted(self) -> tuple[str, ...]: ...

    def of(self, known: Transcript) -> Prompt: ...

    def num_shared(self, known: Transcript) -> int:
        """As the prompt's, for less."""
        ...

    def most_shared(self, known: Transcript) -> int:
        """It shares no more than that, which is found without encoding anything."""
        ...


class TextContinuation:
    """Splices what a line knows with the encoding of what it does not.

    A piece has a special token, or the prompt's end, on both sides, so its ids are its own affair.
    Ids that end amid a character (`ends_amid`) do not end a prompt: the reply would go on with the
    rest of a character that nobody has seen.
    """

    def __init__(
        self,
        pieces: Sequence[Piece],
        encode: Encode,
        ends_amid: EndsAmid = lambda token_ids: False,
        adapted: tuple[str, ...] = (),
    ) -> None:
        self.adapted = adapted
        self._wanted = tuple(take_turns(pieces))
        self._encode = encode
        self._ends_amid = ends_amid
        self._encoded: dict[int, Span] = {}
        self._latest: Prompt | None = None

    def num_shared(self, known: Transcript) -> int:
        if not known.num_tokens:  # most lines, where many requests come at once
            return 0
        num_shared = 0
        for position, (stored, piece) in enumerate(zip(known.spans, self._wanted, strict=False)):
            if not stored.says(piece):
                token_ids = self._encoded_span(position).token_ids
                num_common = common_prefix(token_ids, stored.token_ids)
                if num_common < min(len(token_ids), len(stored.token_ids)):
                    return num_shared + num_common
                break  # one of them is the other's beginning
            num_shared += len(stored.token_ids)
        return self.of(known).num_shared

    def most_shared(self, known: Transcript) -> int:
        """Ids that spell their text are not those of another one."""
        most = 0
        for stored, piece in zip(known.spans, self._wanted, strict=False):
            if not stored.says(piece):
                if stored.is_special:
                    return most
                spells = stored.is_whole and stored.text is not None
                return most + len(stored.token_ids) if spells else known.num_tokens
            most += len(stored.token_ids)
        return most

    def of(self, known: Transcript) -> Prompt:
        """The same again for the line that was asked about last: it is, once it is chosen."""
        if self._latest is None or self._latest.known is not known:
            self._latest = self._prompt(known)
        return self._latest

    def _prompt(self, known: Transcript) -> Prompt:
        spans = self._spliced(known)
        last = spans[-1]
        if last.token_ids and self._ends_amid(last.token_ids):
            spans[-1] = self._encoded_span(len(spans) - 1)
        num_mended = self._mend(spans)
        transcript = Transcript(tuple(spans))
        return Prompt(
            transcript,
            num_spliced=_num_spliced(known, transcript),
            num_shared=common_prefix(known.token_ids, transcript.token_ids),
            known=known,
            num_mended=num_mended,
        )

    def _mend(self, spans: list[Span]) -> int:
        """Encode anew what does not say this prompt's text; return how many spans did not.

        However a span came to stand in the prompt, this is the last look before its ids are fed: a
        cache may forget, and must never answer from another conversation.
        """
        num_mended = 0
        for position, (span, piece) in enumerate(zip(spans, self._wanted, strict=True)):
            if not span.says(piece):
                spans[position] = self._encoded_span(position)
                num_mended += 1
        return num_mended

    def _spliced(self, known: Transcript) -> list[Span]:
        """The stored span wherever it says the piece, up to the first span whose ids differ."""
        spans: list[Span] = []
        for stored, piece in zip(known.spans, self._wanted, strict=False):
            span = stored if stored.says(piece) else self._encoded_span(len(spans))
            spans.append(span)
            if span.token_ids != stored.token_ids:
                break
        return spans + [self._encoded_span(n) for n in range(len(spans), len(self._wanted))]

    def _encoded_span(self, position: int) -> Span:
        span = self._encoded.get(position)
        if span is None:
            span = self._encoded[position] = _encoded(self._wanted[position], self._encode)
        return span


class IdsContinuation:
    """Of a prompt that is given as ids: text is known of the shared part only."""

    adapted: tuple[str, ...] = ()

    def __init__(self, token_ids: Sequence[int]) -> None:
        self._token_ids = token_ids

    def num_shared(self, known: Transcript) -> int:
        return common_prefix(known.token_ids, self._token_ids)

    def most_shared(self, known: Transcript) -> int:
        return self.num_shared(known)

    def of(self, known: Transcript) -> Prompt:
        num_shared = self.num_shared(known)
        shared = truncate(known, num_shared)
        more = Span(None, tuple(self._token_ids[num_shared:]))
        transcript = _continue_open_text(shared, more)
        return Prompt(transcript, num_spliced=0, num_shared=num_shared, known=known, is_of_ids=True)


def with_reply(transcript: Transcript, reply: Reply) -> Transcript:
    """The line after its prompt was answered: the open text goes on with the reply."""
    return _continue_open_text(transcript, Span(reply.text, reply.token_ids, reply.is_whole))


def truncate(transcript: Transcript, num_tokens: int) -> Transcript:
    """The first `num_tokens` ids. A text that is cut in two is known by its ids only."""
    spans: list[Span] = []
    room = num_tokens
    for span in transcript.spans:
        if len(span.token_ids) > room:
            spans += _cut(span, room)
            break
        spans.append(span)
        room -= len(span.token_ids)
    return Transcript(tuple(spans))


def vouching(
    transcript: Transcript, detokenizer: Callable[[], Detokenizer] | None
) -> Iterator[Span]:
    """The spans of a transcript out of a file: ids stand for a text only if they really spell it.

    Where they do not, the text is encoded anew when it comes up. `detokenizer` makes a fresh one;
    None where the ids are another tokenizer's. Each span costs as much time as it has ids.
    """
    for span in transcript.spans:
        yield replace(span, is_whole=span.is_special or _spells(span, detokenizer))


def _spells(span: Span, new_detokenizer: Callable[[], Detokenizer] | None) -> bool:
    if new_detokenizer is None:
        return False
    detokenizer = new_detokenizer()
    text = "".join(map(detokenizer.push, span.token_ids))
    is_text_only = all(map(detokenizer.has_text, span.token_ids))
    return span.is_whole and is_text_only and text == span.text and not detokenizer.pending


def take_turns(pieces: Sequence[Piece]) -> Iterator[Piece]:
    """The pieces as text, special token, text, ..., text; neighbouring texts are one."""
    text = ""
    for piece in pieces:
        if piece.special_id is None:
            text += piece.text
        else:
            yield Piece(text)
            yield piece
            text = ""
    yield Piece(text)


def _encoded(piece: Piece, encode: Encode) -> Span:
    if piece.special_id is not None:
        return Span(piece.text, (piece.special_id,), is_special=True)
    return Span(piece.text, tuple(encode(piece.text)) if piece.text else ())


def _num_spliced(known: Transcript, new: Transcript) -> int:
    spans = zip(known.spans, new.spans, strict=False)
    return sum(len(span.token_ids) for stored, span in spans if span is stored)


def _continue_open_text(transcript: Transcript, more: Span) -> Transcript:
    if not more.text and not more.token_ids:
        return transcript
    *closed, open_span = transcript.spans
    joined = Span(
        None if open_span.text is None or more.text is None else open_span.text + more.text,
        open_span.token_ids + more.token_ids,
        open_span.is_whole and more.is_whole,
    )
    return Transcript((*closed, joined))


def _cut(span: Span, num_tokens: int) -> tuple[Span, ...]:
    if span.is_special:
        return ()
    return (Span(None, span.token_ids[:num_tokens]) if num_tokens else NO_TEXT,)


def _divergence(known: Transcript, new: Transcript, num_shared: int) -> Divergence | None:
    if num_shared == new.num_tokens:
        return None
    if num_shared == known.num_tokens:
        return Divergence(num_shared, Reason.NEW_MESSAGE if num_shared else Reason.NEW_LINE)
    spans = enumerate(zip(known.spans, new.spans, strict=False))
    position, (stored, wanted) = next(
        (n, pair) for n, pair in spans if pair[0].token_ids != pair[1].token_ids
    )
    known_text, new_text = stored.text or "", wanted.text or ""
    start = _common_characters(known_text, new_text)
    return Divergence(
        num_shared,
        _reason(stored, wanted, is_open=position == len(known.spans) - 1),
        known_text[start : start + EXCERPT_CHARACTERS],
        new_text[start : start + EXCERPT_CHARACTERS],
    )


def _reason(stored: Span, wanted: Span, *, is_open: bool) -> Reason:
    """`is_open`: the line ended with the stored text, so that more of it is no edit."""
    if stored.is_special:
        return Reason.EDITED_SPECIAL
    if stored.text is None or wanted.text is None:
        return Reason.OTHER_IDS
    if stored.text == wanted.text or (is_open and wanted.text.startswith(stored.text)):
        return Reason.RETOKENISED
    if _lacks_a_part(stored.text, wanted.text):
        return Reason.SHORTENED_TEXT
    return Reason.EDITED_TEXT


def _lacks_a_part(known_text: str, new_text: str) -> bool:
    """Whether taking one run of characters out of the known text gives the new one."""
    before = _common_characters(known_text, new_text)
    after = _common_characters(known_text[::-1], new_text[::-1])
    return before + after >= len(new_text)


def _common_characters(one: str, other: str) -> int:
    pairs = enumerate(zip_longest(one, other))
    return next((index for index, (a, b) in pairs if a != b), len(one))


def _divergence_of_ids(known: Transcript, num_shared: int, num_tokens: int) -> Divergence | None:
    if num_shared == num_tokens:
        return None
    if num_shared < known.num_tokens:
        return Divergence(num_shared, Reason.OTHER_IDS)
    return Divergence(num_shared, Reason.NEW_MESSAGE if num_shared else Reason.NEW_LINE)


def validate_messages(messages: object) -> tuple[Message, ...]:
    """The messages with content as plain text; InvalidRequest names the one that is wrong."""
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise InvalidRequest("messages", f"must be a list of messages, not {_kind(messages)}")
    if not messages:
        raise InvalidRequest("messages", "is empty; there must be at least one message")
    return tuple(_valid_message(index, message) for index, message in enumerate(messages))


def opening(messages: Sequence[Message] | None) -> tuple[Message, ...]:
    """The system messages that a conversation begins with."""
    spoken = (n for n, m in enumerate(messages or ()) if m["role"] not in ("system", "developer"))
    return tuple(messages or ())[: next(spoken, None)]


def _valid_message(index: int, message: object) -> Message:
    if not isinstance(message, Mapping):
        raise InvalidRequest("messages", f"message {index} is a {_kind(message)}, not an object")
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        problem = f"message {index} has the role {role!r}; expected one of {sorted(ROLES)}"
        raise InvalidRequest("messages", problem)
    return _plain(index, {**message, "content": _text_of_content(index, message.get("content"))})


def _plain(index: int, message: Message) -> Message:
    """A copy, for all of a message is kept with its turn: what cannot be written is refused."""
    try:
        return plain_object(message)
    except NotPlain as error:
        raise InvalidRequest("messages", f"message {index} {error}") from error


def _text_of_content(index: int, content: object) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence) and not isinstance(content, bytes):
        return "".join(_text_of_part(index, part) for part in content)
    problem = f"message {index} has a {_kind(content)} as content; expected text or text parts"
    raise InvalidRequest("messages", problem)


def _text_of_part(index: int, part: object) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text":
        text = part.get("text")
        if isinstance(text, str):
            return text
    what = part.get("type") if isinstance(part, Mapping) else _kind(part)
    problem = f"message {index} has a content part {what!r}; only text parts are supported"
    raise InvalidRequest("messages", problem)


def _kind(value: object) -> str:
    return type(value).__name__
