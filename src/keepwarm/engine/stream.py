"""One request's events on the event loop, whoever reads them and however slowly."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Self

from keepwarm.core.errors import DeadlineExceeded, QueueTimeout
from keepwarm.core.events import Completed, Delta, Event, Failed, Progress, Started


class EventStream(AsyncIterator[Event]):
    """Ends after Completed or Failed. Belongs to the event loop's thread.

    What is not read yet is kept as one Delta and one Progress, so a slow reader costs as much
    memory as its reply has text. `cancel_request` ends the request in the engine.
    """

    def __init__(self, cancel_request: Callable[[], None]) -> None:
        self._cancel_request = cancel_request
        self._unread: deque[Event] = deque()
        self._news = asyncio.Event()
        self._timers: list[asyncio.TimerHandle] = []
        self._sent_text: list[str] = []
        self.has_started = False
        self.end: asyncio.Future[Completed | Failed] = asyncio.get_running_loop().create_future()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        while not self._unread:
            if self.end.done():
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()
        return self._unread.popleft()

    @property
    def has_ended(self) -> bool:
        return self.end.done()

    def put(self, event: Event) -> None:
        if self.end.done():
            return
        self.has_started |= isinstance(event, Started | Delta)
        last = self._unread[-1] if self._unread else None
        if isinstance(event, Delta):
            self._sent_text.append(event.text)
        if isinstance(event, Delta) and isinstance(last, Delta):
            self._unread[-1] = _joined(last, event)
        elif isinstance(event, Progress) and isinstance(last, Progress):
            self._unread[-1] = event
        else:
            self._unread.append(event)
        if isinstance(event, Completed | Failed):
            self._finish(event)
        self._news.set()

    def limit(self, *, queue_s: float | None, total_s: float | None) -> None:
        """End the request when it has not started, or not ended, so many seconds from now."""
        loop = asyncio.get_running_loop()
        if queue_s is not None:
            self._timers.append(loop.call_later(queue_s, self._give_up_waiting, queue_s))
        if total_s is not None:
            error = DeadlineExceeded(deadline_s=total_s)
            self._timers.append(loop.call_later(total_s, self.fail, error))

    def fail(self, error: Exception) -> None:
        """The request ends with this, whatever the engine has to say of it later."""
        if not self.end.done():
            self._cancel_request()
            self.put(Failed("", None, error, "".join(self._sent_text)))

    def hang_up(self) -> None:
        """Nobody reads any more: the engine stops computing within a step."""
        if not self.end.done():
            self._cancel_request()

    def _give_up_waiting(self, waited_s: float) -> None:
        if not self.has_started:
            self.fail(QueueTimeout(waited_s=waited_s))

    def _finish(self, event: Completed | Failed) -> None:
        self.end.set_result(event)
        for timer in self._timers:
            timer.cancel()


def replayed(text: str, completed: Completed) -> EventStream:
    """What a request that has ended said, for whoever asks again."""
    stream = EventStream(lambda: None)
    stream.put(Started(completed.request_id, completed.agent_id, completed.cache))
    if text:
        stream.put(Delta(completed.request_id, completed.agent_id, text, completed.token_ids))
    stream.put(completed)
    return stream


def _joined(one: Delta, other: Delta) -> Delta:
    return replace(one, text=one.text + other.text, token_ids=one.token_ids + other.token_ids)
