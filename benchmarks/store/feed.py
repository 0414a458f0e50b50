"""A store that is kept busy: noise of a benchmark's own is written beside the engine's records."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from benchmarks.store.chat import pieces_of
from keepwarm.bench.requiring import require
from keepwarm.core.block import BlockHash, child_hash
from keepwarm.core.layout import BLOCK_TOKENS, CacheLayout
from keepwarm.core.stored import AgentState, KVFamily, Record, Saved
from keepwarm.store.agent_cache_store import AgentCacheStore, StoreConfig

DRAIN_TIMEOUT_S = 60.0
DISK_BUDGET_BYTES = 256 << 20
"""The noise evicts itself, as on a disk that is full."""
QUEUE_BYTES = 64 << 20
WITHOUT_PAUSE = 1e12
"""Bytes per second: the queue is always full."""


class FedStore(AgentCacheStore):
    """Writes whole blocks of noise at a pace, while it is told to; the engine hears nothing of it.

    `feed` is called by the engine's thread, like everything of a store. `commit_s`: the seconds
    from each commit to its answer.
    """

    def __init__(self, path: Path, layout: CacheLayout) -> None:
        self._on_their_way: set[BlockHash] = set()
        self.commit_s: list[float] = []
        recycle_page_cache(path, DISK_BUDGET_BYTES)
        config = StoreConfig(disk_budget_bytes=DISK_BUDGET_BYTES, queue_bytes=QUEUE_BYTES)
        super().__init__(path, config=config)
        self._noise_family = KVFamily("noise", layout)
        noise = np.random.default_rng(0).bytes(layout.block_bytes)
        self._pieces = pieces_of(memoryview(noise), layout, BLOCK_TOKENS)
        self.fed_s = 0.0
        self.written_while_fed = 0
        self._num_fed = 0
        self._fed_bytes = 0
        self._bytes_per_s = 0.0
        self._started_s = 0.0

    @contextmanager
    def fed(self, bytes_per_s: float) -> Iterator[None]:
        """Keep this pace in `feed` until the block ends."""
        self._bytes_per_s, self._started_s, self._fed_bytes = bytes_per_s, time.perf_counter(), 0
        written_before = self.health().written_bytes
        try:
            yield
        finally:
            self._bytes_per_s = 0.0
            self.fed_s += time.perf_counter() - self._started_s
            self.written_while_fed += self.health().written_bytes - written_before

    @property
    def written_per_s(self) -> float:
        """Return how many bytes were written per second while it was fed."""
        return self.written_while_fed / self.fed_s

    def feed(self) -> None:
        """Hand over what is due by now, as far as the queue has room."""
        due_bytes = (time.perf_counter() - self._started_s) * self._bytes_per_s
        block_bytes = self.record_bytes(self._noise_family, BLOCK_TOKENS)
        while self._bytes_per_s and self._fed_bytes < due_bytes and self.accepts(block_bytes):
            self._feed_one()
            self._fed_bytes += block_bytes

    def drain(self) -> None:
        """Wait until all of it is written."""
        until = time.monotonic() + DRAIN_TIMEOUT_S
        while self._on_their_way:
            require(time.monotonic() < until, f"{self!r} after a minute")
            time.sleep(0.001)
            self.poll()

    def commit(self, state: AgentState, answer: Callable[[bool], object]) -> None:
        started = time.perf_counter()

        def timed_answer(durable: bool) -> None:
            self.commit_s.append(time.perf_counter() - started)
            answer(durable)

        super().commit(state, timed_answer)

    def _feed_one(self) -> None:
        self._num_fed += 1
        token_ids = (self._num_fed, *range(1, BLOCK_TOKENS))
        root = self._noise_family.root
        block_hash = child_hash(root, token_ids)
        record = Record(block_hash, root, root, depth=0, start=0, stop=BLOCK_TOKENS)
        self._on_their_way.add(block_hash)

        def is_written(_: Saved) -> None:
            self._on_their_way.remove(block_hash)

        self.save(self._noise_family, record, token_ids, self._pieces, None, is_written)


def recycle_page_cache(folder: Path, nbytes: int) -> None:
    """Have the system own memory for `nbytes` bytes of files.

    A virtual machine gets it from its host at the first touch, ten times slower than ever after.
    """
    file = folder / "recycled"
    with file.open("wb") as target:
        for _ in range(nbytes >> 20):
            target.write(bytes(1 << 20))
    file.unlink()
