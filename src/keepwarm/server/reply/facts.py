"""Adds headers and the object `keepwarm` to the replies of every dialect.

The object is in every reply, in a stream's last chunk. The headers come first, but are missing
where a heartbeat had to begin the stream.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

from keepwarm.core.events import Completed, Started
from keepwarm.server.reply.cache_report import HEADER, CacheFields, header_of

IGNORED = "X-Keepwarm-Ignored"
ADAPTED = "X-Keepwarm-Adapted"
HEADERS = (HEADER, IGNORED, ADAPTED)

MAX_NOTES = 32
"""The most notes in a header or a document; what is left out is counted."""
_MAX_CHARACTERS = 64
_MAX_CHARACTERS_OF_NOTE = 120


@dataclass(frozen=True, slots=True)
class Facts:
    """The object `keepwarm`.

    `cache`: what was reused of the prompt, or of the first one of several. `ignored`: fields and
    contents of the request that changed nothing. `adapted`: what was changed in its messages so
    that this model could read them.
    """

    cache: CacheFields
    ignored: Sequence[str]
    adapted: Sequence[str]

    @classmethod
    def of(cls, end: Completed, ignored: Iterable[str] = ()) -> "Facts":
        return cls(CacheFields.of(end.cache), names_of(ignored), notes_of(end.adapted))


def headers_of(event: Started | Completed) -> dict[str, str]:
    """Write the headers that are known when a reply begins."""
    headers = {HEADER: header_of(event.cache)}
    if event.adapted:
        headers[ADAPTED] = "; ".join(notes_of(event.adapted))
    return headers


def names_of(ignored: Iterable[str]) -> tuple[str, ...]:
    """List each name once, sorted. Clients choose them, so they are made safe for a header."""
    return _bounded(sorted({_safe(name, _MAX_CHARACTERS) for name in ignored}))


def notes_of(adapted: Iterable[str]) -> tuple[str, ...]:
    """List each note once, in the order in which they came."""
    return _bounded(list(dict.fromkeys(_safe(n, _MAX_CHARACTERS_OF_NOTE) for n in adapted)))


def _bounded(notes: Sequence[str]) -> tuple[str, ...]:
    left_out = len(notes) - MAX_NOTES
    more = (f"{left_out} more",) if left_out > 0 else ()
    return (*islice(notes, MAX_NOTES), *more)


def _safe(text: str, max_characters: int) -> str:
    """Cut the text to what a header can hold: printable ASCII."""
    return "".join(c for c in text[:max_characters] if c.isascii() and c.isprintable())
