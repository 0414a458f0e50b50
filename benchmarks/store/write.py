"""What the store writes: how much for how much KV, how much at once, and how soon a turn."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

import numpy as np

from benchmarks.store.chat import Chat, store_thread_bytes, temporary_home
from benchmarks.store.feed import FedStore
from keepwarm.bench.report import Figure
from keepwarm.bench.requiring import require
from keepwarm.bench.timing import Percentiles
from keepwarm.core.ports import LoadedModel
from keepwarm.store.agent_cache_store import AgentCacheStore, StoreConfig
from keepwarm.store.catalog.schema import size_bytes as catalog_bytes
from keepwarm.store.disk.disk_store import CATALOG_NAME
from keepwarm.testing.generator import FAKE_LAYOUT

MAX_BYTES_RATIO = 1.15
MAX_COMMIT_MS = 10.0
TURNS_PER_AGENT = 50
LOAD_TOKENS = 600
SAMPLE_EVERY_S = 0.002


# -- bytes written -------------------------------------------------------------------------------


def bytes_written(loaded: LoadedModel, *, num_turns: int, demoting: bool) -> Figure:
    """Compare the bytes that a chat of short turns writes with its KV, down to its last token.

    Counted is what the store's thread handed to write calls: records, the write-ahead log and what
    checkpoints copy out of it. Where the system does not count that: the records, and how the
    catalogue grew.
    """
    with temporary_home() as home, AgentCacheStore(home) as store:
        chat = Chat(loaded, store)
        before = store_thread_bytes()
        catalog_before = catalog_bytes(home / CATALOG_NAME)
        for number in range(num_turns):
            (chat.say if number else chat.begin)("ada")
            if demoting:
                chat.engine.demote("ada")
                chat.settle()
        require(chat.engine.close(), "the engine did not save everything")
        kv_bytes = chat.kv_bytes("ada")
        record_bytes = store.health().written_bytes
        other_bytes = catalog_bytes(home / CATALOG_NAME) - catalog_before
        after = store_thread_bytes()
    if before is not None and after is not None:
        other_bytes = after - before - record_bytes
    return Figure(
        f"bytes written over KV made, {num_turns} turns, "
        + ("demoted after each" if demoting else "staying hot"),
        (record_bytes + other_bytes) / kv_bytes,
        MAX_BYTES_RATIO,
        facts={
            "kv_mb": kv_bytes / 1e6,
            "record_mb": record_bytes / 1e6,
            "catalogue_mb": other_bytes / 1e6,
            "tokens_per_turn": kv_bytes / loaded.layout.token_bytes / num_turns,
        },
    )


# -- the budget ----------------------------------------------------------------------------------


def most_on_disk(loaded: LoadedModel, *, budget_bytes: int, load_bytes: int, seed: int) -> Figure:
    """Compare the folder's largest size with its budget while agents read prompts, rest and come
    back.
    """
    rng = np.random.default_rng(seed)
    with temporary_home() as home:
        config = StoreConfig(disk_budget_bytes=budget_bytes)
        with AgentCacheStore(home, config=config) as store, FolderMeter(home) as meter:
            chat = Chat(loaded, store, budget_bytes=2 << 30)
            num_agents = -(-load_bytes // (LOAD_TOKENS * loaded.layout.token_bytes))
            for number in range(num_agents):
                ids = rng.integers(0, loaded.vocab_size, LOAD_TOKENS).tolist()
                chat.read(f"agent-{number}", ids)
                chat.engine.park(f"agent-{number}")
                chat.settle()
                chat.engine.prefetch(f"agent-{rng.integers(0, number + 1)}")
                chat.settle()
                meter.measure()
            health = store.health()
    require(
        health.evicted_bytes > 0 and not health.num_faults,
        f"the load did not fill the budget, or the disk refused: {health}",
    )
    return Figure(
        f"the folder's largest size over its budget of {budget_bytes / 1e6:,.0f} MB",
        meter.most_bytes / budget_bytes,
        1.0,
        facts={
            "most_mb": meter.most_bytes / 1e6,
            "most_by_disk_blocks_mb": meter.most_allocated_bytes / 1e6,
            "written_mb": health.written_bytes / 1e6,
            "evicted_mb": health.evicted_bytes / 1e6,
            "samples": meter.num_samples,
        },
    )


@dataclass(slots=True)
class FolderMeter:
    """Measures a folder's files every few milliseconds, in a thread of its own.

    Once by their lengths, as `du --apparent-size` does, and once by the disk's blocks. A file that
    is moved meanwhile counts once.
    """

    folder: Path
    most_bytes: int = 0
    most_allocated_bytes: int = 0
    num_samples: int = 0
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def measure(self) -> None:
        sizes: dict[int, tuple[int, int]] = {}
        for path in self.folder.rglob("*"):
            try:
                status = path.lstat()
            except FileNotFoundError:
                continue
            if not path.is_dir():
                sizes[status.st_ino] = (status.st_size, 512 * status.st_blocks)
        self.most_bytes = max(self.most_bytes, sum(size for size, _ in sizes.values()))
        allocated = sum(nbytes for _, nbytes in sizes.values())
        self.most_allocated_bytes = max(self.most_allocated_bytes, allocated)
        self.num_samples += 1

    def _run(self) -> None:
        while not self._stop.wait(SAMPLE_EVERY_S):
            self.measure()


# -- commits -------------------------------------------------------------------------------------


def commit_figure(
    loaded: LoadedModel, *, num_turns: int, beside: str = "", bytes_per_s: float = 0.0
) -> Figure:
    """Time the end of a turn, from its last token to its final event, which says that it is
    durable.

    The agents' own KV is tiny: what is written meanwhile is what `beside` says. `store_p95_ms` is
    the store's part.
    """
    small = replace(loaded, layout=FAKE_LAYOUT)
    with temporary_home() as home, FedStore(home, loaded.layout) as store:
        chat = Chat(small, store)
        chat.begin("warm-up")
        with store.fed(bytes_per_s):
            seconds = [_turn(chat, number, before_it=store.feed) for number in range(num_turns)]
        store.drain()
    calls, stores = Percentiles.of(seconds), Percentiles.of(store.commit_s)
    return Figure(
        f"a turn's commit, p95 of {num_turns}{beside}",
        1e3 * calls.p95_s,
        MAX_COMMIT_MS,
        unit="ms",
        facts={
            "p50_ms": 1e3 * calls.p50_s,
            "p99_ms": 1e3 * calls.p99_s,
            "longest_ms": 1e3 * max(seconds),
            "store_p50_ms": 1e3 * stores.p50_s,
            "store_p95_ms": 1e3 * stores.p95_s,
            "written_mb_per_s": store.written_per_s / 1e6,
        },
    )


def _turn(chat: Chat, number: int, *, before_it: Callable[[], None]) -> float:
    before_it()
    agent_id = f"agent-{number // TURNS_PER_AGENT}"
    return (chat.say if number % TURNS_PER_AGENT else chat.begin)(agent_id)
