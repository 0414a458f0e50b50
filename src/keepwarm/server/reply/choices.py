"""The replies to one request, side by side: one, or as many as its `n` says."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager

from keepwarm.core.events import Completed, Delta, Event, Failed
from keepwarm.engine.requests import GenerateRequest, ReceiptKey
from keepwarm.server.reply.tasks import ended
from keepwarm.service.async_engine import AsyncEngine
from keepwarm.service.event_stream import EventStream

Merged = asyncio.Queue[tuple[int, Event]]


class Choices:
    """Submits the first request, and the others when its prompt is computed: they find its KV.

    With a `key` there is one reply, which runs on when its client disconnects.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        requests: Sequence[GenerateRequest],
        key: ReceiptKey | None = None,
    ) -> None:
        self._engine = engine
        self._first, *self._others = requests
        self._key = key

    async def events(self) -> AsyncGenerator[tuple[int, Event], None]:
        """Submit the requests, and yield each event with its reply's number until all have ended.

        The task that iterates owns the requests: closing the iterator ends them. Raises what
        `submit` raises, and the error that a reply failed with.
        """
        await self._check_lengths()
        async with self._engine.generate(self._first, self._key) as first:
            if not self._others:
                async for event in first:
                    yield 0, _checked(event)
                return
            async with aclosing(self._merged(first)) as merged:
                async for choice, event in merged:
                    yield choice, _checked(event)

    async def _check_lengths(self) -> None:
        """Refuse prompts that are too long now: they are submitted when the stream has begun."""
        for request in self._others:
            if request.source != self._first.source:
                await self._engine.check_length(request)

    async def _merged(self, first: EventStream) -> AsyncGenerator[tuple[int, Event], None]:
        merged: Merged = asyncio.Queue(maxsize=1)
        waiting = list(enumerate(self._others, 1))
        async with AsyncExitStack() as others, _pumps() as pumps:
            pumps.append(asyncio.create_task(_pump(0, first, merged)))
            num_running = 1
            while num_running:
                choice, event = await merged.get()
                yield choice, event
                while waiting and isinstance(event, Delta | Completed):
                    number, request = waiting.pop(0)
                    stream = await others.enter_async_context(self._engine.generate(request))
                    pumps.append(asyncio.create_task(_pump(number, stream, merged)))
                    num_running += 1
                num_running -= isinstance(event, Completed | Failed)


@asynccontextmanager
async def _pumps() -> AsyncIterator[list[asyncio.Task[None]]]:
    """Collect tasks; leaving the block ends them all."""
    pumps: list[asyncio.Task[None]] = []
    try:
        yield pumps
    finally:
        await ended(pumps)


async def _pump(number: int, stream: EventStream, merged: Merged) -> None:
    # `merged` holds one event, so that what is not read stays in its stream, which merges it.
    async for event in stream:
        await merged.put((number, event))


def _checked(event: Event) -> Event:
    if isinstance(event, Failed):
        raise event.error
    return event
