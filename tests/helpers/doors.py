"""The async engine on the fake generator, and a gate that lets it step."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from engines import DEVICE_S, FakeFactory, fake_engine
from keepwarm import AgentCacheStore, BlockPoolBatchEngine
from keepwarm.core.events import Completed, Event, Failed
from keepwarm.engine.requests import GenerateRequest
from keepwarm.fleet.fleet import Fleet
from keepwarm.service.async_engine import AsyncEngine
from keepwarm.service.event_stream import EventStream
from keepwarm.testing.generator import FakeBatchGenerator
from waiting import PATIENCE_S

T = TypeVar("T")


class Gate:
    """A gate, open at first. While it is closed, each call of the generator waits at it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._num_allowed: int | None = None
        self.num_waited = 0

    def close(self) -> int:
        """Let the next call wait; return how many came before."""
        with self._changed:
            self._num_allowed = 0
            return self.num_waited

    def open(self) -> None:
        with self._changed:
            self._num_allowed = None
            self._changed.notify_all()

    def allow(self, calls: int) -> None:
        with self._changed:
            self._num_allowed = (self._num_allowed or 0) + calls
            self._changed.notify_all()

    def pass_through(self) -> None:
        """Let the engine's thread wait, without the interpreter's lock, until the gate is open."""
        time.sleep(DEVICE_S)
        with self._changed:
            self.num_waited += 1
            self._changed.wait_for(lambda: self._num_allowed != 0, PATIENCE_S)
            if self._num_allowed is not None:
                self._num_allowed -= 1


class _GatedGenerator(FakeBatchGenerator):
    def __init__(self, gate: Gate, **options: Any) -> None:
        super().__init__(**options)
        self._gate = gate

    def _count_call(self) -> None:
        self._gate.pass_through()
        super()._count_call()


class GatedFactory(FakeFactory):
    """Makes generators that wait at a gate before each prefill and each decode."""

    def __init__(self, *, script: list[int] | None = None) -> None:
        super().__init__(script=script)
        self.gate = Gate()

    def __call__(self, *, deterministic: bool) -> FakeBatchGenerator:
        generator = _GatedGenerator(self.gate, script=self._script, deterministic=deterministic)
        self.made.append(generator)
        return generator


class Opener:
    """Opens one engine after another, on a store where `home` is given; `change` may break each."""

    def __init__(
        self,
        home: Path | None = None,
        *,
        factory: FakeFactory | None = None,
        change: Callable[[int, BlockPoolBatchEngine], None] = lambda number, engine: None,
        **options: Any,
    ) -> None:
        self.opened: list[BlockPoolBatchEngine] = []
        self.num_closed = 0
        self._home = home
        self._factory = factory or FakeFactory(pause_s=DEVICE_S)
        self._change = change
        self._options = options

    def __call__(self) -> tuple[Fleet, Callable[[], None]]:
        store = None if self._home is None else AgentCacheStore(self._home)

        def close() -> None:
            self.num_closed += 1
            if store is not None:
                store.close()

        try:
            engine = fake_engine(factory=self._factory, store=store, **self._options)
            self._change(len(self.opened), engine)
        except BaseException:
            close()
            raise
        self.opened.append(engine)
        return Fleet.of_one(engine), close


@asynccontextmanager
async def engine_of(
    opener: Opener, *, grace_s: float = 0.0, **options: Any
) -> AsyncIterator[AsyncEngine]:
    engine = AsyncEngine(opener, **options)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop(grace_s)
        assert engine.has_ended


def run(test: Coroutine[Any, Any, T]) -> T:
    """Run an async test; it must end in PATIENCE_S seconds and leave no task behind."""

    async def bounded() -> T:
        result = await asyncio.wait_for(test, PATIENCE_S)
        await settled()
        return result

    return asyncio.run(bounded())


async def settled() -> None:
    """Wait until no task is left but the calling one."""
    for _ in range(200):
        if len(asyncio.all_tasks()) == 1:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(asyncio.all_tasks())


async def until(condition: Callable[[], object]) -> None:
    """Wait until the condition holds; `run` bounds the time."""
    while not condition():  # noqa: ASYNC110 - what it waits for happens in another thread
        await asyncio.sleep(0.001)


def text(content: str = "Hello", **more: Any) -> GenerateRequest:
    return GenerateRequest(**{"text": content, "max_tokens": 4, **more})


def message(content: str = "Hello", agent_id: str = "ada", **more: Any) -> GenerateRequest:
    append = [{"role": "user", "content": content}]
    return GenerateRequest(**{"agent_id": agent_id, "append": append, "max_tokens": 4, **more})


async def events_of(stream: EventStream) -> list[Event]:
    return [event async for event in stream]


async def end_of(stream: EventStream) -> Completed | Failed:
    return await asyncio.shield(stream.end)


async def reply(engine: AsyncEngine, request: GenerateRequest) -> Completed:
    end = await end_of(await engine.submit(request))
    assert isinstance(end, Completed), end
    return end


async def hold(engine: AsyncEngine) -> threading.Event:
    """Hold the engine's thread until the returned event is set."""
    holding, released = threading.Event(), threading.Event()

    def wait(_: object) -> None:
        holding.set()
        released.wait(PATIENCE_S)

    engine._thread.ask(wait)
    await asyncio.to_thread(holding.wait, PATIENCE_S)
    return released


async def cancel(task: "asyncio.Task[Any]") -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


def check_is_empty(engine: BlockPoolBatchEngine) -> None:
    """Check that no request waits, no row is taken and no line is in use."""
    engine.check()
    assert not engine.batch.waiting
    assert not engine.batch.running
    assert not engine._turns.active
    lines = [line for agent in engine.book for line in agent.lines]
    assert not [line for line in lines if line.in_use or line.blocks.is_held]
