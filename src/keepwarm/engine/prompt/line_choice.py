"""Which line a request continues: a pure choice, which any thread can make over values."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from keepwarm.core.ports import Message
from keepwarm.core.transcript import EMPTY, Transcript
from keepwarm.engine.prompt.continuation import Continuation, Prompt

ANONYMOUS_SLACK_TOKENS = 8
"""What a nameless continuation may drop of its line (a reply's end that a template trims)."""


class Continued(Protocol):
    """What there is to know of a line."""

    @property
    def transcript(self) -> Transcript: ...

    @property
    def messages(self) -> tuple[Message, ...] | None: ...

    @property
    def in_use(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class KnownLine:
    """A line as it stands, for another thread."""

    transcript: Transcript
    messages: tuple[Message, ...] | None
    in_use: bool

    @classmethod
    def of(cls, line: Continued) -> "KnownLine":
        return cls(line.transcript, line.messages, line.in_use)


L = TypeVar("L", bound=Continued)


def choose_line(
    lines: Sequence[L], continuation: Continuation, *, named: bool
) -> tuple[L | None, Prompt]:
    """The idle line with the longest shared prefix, if the request continues it, and its prompt.

    A request that would throw away most of a line gets a line of its own (None), but takes over
    the ids of whatever line it agrees with, so that their blocks are found.
    """
    idle = [line for line in lines if not line.in_use]
    best = _most_like(idle, continuation)
    if best is not None and _continues(*best, named=named):
        return best[0], continuation.of(best[0].transcript)
    if len(idle) < len(lines):
        best = _most_like(lines, continuation)
    return None, continuation.of(EMPTY if best is None else best[0].transcript)


def _most_like(lines: Iterable[L], continuation: Continuation) -> tuple[L, int] | None:
    """The first of those that share most, and how much.

    Lines that cannot share more are not compared to the end: that would encode text for them.
    """
    bounded = [(continuation.most_shared(line.transcript), line) for line in lines]
    best: tuple[int, int] | None = None
    for position in sorted(range(len(bounded)), key=lambda n: -bounded[n][0]):
        most, line = bounded[position]
        if best is not None and most < best[0]:
            break
        shared = continuation.num_shared(line.transcript), -position
        best = shared if best is None else max(best, shared)
    return None if best is None else (bounded[-best[1]][1], best[0])


def _continues(line: Continued, num_shared: int, *, named: bool) -> bool:
    num_lost = line.transcript.num_tokens - num_shared
    if not named:
        return num_lost <= ANONYMOUS_SLACK_TOKENS and num_shared > num_lost
    return num_shared >= num_lost
