"""The replies to one request: one, or as many as its `n` says, side by side."""

import asyncio
from collections.abc import AsyncIterator, Sequence

from keepwarm.core.events import Completed, Delta, Event, Failed
from keepwarm.engine.engine import Engine
from keepwarm.engine.requests import GenerateRequest
from keepwarm.engine.stream import EventStream


class Choices:
    """The first reply computes the prompt; the others begin when that is done, and find its KV."""

    def __init__(
        self, engine: Engine, first: EventStream, others: Sequence[GenerateRequest]
    ) -> None:
        self._engine = engine
        self._streams = [first]
        self._others = others
        self._is_abandoned = False
        self.outlives_its_reader = False
        self.has_failed = False

    @classmethod
    async def open(cls, engine: Engine, requests: Sequence[GenerateRequest]) -> "Choices":
        """Raises what `submit` raises."""
        first = await engine.submit(requests[0])
        return cls(engine, first, requests[1:])

    def hang_up(self) -> None:
        """Nobody reads them any more."""
        if self.outlives_its_reader:
            return
        self._is_abandoned = True
        for stream in self._streams:
            stream.hang_up()

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """Each event with the number of its reply, until all have ended."""
        if not self._others:
            async for event in self._streams[0]:
                self.has_failed |= isinstance(event, Failed)
                yield 0, event
            return
        async for pair in self._merged():
            self.has_failed |= isinstance(pair[1], Failed)
            yield pair

    async def _merged(self) -> AsyncIterator[tuple[int, Event]]:
        merged: asyncio.Queue[tuple[int, Event]] = asyncio.Queue(maxsize=1)
        pumps = [asyncio.create_task(_pump(0, self._streams[0], merged))]
        num_running, num_choices = 1, 1 + len(self._others)
        try:
            while num_running:
                choice, event = await merged.get()
                yield choice, event
                if len(pumps) < num_choices and isinstance(event, Delta | Completed):
                    pumps += await self._open_others(merged)
                    num_running += len(pumps) - 1
                num_running -= isinstance(event, Completed | Failed)
        finally:
            for pump in pumps:
                pump.cancel()

    async def _open_others(
        self, merged: "asyncio.Queue[tuple[int, Event]]"
    ) -> "list[asyncio.Task[None]]":
        pumps: list[asyncio.Task[None]] = []
        for number, request in enumerate(self._others, 1):
            stream = await self._engine.submit(request)
            self._streams.append(stream)
            if self._is_abandoned:
                stream.hang_up()
            pumps.append(asyncio.create_task(_pump(number, stream, merged)))
        return pumps


async def _pump(
    number: int, stream: EventStream, merged: "asyncio.Queue[tuple[int, Event]]"
) -> None:
    async for event in stream:
        await merged.put((number, event))
