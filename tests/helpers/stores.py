"""Stores in a folder, and the questions that crash tests ask of the folder."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from engines import completed, drain, fake_engine, settle, step
from keepwarm import AgentCacheStore, BlockPoolBatchEngine
from keepwarm.core.agent_store import AgentStore
from keepwarm.core.events import Completed
from keepwarm.store.agent_cache_store import StoreConfig
from keepwarm.store.disk.io_thread import Units
from keepwarm.testing.agent_store import MemoryAgentStore
from keepwarm.testing.clock import FakeClock
from waiting import wait_until

MEGABYTE = 1 << 20

Restart = Callable[..., BlockPoolBatchEngine]

T = TypeVar("T")


def hear(store: AgentStore, is_answered: Callable[[], object]) -> None:
    """Poll the store until it has answered."""

    def listen() -> None:
        store.wait(0.1)
        store.poll()

    wait_until(is_answered, listen)


def finish(units: Units[T]) -> T:
    """Do long work at once."""
    try:
        while True:
            next(units)
    except StopIteration as end:
        value: T = end.value
        return value


class HeldAnswers:
    """Holds a store's answers back while `are_held`; a `poll` that has been told delivers them."""

    def __init__(self, *, are_held: bool = False) -> None:
        self.are_held = are_held
        self._due: list[Callable[[], object]] = []

    def __len__(self) -> int:
        return len(self._due)

    def through(self, answer: Callable[[Any], object]) -> Callable[[Any], object]:
        """Return what a call is to answer to, instead of `answer`."""
        return lambda value: self._due.append(partial(answer, value))

    def deliver(self) -> None:
        if not self.are_held:
            due, self._due = self._due, []
            for call in due:
                call()


@dataclass
class Setup:
    """An engine on a store, and the store's clock."""

    engine: BlockPoolBatchEngine
    store: AgentCacheStore
    clock: FakeClock

    def run(self, **request: Any) -> Completed:
        request_id = self.engine.submit(**request)
        return completed(drain(self.engine), request_id)

    def settle(self) -> None:
        """Step until the store has taken all KV that waits for it."""
        settle(self.engine)

    def settle_or_refused(self) -> None:
        """Step until nothing is on its way to the disk any more."""
        for _ in range(500):
            if not self.store.health().num_queued:
                return
            self.store.wait(0.05)
            step(self.engine)
        raise AssertionError(f"{self.store.health()}")

    def reconcile(self, folder: Path) -> None:
        """Step until the store counts as many records as the folder has."""
        for _ in range(500):
            if self.store.health().num_records == len(record_files(folder)):
                return
            self.store.wait(0.02)
            step(self.engine)
        raise AssertionError(f"{self.store!r} and {len(record_files(folder))} files")


@contextmanager
def opened(folder: Path, *, config: dict[str, Any] | None = None, **engine: Any) -> Iterator[Setup]:
    """Open an engine on a store; it ends as in a crash: what only memory has is lost."""
    terms = StoreConfig(**{"free_floor_bytes": 0, **(config or {})})
    clock = FakeClock()
    with AgentCacheStore(folder, config=terms, clock=clock) as store:
        setup = Setup(fake_engine(store=store, **engine), store, clock)
        yield setup
        setup.engine.check()


@contextmanager
def restarting(kind: str, folder: Path) -> Iterator[Restart]:
    """Give a function that opens an engine on what the last one left, in memory or on the disk.

    With `clean=False` the last engine is not closed first.
    """
    memory = MemoryAgentStore()
    stores: list[AgentCacheStore] = []
    engines: list[BlockPoolBatchEngine] = []

    def again(*, clean: bool = True, **more: Any) -> BlockPoolBatchEngine:
        if engines and clean:
            assert engines[-1].close()
        while stores:
            stores.pop().close()
        if kind == "disk":
            stores.append(AgentCacheStore(folder))
        engines.append(fake_engine(store=stores[0] if stores else memory, **more))
        return engines[-1]

    yield again
    while stores:
        stores.pop().close()


def record_files(folder: Path) -> list[Path]:
    return sorted((folder / "blocks").glob("*/*.safetensors"))


def set_aside_files(folder: Path) -> list[Path]:
    return sorted((folder / "set-aside").glob("*.safetensors"))


def disk_bytes(folder: Path) -> int:
    """Return the size of all files below; those that vanish meanwhile count nothing."""
    total = 0
    with os.scandir(folder) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):
                is_folder = entry.is_dir(follow_symlinks=False)
                total += disk_bytes(Path(entry.path)) if is_folder else entry.stat().st_size
    return total
