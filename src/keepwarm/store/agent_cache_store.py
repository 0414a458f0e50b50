"""AgentCacheStore: agents and their KV on disk, within a budget, whatever becomes of the process.

This is the side that the engines' thread sees. It decides, in memory, what is written, read and
evicted; the I/O thread acts (`disk/`), and `poll` passes its answers on.
"""

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

from keepwarm.core.agent_store import Answers, BundleTicket
from keepwarm.core.block import BlockHash
from keepwarm.core.errors import ConfigError, InvariantBroken
from keepwarm.core.stored import (
    AgentState,
    AgentSummary,
    Bundle,
    BundleRead,
    BundleStored,
    BundleTerms,
    BundleWritten,
    KVFamily,
    Record,
    Saved,
    StoreHealth,
)
from keepwarm.store.agent_log import DiskLog
from keepwarm.store.bundles import DiskBundles
from keepwarm.store.catalog.opening import Opened
from keepwarm.store.catalog.reader import CatalogReader
from keepwarm.store.disk.disk_store import CATALOG_NAME, DiskStore, Limits
from keepwarm.store.disk.io_thread import IOThread, Priority
from keepwarm.store.disk.outcomes import Reconciled
from keepwarm.store.disk_room import DiskRoom
from keepwarm.store.health import DiskHealth
from keepwarm.store.parts import StoreParts
from keepwarm.store.record_index import Entry, RecordIndex
from keepwarm.store.records import DiskRecords

log = logging.getLogger("keepwarm.store")

FILES_PER_LOOK = 32
"""How many files are compared with the catalogue at a time, when nothing else is to be done."""
MIN_BUDGET_BYTES = 8 << 20
PROBE_BYTES = 64 << 10
"""How many bytes a probe writes where no record was refused before it."""
MAX_PROBE_BYTES = 16 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreConfig:
    """How many bytes the store may take.

    disk_budget_bytes: all of its files together, at every moment. free_floor_bytes: what it leaves
    free on the disk for others. queue_bytes: the KV that waits to be written; beyond that blocks
    stay in memory. set_aside_bytes: damaged files that are kept for people to look at.
    """

    disk_budget_bytes: int = 20 << 30
    free_floor_bytes: int = 1 << 30
    queue_bytes: int = 256 << 20
    set_aside_bytes: int = 64 << 20

    def __post_init__(self) -> None:
        if self.disk_budget_bytes < MIN_BUDGET_BYTES:
            raise ConfigError("disk_budget_bytes", f"must be at least {MIN_BUDGET_BYTES:,}")
        for key in ("free_floor_bytes", "queue_bytes", "set_aside_bytes"):
            if getattr(self, key) < 0:
                raise ConfigError(key, f"must not be negative, as {getattr(self, key)} is")

    def limits(self) -> Limits:
        """Return the disk's limits; what is set aside takes an eighth of the budget at most."""
        return Limits(
            self.disk_budget_bytes,
            self.free_floor_bytes,
            min(self.set_aside_bytes, self.disk_budget_bytes // 8),
        )


class AgentCacheStore:
    """Implements `AgentStore` over a folder. One process at a time; one thread calls it.

    Raises HomeInUse, CatalogTooNew, CatalogUnavailable, ConfigError and OSError when it cannot be
    opened. After that a disk that refuses is shown in `health` and nothing else is lost by it.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        config: StoreConfig | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.path = Path(path)
        self.config = config or StoreConfig()
        self._index = RecordIndex()
        self._answers = Answers()
        self._health = DiskHealth(clock)
        self._is_probing = False
        self._is_closed = False
        self._thread = IOThread("keepwarm-store")
        self._thread.start()
        self._disk, opened = self._open_disk()
        self._room = DiskRoom(
            self._thread,
            self._disk,
            self._index,
            health=self._health,
            budget_bytes=self.config.disk_budget_bytes,
            other_bytes=opened.other_bytes,
        )
        self._load(opened)
        self._reader = self._open_reader()
        parts = StoreParts(
            self._thread, self._disk, self._index, self._room, self._health, self._answers
        )
        self._records = DiskRecords(parts, queue_bytes=self.config.queue_bytes)
        self._log = DiskLog(parts, self._reader, opened)
        self._bundles = DiskBundles(parts)
        self._look_on()

    def __repr__(self) -> str:
        return f"AgentCacheStore({str(self.path)!r}, {self._index!r}, {self._records!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self, timeout_s: float | None = 60.0) -> None:
        """Do what is queued, try once more what the disk refused, and give the home back.

        What it refuses to the end is lost, and the log says what that is.
        """
        if self._is_closed:
            return
        self._is_closed = True
        self._log.retry_commits()
        losses = self._log.losses()
        self._bundles.cancel_all()
        self._reader.close()
        self._thread.post(Priority.STOP, self._disk.close)
        if not self._thread.stop(timeout_s):
            log.error("%s did not close within %s s", self.path, timeout_s)
        if self._thread.failure is not None:
            self._disk.give_home_back()
        self.poll()
        for loss in losses:
            if not self.is_durable(loss.agent_id):
                fault = self._health.fault
                log.error("lost, because the disk did not take it (%s): %s", fault, loss)

    # -- records ---------------------------------------------------------------------------------

    def plan(self, family: KVFamily, parent: BlockHash, token_ids: Sequence[int]) -> list[Record]:
        return self._records.plan(family, parent, token_ids)

    def missing_from(self, parent: BlockHash, token_ids: Sequence[int]) -> int:
        return self._records.missing_from(parent, token_ids)

    def record_bytes(self, family: KVFamily, num_tokens: int) -> int:
        return self._records.record_bytes(family, num_tokens)

    def accepts(self, nbytes: int) -> bool:
        return self._records.accepts(nbytes)

    def save(
        self,
        family: KVFamily,
        record: Record,
        token_ids: Sequence[int],
        pieces: Sequence[memoryview],
        maker: str | None,
        answer: Callable[[Saved], object],
    ) -> None:
        self._records.save(family, record, token_ids, pieces, maker, answer)

    def fetch(
        self,
        family: KVFamily,
        record: Record,
        buffer: bytearray,
        answer: Callable[[memoryview | None], object],
    ) -> None:
        self._records.fetch(family, record, buffer, answer)

    def drop(self, hashes: Iterable[BlockHash], *, if_unused: bool = False) -> None:
        self._records.drop(hashes, if_unused=if_unused)

    def clock(self) -> int:
        return self._records.clock()

    # -- the log of agents -----------------------------------------------------------------------

    def commit(self, state: AgentState, answer: Callable[[bool], object]) -> None:
        self._log.commit(state, answer)

    def delete_agent(self, agent_id: str, answer: Callable[[bool], object]) -> None:
        self._log.delete_agent(agent_id, answer)

    def is_durable(self, agent_id: str) -> bool:
        return self._log.is_durable(agent_id)

    def load_agent(self, agent_id: str) -> AgentState | None:
        return self._log.load_agent(agent_id)

    def salvage_agent(self, agent_id: str) -> AgentState:
        return self._log.salvage_agent(agent_id)

    def summaries(self) -> list[AgentSummary]:
        return self._log.summaries()

    def models(self) -> dict[str, str]:
        return self._log.models()

    def num_stored(self, agent_id: str) -> int:
        return self._log.num_stored(agent_id)

    # -- bundles ---------------------------------------------------------------------------------

    def write_bundle(
        self, family: KVFamily, tokenizer: str, state: AgentState, path: Path
    ) -> BundleTicket[BundleWritten]:
        return self._bundles.write_bundle(family, tokenizer, state, path)

    def read_bundle(self, path: Path, terms: BundleTerms) -> BundleTicket[BundleRead]:
        return self._bundles.read_bundle(path, terms)

    def store_bundle(self, bundle: Bundle, agent_id: str) -> BundleTicket[BundleStored]:
        return self._bundles.store_bundle(bundle, agent_id)

    # -- the whole -------------------------------------------------------------------------------

    def poll(self) -> None:
        self._thread.deliver()
        if self._thread.failure is not None:
            self._health.note_death(self._thread.failure)
        elif not self._health.is_suspended:
            self._try_again()
        self._answers.deliver()

    def wait(self, timeout_s: float) -> None:
        if not self._answers.take_news():
            self._thread.wait(timeout_s)

    def ask_again(self) -> None:
        self._health.ask_again()

    def health(self) -> StoreHealth:
        return StoreHealth(
            fault=self._health.fault,
            num_faults=self._health.num_faults,
            num_damaged=self._health.num_damaged,
            num_records=len(self._index),
            record_bytes=self._index.num_bytes,
            disk_bytes=self._index.num_bytes + self._room.other_bytes,
            budget_bytes=self.config.disk_budget_bytes,
            queued_bytes=self._records.queued_bytes,
            num_queued=len(self._records.queued),
            written_bytes=self._health.written_bytes,
            evicted_bytes=self._health.evicted_bytes,
            notices=self._log.notices(),
        )

    def check(self) -> None:
        self._index.check()
        unsaved = {entry.record.hash for entry in self._index if not entry.is_saved}
        if not unsaved <= self._records.queued.keys() | self._bundles.storing:
            raise InvariantBroken(f"{self!r}: records that nothing writes: {len(unsaved)}")
        readers = sum(entry.num_readers for entry in self._index)
        num_reads = self._records.num_reads + self._bundles.num_reads
        if readers > num_reads:
            raise InvariantBroken(f"{self!r}: {readers} readers of {num_reads} reads")

    # -- opening ---------------------------------------------------------------------------------

    def _open_disk(self) -> tuple[DiskStore, Opened]:
        """Open it on the I/O thread: SQLite's connection belongs to the thread that opens it."""
        limits = self.config.limits()
        try:
            return self._thread.call(
                partial(DiskStore.open, self.path, limits, self._thread.run_commits)
            )
        except BaseException:
            self._thread.stop(None)
            raise

    def _open_reader(self) -> CatalogReader:
        try:
            return CatalogReader.open(self.path / CATALOG_NAME)
        except BaseException:
            self._thread.post(Priority.STOP, self._disk.close)
            self._thread.stop(None)
            raise

    def _load(self, opened: Opened) -> None:
        last_used = opened.usage.last_used
        self._index.load(
            Entry(row.record, row.file_bytes, row.maker, last_used.get(row.hash, 0))
            for row in opened.rows
        )
        self._index.clock = opened.clock
        self._index.usage.load(opened.usage.num_lines)
        for state in opened.pinned:
            self._index.usage.know(state)
        self._room.drop(opened.unclaimed)

    # -- housekeeping ----------------------------------------------------------------------------

    def _try_again(self) -> None:
        """Ask for what the disk refused; where nothing is left of that, probe the disk."""
        self._log.try_again()
        if self._health.is_probe_due() and not self._is_probing:
            self._is_probing = True
            nbytes = min(self._records.last_refused_bytes or PROBE_BYTES, MAX_PROBE_BYTES)
            probe = partial(self._disk.probe, nbytes)
            self._thread.ask(Priority.SAVE, probe, self._take_probe)

    def _take_probe(self, fault: str | None) -> None:
        self._is_probing = False
        self._health.note_probe(fault)

    def _look_on(self) -> None:
        look = partial(self._disk.reconcile, FILES_PER_LOOK)
        self._thread.ask(Priority.HOUSEKEEPING, look, self._take_reconciled)

    def _take_reconciled(self, outcome: Reconciled) -> None:
        for row in outcome.found:
            if self._index.get(row.hash) is None:
                self._index.add(Entry(row.record, row.file_bytes, row.maker, 0))
        for record_hash in outcome.lost:
            self._index.forget(record_hash)
        if outcome.found or outcome.lost:
            log.warning(
                "%d records were found that the catalogue did not know, %d were missing",
                len(outcome.found),
                len(outcome.lost),
            )
        if not outcome.is_last:
            self._look_on()
