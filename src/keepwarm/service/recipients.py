"""Who is told what the engines say: the streams of requests, and the answers that calls await."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

from keepwarm.core.events import Completed, Event, Failed
from keepwarm.engine.requests import GenerateRequest
from keepwarm.engine.turn.intake import Reading
from keepwarm.fleet.fleet import Fleet
from keepwarm.service.event_stream import EventStream

T = TypeVar("T")

Begin = Callable[[Fleet, Future[T]], None]
"""Starts work in the fleet, which sets the future when it is done."""


class Recipients:
    """Owns what leads from the engines' thread back to the event loop. Lives on that thread.

    Only commands and `EngineThread` call its methods. A stream is entered by the same command that
    submits its request, so that no event can come before its stream is known.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._streams: dict[str, EventStream] = {}
        self._answers: list[Future[Any]] = []

    def __repr__(self) -> str:
        return f"Recipients({self.num_streams} streams, {self.num_answers} answers)"

    @property
    def num_streams(self) -> int:
        """How many requests run in the engines. Any thread may read it."""
        return len(self._streams)

    @property
    def num_answers(self) -> int:
        """How many calls still await their answer. Any thread may read it."""
        return sum(not answer.done() for answer in self._answers)

    def submit(
        self, request: GenerateRequest, stream: EventStream, fleet: Fleet, reading: Reading
    ) -> None:
        """Submit the request; `stream` gets its events. Raises what `Fleet.submit` raises."""
        self._streams[fleet.submit(request, reading)] = stream

    def cancel(self, stream: EventStream, fleet: Fleet) -> None:
        """End the request of this stream, if it was submitted and has not ended.

        It is found by its stream: a fleet that was opened again counts its ids from the start.
        """
        for request_id, known in self._streams.items():
            if known is stream:
                fleet.cancel(request_id)
                return

    def begin(self, begin: Begin[T], answer: "Future[T]", fleet: Fleet) -> None:
        """Begin work whose answer is failed if the engines break before they give it.

        Raises what `begin` raises; then there is no answer to wait for.
        """
        self._answers = [other for other in self._answers if not other.done()]
        begin(fleet, answer)
        self._answers.append(answer)

    def deliver(self, events: Sequence[Event]) -> None:
        """Put the events of a step into their requests' streams."""
        pairs: list[tuple[EventStream, Event]] = []
        for event in events:
            is_end = isinstance(event, Completed | Failed)
            find = self._streams.pop if is_end else self._streams.get
            stream = find(event.request_id, None)
            if stream is not None:
                pairs.append((stream, event))
        self._post(pairs)

    def lose(self, error: Exception) -> None:
        """Fail everything that runs: the engines are gone."""
        answers, self._answers = self._answers, []
        for answer in answers:
            _fail(answer, error)
        streams, self._streams = self._streams, {}
        self._post([(stream, Failed(name, None, error, "")) for name, stream in streams.items()])

    def _post(self, pairs: Sequence[tuple[EventStream, Event]]) -> None:
        """Hand the events over: streams belong to the event loop's thread."""
        if pairs:
            with suppress(RuntimeError):  # the loop has been closed: no one reads any more
                self._loop.call_soon_threadsafe(_put_all, pairs)


def _fail(answer: "Future[Any]", error: Exception) -> None:
    """Fail the answer, unless it is there already or its caller has cancelled it."""
    is_open = answer.running() or (not answer.done() and answer.set_running_or_notify_cancel())
    if is_open:
        answer.set_exception(error)


def _put_all(pairs: Sequence[tuple[EventStream, Event]]) -> None:
    for stream, event in pairs:
        stream.put(event)
