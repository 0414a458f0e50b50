"""Long prompts, read on threads of their own while the engines' thread goes on."""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from keepwarm.core.errors import QueueTimeout
from keepwarm.engine.prompt.prompt_encoder import Guard
from keepwarm.engine.prompt.prompt_reader import Draft, ReadElsewhere
from keepwarm.engine.prompt.reader_threads import Readers
from keepwarm.engine.requests import GenerateRequest
from keepwarm.engine.turn.intake import Reading
from keepwarm.fleet.fleet import Fleet
from keepwarm.service.engine_thread import EngineThread

T = TypeVar("T")


class LongPrompts:
    """Owns the reader threads, for which `max_waiting` prompts may wait. On the event loop."""

    def __init__(self, thread: EngineThread, *, max_waiting: int) -> None:
        self._thread = thread
        self._readers = Readers(max_waiting=max_waiting)

    def __repr__(self) -> str:
        return f"LongPrompts({self._readers!r})"

    async def call(
        self,
        call: Callable[[Fleet, Reading], None],
        request: GenerateRequest,
        arrived_s: float,
    ) -> None:
        """Call it on the engines' thread, and again once the prompt that it found long is read.

        `arrived_s` is a time of the event loop; reading ends within the request's queue timeout.
        Raises what the call raises, QueueFull and QueueTimeout.
        """
        draft: Draft | None = None
        # More than one round where the agent's lines change while the prompt is being read.
        while True:
            try:
                return await self._thread.call(partial(_with_reading, call, Reading(draft)))
            except ReadElsewhere as elsewhere:
                draft = await self._read_in_time(elsewhere.work, request, arrived_s)

    async def read(self, work: Callable[[Guard], T]) -> T:
        """Do the work on a reader thread, and end it when the caller is cancelled.

        Raises QueueFull, and what the work raises.
        """
        job = self._readers.begin(work)
        try:
            return await asyncio.wrap_future(job.answer)
        finally:
            job.cancel()

    async def _read_in_time(
        self, work: Callable[[Guard], Draft], request: GenerateRequest, arrived_s: float
    ) -> Draft:
        limit_s = request.queue_timeout_s
        try:
            async with asyncio.timeout_at(None if limit_s is None else arrived_s + limit_s):
                return await self.read(work)
        except TimeoutError:
            raise QueueTimeout(waited_s=limit_s or 0.0) from None


def _with_reading(call: Callable[[Fleet, Reading], None], reading: Reading, fleet: Fleet) -> None:
    call(fleet, reading)
