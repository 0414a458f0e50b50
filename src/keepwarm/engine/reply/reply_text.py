"""The text of one reply as it grows: what may be sent now, and which ids the sent text stands on.

A token's road: the detokenizer completes characters, `StopSearch` says how much of the text's end
must be held back, and the rest is emitted with the ids that it covers. A parser that separates
reasoning and tool calls from the answer will take what is emitted: it never sees half a character,
nor text behind a stop string, and the line keeps the text as it was generated, whatever the parser
makes of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from keepwarm.core.ports import Detokenizer
from keepwarm.core.transcript import Span
from keepwarm.engine.reply.stop_strings import StopMatch, StopSearch


@dataclass(frozen=True, slots=True)
class Emitted:
    """What may be sent now: text, and the ids whose text is wholly sent with it."""

    text: str
    token_ids: tuple[int, ...]

    def __bool__(self) -> bool:
        return bool(self.text or self.token_ids)


@dataclass(frozen=True, slots=True)
class Reply:
    """A reply as it was delivered.

    `is_whole`: the ids are those of the text, no more and no less. They are not where the end of
    `text` belongs to a token that was not kept, because a stop string began in the middle of it or
    the reply was cancelled there, nor where a token in its middle has no text. The last
    `num_silent` ids have none: special tokens, the first bytes of a character that never came.
    """

    text: str
    token_ids: tuple[int, ...]
    is_whole: bool = True
    num_silent: int = 0

    @property
    def spoken(self) -> "Reply":
        """What the line keeps: without the ids at its end that the next prompt will not have."""
        num_spoken = len(self.token_ids) - self.num_silent if self.text else 0
        return Reply(self.text, self.token_ids[:num_spoken], self.is_whole)

    @property
    def span(self) -> Span:
        """The reply as a transcript records it: it continues the line's open text."""
        return Span(self.text, self.token_ids, self.is_whole)


@dataclass(slots=True)
class _Token:
    """A token of the reply.

    `is_heard`: text came with it, its own or that of tokens before it. `ends_amid`: behind it a
    character has begun and not ended. `end`: how many characters of the reply must be sent before
    the token's text is wholly sent.
    """

    token_id: int
    has_text: bool
    is_heard: bool
    ends_amid: bool
    end: int = 0


class ReplyText:
    """The text of one reply as it grows. Belongs to its sequence and survives preemption.

    Holds back half characters, and text that may be the beginning of a stop string.

    When the reply ends by length or EOS in the middle of a character, the ids of that character
    are sent and its text is not; the line does not keep them, since the next prompt has only the
    text that was sent.
    """

    def __init__(self, detokenizer: Detokenizer, stop: Sequence[str] = ()) -> None:
        self._detokenizer = detokenizer
        self._stops = StopSearch(stop)
        self._stopped_by: str | None = None
        # A token moves from one list to the next: its character is not complete, its text is not
        # sent, its text is sent.
        self._undecoded: list[_Token] = []
        self._held: list[_Token] = []
        self._sent: list[_Token] = []
        self._held_text = ""
        self._sent_text: list[str] = []
        self._num_sent = 0

    def __repr__(self) -> str:
        return (
            f"ReplyText({self._num_sent} characters of {len(self._sent)} tokens sent, "
            f"{self._held_text!r} held, stopped_by={self._stopped_by!r})"
        )

    @property
    def stopped_by(self) -> str | None:
        """The stop string that ended the reply."""
        return self._stopped_by

    @property
    def reply(self) -> Reply:
        """What was sent so far."""
        num_silent = next(
            (n for n, token in enumerate(reversed(self._sent)) if token.is_heard), len(self._sent)
        )
        spoken = self._sent[: len(self._sent) - num_silent]
        is_all = (spoken[-1].end if spoken else 0) == self._num_sent
        ends_amid = bool(spoken) and spoken[-1].ends_amid
        return Reply(
            text="".join(self._sent_text),
            token_ids=tuple(token.token_id for token in self._sent),
            is_whole=is_all and not ends_amid and all(token.has_text for token in spoken),
            num_silent=num_silent,
        )

    def push(self, token_id: int) -> Emitted:
        """Take the next token; not the one that ends the reply, and none after a stop string."""
        match = self._stops.push(self._decode(token_id))
        if match is not None:
            return self._stop_at(match)
        return self._send(len(self._held_text) - self._stops.num_possible)

    def finish(self) -> Emitted:
        """End the reply, by length or EOS, and return all that was held back, and every id."""
        self._settle_undecoded()
        return self._send(len(self._held_text))

    def cancel(self) -> None:
        """End the reply with what was sent, and forget what was held back."""
        self._held_text = ""
        self._held.clear()
        self._undecoded.clear()

    def _decode(self, token_id: int) -> str:
        """Hold the token, and return the text that it completes."""
        detokenizer = self._detokenizer
        text = detokenizer.push(token_id)
        self._held_text += text
        ends_amid = detokenizer.pending
        self._undecoded.append(
            _Token(token_id, detokenizer.has_text(token_id), bool(text), ends_amid)
        )
        if not ends_amid:
            self._settle_undecoded()
        return text

    def _settle_undecoded(self) -> None:
        """Tokens that completed their characters together are sent together."""
        end = self._num_sent + len(self._held_text)
        for token in self._undecoded:
            token.end = end
        self._held += self._undecoded
        self._undecoded.clear()

    def _stop_at(self, match: StopMatch) -> Emitted:
        self._stopped_by = match.stop
        emitted = self._send(match.start)
        self.cancel()
        return emitted

    def _send(self, num_characters: int) -> Emitted:
        text = self._held_text[:num_characters]
        self._held_text = self._held_text[num_characters:]
        self._num_sent += num_characters
        covered = self._pop_covered()
        self._sent_text.append(text)
        self._sent += covered
        return Emitted(text, tuple(token.token_id for token in covered))

    def _pop_covered(self) -> list[_Token]:
        covered = [token for token in self._held if token.end <= self._num_sent]
        if covered:
            del self._held[: len(covered)]
        return covered
