"""The events of one request on the event loop, however slowly they are read."""

import asyncio
from array import array
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Self

from keepwarm.core.errors import DeadlineExceeded, QueueTimeout
from keepwarm.core.events import Completed, Delta, Event, Failed, Progress, Started

_MAX_PIECES = 256


class EventStream(AsyncIterator[Event]):
    """Yields the events until Completed or Failed. Belongs to the event loop's thread.

    `cancel_request` ends the request in the engine. The engine never waits for a reader: what is
    not read yet is merged into one Delta and one Progress, so a slow reader costs no more memory
    than its reply's text.
    """

    def __init__(self, cancel_request: Callable[["EventStream"], None]) -> None:
        self._cancel_request = cancel_request
        self._unread: deque[Event | _Deltas] = deque()
        self._news = asyncio.Event()
        self._timers: list[asyncio.TimerHandle] = []
        self._said = _Text()
        self.has_started = False
        self.end: asyncio.Future[Completed | Failed] = asyncio.get_running_loop().create_future()

    def __repr__(self) -> str:
        state = "ended" if self.has_ended else "running" if self.has_started else "waiting"
        return f"EventStream({state}, {len(self._unread)} unread)"

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        while not self._unread:
            if self.end.done():
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()
        event = self._unread.popleft()
        return event.joined() if isinstance(event, _Deltas) else event

    @property
    def has_ended(self) -> bool:
        """Whether the last event has come, read or not."""
        return self.end.done()

    def put(self, event: Event) -> None:
        """Add an event; behind the last one it is dropped."""
        if self.end.done():
            return
        if isinstance(event, Delta):
            self.has_started = True
            self._said.add(event.text)
            self._put_delta(event)
        elif isinstance(event, Progress) and self._last_is_progress():
            self._unread[-1] = event
        else:
            self.has_started |= isinstance(event, Started)
            self._unread.append(event)
        if isinstance(event, Completed | Failed):
            self._finish(event)
        self._news.set()

    def limit(self, *, since_s: float, queue_s: float | None, total_s: float | None) -> None:
        """Fail the request unless it starts within `queue_s` seconds, and ends within `total_s`.

        Both count from `since_s`, a time of the event loop. None is no limit.
        """
        loop = asyncio.get_running_loop()
        if self.end.done():
            return
        if queue_s is not None:
            timer = loop.call_at(since_s + queue_s, self._give_up_waiting, queue_s)
            self._timers.append(timer)
        if total_s is not None:
            error = DeadlineExceeded(deadline_s=total_s)
            self._timers.append(loop.call_at(since_s + total_s, self.fail, error))

    def fail(self, error: Exception) -> None:
        """End the request with this error; what the engine says of it later is dropped."""
        if not self.end.done():
            self._cancel_request(self)
            self.put(Failed("", None, error, self._said.joined()))

    def hang_up(self) -> None:
        """Cancel the request, because its reader has gone: the engine stops within a step."""
        if not self.end.done():
            self._cancel_request(self)

    def _put_delta(self, delta: Delta) -> None:
        last = self._unread[-1] if self._unread else None
        if isinstance(last, _Deltas):
            last.add(delta)
        elif isinstance(last, Delta):
            self._unread[-1] = _Deltas(last, delta)
        else:
            self._unread.append(delta)

    def _last_is_progress(self) -> bool:
        return bool(self._unread) and isinstance(self._unread[-1], Progress)

    def _give_up_waiting(self, waited_s: float) -> None:
        if not self.has_started:
            self.fail(QueueTimeout(waited_s=waited_s))

    def _finish(self, event: Completed | Failed) -> None:
        self.end.set_result(event)
        for timer in self._timers:
            timer.cancel()


class _Text:
    """Text that comes in pieces, which are joined now and then: each `str` costs some 50 bytes."""

    __slots__ = ("_pieces",)

    def __init__(self) -> None:
        self._pieces: list[str] = []

    def add(self, piece: str) -> None:
        self._pieces.append(piece)
        if len(self._pieces) > _MAX_PIECES:
            self._pieces = [self.joined()]

    def joined(self) -> str:
        return "".join(self._pieces)


class _Deltas:
    """Deltas that are not read yet, merged into one."""

    __slots__ = ("_first", "_text", "_token_ids")

    def __init__(self, first: Delta, second: Delta) -> None:
        self._first = first
        self._text = _Text()
        self._token_ids = array("q")
        self.add(first)
        self.add(second)

    def add(self, delta: Delta) -> None:
        self._text.add(delta.text)
        self._token_ids.extend(delta.token_ids)

    def joined(self) -> Delta:
        return replace(self._first, text=self._text.joined(), token_ids=tuple(self._token_ids))


def replayed(text: str, completed: Completed) -> EventStream:
    """Make a stream that repeats the reply of a request that has ended."""
    stream = EventStream(lambda _: None)
    begun = (completed.request_id, completed.agent_id, completed.cache)
    stream.put(Started(*begun, adapted=completed.adapted))
    if text:
        stream.put(Delta(completed.request_id, completed.agent_id, text, completed.token_ids))
    stream.put(completed)
    return stream
