"""Where a prompt leaves what its line knows, and why: what a response reports of its cache."""

from dataclasses import dataclass
from enum import StrEnum
from itertools import zip_longest

from keepwarm.core.transcript import Span, Transcript

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
    """One side is known by its ids only, and they differ."""
    NOT_COMPUTED = "not_computed"
    """The prompt left its line earlier, but KV was found beyond that place: of a broken-off request
    with this prompt, or of another agent. That KV ends here."""


@dataclass(frozen=True, slots=True)
class Divergence:
    """The first token that the line does not have, and why; with what stands there in either."""

    token_index: int
    reason: Reason
    known_text: str = ""
    new_text: str = ""


def find_divergence(
    known: Transcript, new: Transcript, num_shared: int, *, is_of_ids: bool
) -> Divergence | None:
    """Compare a line's transcript with a prompt's that shares its first `num_shared` ids.

    None when the line knows the whole prompt. `is_of_ids`: the prompt was given as ids.
    """
    if num_shared == new.num_tokens:
        return None
    if num_shared == known.num_tokens:
        return Divergence(num_shared, Reason.NEW_MESSAGE if num_shared else Reason.NEW_LINE)
    if is_of_ids:
        return Divergence(num_shared, Reason.OTHER_IDS)
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
    """Name the difference of two spans. Where the line ended with the stored text (`is_open`), a
    longer text is no edit.
    """
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
