"""Token-exact continuation: how a new prompt goes on from what a line knows.

A line is keyed by the ids that were fed. When the text of a new prompt says again what the line has
seen or said, the stored ids stand for it, whatever a tokenizer would make of that text today.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from keepwarm.core.block import common_prefix
from keepwarm.core.ports import Piece
from keepwarm.core.transcript import EMPTY, Span, Transcript, take_turns
from keepwarm.engine.prompt.divergence import Divergence, find_divergence
from keepwarm.engine.prompt.prompt_encoder import PromptEncoder


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
        """Where and why the prompt leaves the line; None when the line knows the whole prompt."""
        return find_divergence(
            self.known, self.transcript, self.num_shared, is_of_ids=self.is_of_ids
        )

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.transcript.token_ids


class Continuation(Protocol):
    """A request's prompt before its line is chosen: it can be continued from any line.

    `adapted`: what was changed in its messages for the model's template.
    """

    @property
    def adapted(self) -> tuple[str, ...]: ...

    def prompt_from(self, known: Transcript) -> Prompt:
        """Return the prompt with every stored id that may stand for its text."""
        ...

    def num_shared(self, known: Transcript) -> int:
        """Return how many ids that prompt shares with the line; cheaper than making it."""
        ...

    def most_shared(self, known: Transcript) -> int:
        """Return an upper bound of `num_shared` that is found without encoding anything."""
        ...


class TextContinuation:
    """Splices what a line knows with the encoding of what it does not.

    A piece has a special token, or the prompt's end, on both sides, so its ids are its own affair.
    Stored ids that end amid a character do not end a prompt: the reply would go on with the rest of
    a character that the prompt's text does not have.
    """

    def __init__(
        self, pieces: Sequence[Piece], encoder: PromptEncoder, adapted: tuple[str, ...] = ()
    ) -> None:
        self.adapted = adapted
        self._wanted = tuple(take_turns(pieces))
        self._encoder = encoder
        self._latest: Prompt | None = None

    def num_shared(self, known: Transcript) -> int:
        """Compare span by span, and make the whole prompt only where it may continue the line."""
        if not known.num_tokens:  # most lines, where many requests come at once
            return 0
        num_shared = 0
        for stored, piece in zip(known.spans, self._wanted, strict=False):
            if not stored.says(piece):
                token_ids = self._encoder.span(piece).token_ids
                num_common = common_prefix(token_ids, stored.token_ids)
                if num_common < min(len(token_ids), len(stored.token_ids)):
                    return num_shared + num_common
                break  # one of them is the other's beginning
            num_shared += len(stored.token_ids)
        return self.prompt_from(known).num_shared

    def most_shared(self, known: Transcript) -> int:
        """Count up to the first span that differs; ids that spell a text are not another text's."""
        most = 0
        for stored, piece in zip(known.spans, self._wanted, strict=False):
            if not stored.says(piece):
                if stored.is_special:
                    return most
                spells = stored.is_whole and stored.text is not None
                return most + len(stored.token_ids) if spells else known.num_tokens
            most += len(stored.token_ids)
        return most

    def prompt_from(self, known: Transcript) -> Prompt:
        """Return the prompt; remembered, because the line that is chosen was the last one asked
        about.
        """
        if self._latest is None or self._latest.known is not known:
            self._latest = self._spliced_prompt(known)
        return self._latest

    def _spliced_prompt(self, known: Transcript) -> Prompt:
        spans = self._spliced(known)
        if spans[-1].token_ids and self._encoder.ends_amid(spans[-1].token_ids):
            spans[-1] = self._encoder.span(self._wanted[-1])
        num_mended = self._mend(spans)
        transcript = Transcript(tuple(spans))
        return Prompt(
            transcript,
            num_spliced=_num_spliced(known, transcript),
            num_shared=common_prefix(known.token_ids, transcript.token_ids),
            known=known,
            num_mended=num_mended,
        )

    def _spliced(self, known: Transcript) -> list[Span]:
        """Return the stored span for each piece that it says, up to the first whose ids differ."""
        spans: list[Span] = []
        for stored, piece in zip(known.spans, self._wanted, strict=False):
            span = stored if stored.says(piece) else self._encoder.span(piece)
            spans.append(span)
            if span.token_ids != stored.token_ids:
                break
        return spans + [self._encoder.span(piece) for piece in self._wanted[len(spans) :]]

    def _mend(self, spans: list[Span]) -> int:
        """Encode anew each span that does not say this prompt's text; return how many did not.

        However a span came to stand in the prompt, this is the last look before its ids are fed: a
        cache may forget, and must never answer from another conversation.
        """
        num_mended = 0
        for position, (span, piece) in enumerate(zip(spans, self._wanted, strict=True)):
            if not span.says(piece):
                spans[position] = self._encoder.span(piece)
                num_mended += 1
        return num_mended


class IdsContinuation:
    """Continues lines with a prompt that was given as ids: only the shared part has a text."""

    adapted: tuple[str, ...] = ()

    def __init__(self, token_ids: Sequence[int]) -> None:
        self._token_ids = token_ids

    def num_shared(self, known: Transcript) -> int:
        return common_prefix(known.token_ids, self._token_ids)

    def most_shared(self, known: Transcript) -> int:
        return self.num_shared(known)

    def prompt_from(self, known: Transcript) -> Prompt:
        num_shared = self.num_shared(known)
        more = Span(None, tuple(self._token_ids[num_shared:]))
        transcript = known.truncated(num_shared).extended(more)
        return Prompt(transcript, num_spliced=0, num_shared=num_shared, known=known, is_of_ids=True)


def _num_spliced(known: Transcript, new: Transcript) -> int:
    spans = zip(known.spans, new.spans, strict=False)
    return sum(len(span.token_ids) for stored, span in spans if span is stored)
