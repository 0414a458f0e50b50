"""AgentCacheStore: agents and their KV on disk, within a budget, whatever becomes of the process.

This is the side that the engine's thread sees. It decides, in memory, what is written, read and
evicted; the I/O thread acts (`disk_store.py`) and answers, and `poll` passes the answers on.
"""

import itertools
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

from keepwarm.core.block import BlockHash
from keepwarm.core.errors import BundleFailed, ConfigError, InvariantBroken, KeepwarmError
from keepwarm.core.stored import (
    AgentState,
    AgentSummary,
    Bundle,
    BundleRead,
    BundleStored,
    BundleTerms,
    BundleWritten,
    Committed,
    Fetched,
    KVFamily,
    Record,
    Saved,
    StoreEvent,
    StoreHealth,
)
from keepwarm.store.bundle_export import Export
from keepwarm.store.catalog import CatalogReader
from keepwarm.store.disk_store import (
    CATALOG_NAME,
    REMOVALS_PER_COMMAND,
    CommitDone,
    DiskStore,
    ExportDone,
    FetchDone,
    ImportDone,
    Limits,
    Opened,
    OpenFailed,
    Outcome,
    Reconciled,
    SaveDone,
)
from keepwarm.store.io_thread import IOThread, Priority
from keepwarm.store.record import max_file_bytes
from keepwarm.store.record_index import Entry, RecordIndex

log = logging.getLogger("keepwarm.store")

FILES_PER_LOOK = 32
"""How many files are compared with the catalogue at a time, when nothing else is to be done."""
FIRST_RETRY_S = 0.5
LAST_RETRY_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreConfig:
    """What the store may take.

    disk_budget_bytes: all of its files together, at every moment. free_floor_bytes: what it leaves
    free on the disk for others. queue_bytes: of KV that waits to be written, at most; beyond that
    blocks stay in memory. set_aside_bytes: of damaged files kept to be looked at.
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


MIN_BUDGET_BYTES = 8 << 20


class StoreClosed(KeepwarmError):
    """The store was closed, or its thread has died of a bug."""


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
        self._clock = clock
        self._index = RecordIndex()
        self._tickets = itertools.count(1)
        self._queued: dict[BlockHash, int] = {}
        self._reading: dict[int, BlockHash] = {}
        self._commits: dict[int, str] = {}
        self._pending: dict[str, tuple[int, AgentState | None]] = {}
        self._uncommitted: dict[str, AgentState | None] = {}
        self._refused: set[str] = set()
        self._silent: set[int] = set()
        self._bundles: dict[int, _BundleJob] = {}
        self._events: list[StoreEvent] = []
        self._health = _Health()
        self._thread: IOThread[Outcome] = IOThread("keepwarm-store")
        self._thread.start()
        self._disk, opened = self._open()
        self._other_bytes = opened.other_bytes
        self._clock_ticks = opened.clock
        self._load(opened)
        self._reader = CatalogReader.open(self.path / CATALOG_NAME)
        self._look_on()

    def __repr__(self) -> str:
        return f"AgentCacheStore({str(self.path)!r}, {self._index!r}, {len(self._queued)} queued)"

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
        """Do what is queued, try once more what the disk refused, and give the home back."""
        self._retry_commits()
        self._reader.close()
        self._thread.post(Priority.STOP, self._disk.close)
        if not self._thread.stop(timeout_s):
            log.error("%s did not close within %s s", self.path, timeout_s)

    # -- KV --------------------------------------------------------------------------------------

    def plan(self, family: KVFamily, parent: BlockHash, token_ids: Sequence[int]) -> list[Record]:
        return [entry.record for entry in self._index.plan(parent, token_ids)]

    def missing_from(self, parent: BlockHash, token_ids: Sequence[int]) -> int:
        runs = self._index.runs_of_block(parent, token_ids)
        return runs[-1].record.stop if runs else 0

    def record_bytes(self, family: KVFamily, num_tokens: int) -> int:
        return max_file_bytes(family, num_tokens)

    def accepts(self, nbytes: int) -> bool:
        if self._health.is_suspended(self._clock()) or self._thread.failure is not None:
            return False
        queued_bytes = sum(self._queued.values())
        return not queued_bytes or queued_bytes + nbytes <= self.config.queue_bytes

    def save(
        self,
        family: KVFamily,
        record: Record,
        token_ids: Sequence[int],
        pieces: Sequence[memoryview],
        maker: str | None,
    ) -> None:
        nbytes = max_file_bytes(family, record.num_tokens)
        # A record of that name may be there, behind one that is lost: this one replaces it.
        unreachable = self._index.forget(record.hash)
        if not self._make_room(nbytes, maker):
            if unreachable is not None:
                self._remove([record.hash])
            self._events.append(Saved(record.hash, retry=False))
            return
        entry = Entry(record, nbytes, maker, self._clock_ticks, is_saved=False)
        entry.num_readers = 0 if unreachable is None else unreachable.num_readers
        self._index.add(entry)
        self._queued[record.hash] = nbytes
        command = partial(self._disk.save, family, record, tuple(token_ids), tuple(pieces), maker)
        self._thread.post(Priority.SAVE, command)

    def fetch(self, family: KVFamily, record: Record, buffer: bytearray) -> int:
        ticket = next(self._tickets)
        entry = self._index.get(record.hash)
        if entry is None or entry.record != record:
            self._events.append(Fetched(ticket, None))
            return ticket
        entry.num_readers += 1
        self._reading[ticket] = record.hash
        # Behind the save of this very record, if that is still queued.
        priority = Priority.RESTORE if entry.is_saved else Priority.SAVE
        command = partial(self._disk.fetch, ticket, family, record, buffer)
        self._thread.post(priority, command)
        return ticket

    def drop(self, hashes: Iterable[BlockHash], *, if_unused: bool = False) -> None:
        is_used = self._index.usage.is_used
        chosen = [h for h in hashes if not (if_unused and is_used(h))]
        self._remove([h for h in chosen if self._index.forget(h) is not None])

    def clock(self) -> int:
        return self._clock_ticks

    # -- agents ----------------------------------------------------------------------------------

    def commit(self, state: AgentState) -> int:
        ticket = next(self._tickets)
        self._index.use(state)
        self._clock_ticks = max([self._clock_ticks, *(line.last_used for line in state.lines)])
        self._post_commit(ticket, state.agent_id, state)
        return ticket

    def delete_agent(self, agent_id: str) -> int:
        ticket = next(self._tickets)
        self.load_agent(agent_id)
        own = [entry.record.hash for entry in self._index.disuse(agent_id)]
        self._remove(own, Priority.COMMIT)  # before the answer, which says that they are gone
        self._post_commit(ticket, agent_id, None)
        return ticket

    def load_agent(self, agent_id: str) -> AgentState | None:
        if agent_id in self._uncommitted:
            return self._uncommitted[agent_id]
        state = self._reader.load_agent(agent_id)
        if state is not None:
            self._index.usage.know(state)
        return state

    def summaries(self) -> list[AgentSummary]:
        gone = {agent_id for agent_id, state in self._uncommitted.items() if state is None}
        return [s for s in self._reader.summaries() if s.agent_id not in gone]

    # -- bundles ---------------------------------------------------------------------------------

    def write_bundle(self, family: KVFamily, tokenizer: str, state: AgentState, path: Path) -> int:
        records: dict[BlockHash, tuple[Record, KVFamily]] = {}
        for line in state.lines:
            if line.tokenizer == tokenizer:
                own = replace(family, namespace=line.namespace)
                for record in self.plan(own, own.root, line.transcript.token_ids):
                    records.setdefault(record.hash, (record, own))
        ticket = self._begin_bundle(_BundleJob(path, BundleWritten))
        export = Export(family, tokenizer, state, tuple(records.values()))
        self._thread.post(Priority.SAVE, partial(self._disk.export, ticket, path, export))
        return ticket

    def read_bundle(self, path: Path, terms: BundleTerms) -> int:
        ticket = self._begin_bundle(_BundleJob(path, BundleRead))
        self._thread.post(Priority.SAVE, partial(self._disk.read_bundle, ticket, path, terms))
        return ticket

    def store_bundle(self, bundle: Bundle, agent_id: str) -> int:
        names = self._make_room_for(bundle, agent_id)
        ticket = self._begin_bundle(_BundleJob(bundle.path, BundleStored, names))
        command = partial(self._disk.import_records, ticket, bundle, len(names), agent_id)
        self._thread.post(Priority.SAVE, command)
        return ticket

    def _begin_bundle(self, job: "_BundleJob") -> int:
        ticket = next(self._tickets)
        self._bundles[ticket] = job
        return ticket

    def _make_room_for(self, bundle: Bundle, agent_id: str) -> tuple[BlockHash, ...]:
        """The first records of the bundle, as many as budget and the agent's quota allow."""
        names: list[BlockHash] = []
        family, quota_bytes = bundle.terms.family, bundle.state.settings.quota_bytes
        for record in bundle.records:
            nbytes = max_file_bytes(family, record.num_tokens)
            is_within = quota_bytes is None or (
                self._index.bytes_of(agent_id) + nbytes <= quota_bytes
            )
            if not is_within or not self._make_room(nbytes, None):
                break
            self._index.add(Entry(record, nbytes, agent_id, self._clock_ticks, is_saved=False))
            names.append(record.hash)
        return tuple(names)

    # -- the whole -------------------------------------------------------------------------------

    def poll(self) -> list[StoreEvent]:
        for outcome in self._thread.take():
            self._take(outcome)
        if self._thread.failure is not None:
            self._answer_for_the_dead()
        elif self._refused and not self._health.is_suspended(self._clock()):
            self._retry_commits()
        events, self._events = self._events, []
        return events

    def wait(self, timeout_s: float) -> None:
        if not self._events:
            self._thread.wait(timeout_s)

    def health(self) -> StoreHealth:
        return StoreHealth(
            fault=self._health.fault,
            num_faults=self._health.num_faults,
            num_damaged=self._health.num_damaged,
            num_records=len(self._index),
            record_bytes=self._index.num_bytes,
            disk_bytes=self._index.num_bytes + self._other_bytes,
            budget_bytes=self.config.disk_budget_bytes,
            queued_bytes=sum(self._queued.values()),
            num_queued=len(self._queued),
            written_bytes=self._health.written_bytes,
            evicted_bytes=self._health.evicted_bytes,
        )

    def check(self) -> None:
        self._index.check()
        unsaved = {entry.record.hash for entry in self._index if not entry.is_saved}
        unsaved -= {name for job in self._bundles.values() for name in job.names}
        if not unsaved <= self._queued.keys():
            raise InvariantBroken(f"{self!r}: records that nobody writes: {len(unsaved)}")
        readers = sum(entry.num_readers for entry in self._index)
        if readers > len(self._reading):
            raise InvariantBroken(f"{self!r}: {readers} readers of {len(self._reading)} reads")

    # -- opening ---------------------------------------------------------------------------------

    def _open(self) -> tuple[DiskStore, Opened]:
        """On the I/O thread, because the catalogue belongs to the thread that opens it."""
        config = self.config
        limits = Limits(
            config.disk_budget_bytes,
            config.free_floor_bytes,
            min(config.set_aside_bytes, config.disk_budget_bytes // 8),
        )
        opening: list[DiskStore] = []

        def open_disk() -> Outcome:
            try:
                opening.append(DiskStore(self.path, limits, self._thread.run_commits))
                return opening[0].opened()
            except (KeepwarmError, OSError) as error:
                return OpenFailed(error)

        self._thread.post(Priority.COMMIT, open_disk)
        while not (outcomes := self._thread.take()):
            self._thread.wait(1.0)
            if self._thread.failure is not None:
                raise self._thread.failure
        (outcome,) = outcomes
        if isinstance(outcome, Opened):
            return opening[0], outcome
        self._thread.stop(None)
        if isinstance(outcome, OpenFailed):
            raise outcome.error
        raise InvariantBroken(f"the store was opened with {outcome}")

    def _load(self, opened: Opened) -> None:
        last_used = {row.hash: row.last_used for row in opened.usage}
        self._index.load(
            Entry(row.record, row.file_bytes, row.maker, last_used.get(row.hash, 0))
            for row in opened.rows
        )
        self._index.usage.load((row.hash, row.num_lines) for row in opened.usage)
        for state in opened.pinned:
            self._index.usage.know(state)

    def _look_on(self) -> None:
        self._thread.post(Priority.HOUSEKEEPING, partial(self._disk.reconcile, FILES_PER_LOOK))

    # -- answers ---------------------------------------------------------------------------------

    def _take(self, outcome: Outcome) -> None:
        if isinstance(outcome, SaveDone):
            self._take_save(outcome)
        elif isinstance(outcome, FetchDone):
            self._take_fetch(outcome)
        elif isinstance(outcome, CommitDone):
            self._take_commit(outcome)
        elif isinstance(outcome, Reconciled):
            self._take_reconciled(outcome)
        else:
            self._take_bundle(outcome)

    def _take_bundle(self, outcome: Outcome) -> None:
        if isinstance(outcome, BundleRead):
            del self._bundles[outcome.ticket]
            self._events.append(outcome)
        elif isinstance(outcome, ExportDone):
            self._take_export(outcome)
        elif isinstance(outcome, ImportDone):
            self._take_import(outcome)

    def _take_export(self, done: ExportDone) -> None:
        del self._bundles[done.ticket]
        lost = [h for h in done.lost if self._index.forget(h) is not None]
        self._health.num_damaged += len(lost)
        written = BundleWritten(done.ticket, done.file_bytes, done.num_records, done.error)
        self._events.append(written)

    def _take_import(self, done: ImportDone) -> None:
        self._other_bytes = done.other_bytes
        job = self._bundles.pop(done.ticket)
        stored = {row.hash: row.file_bytes for row in done.stored}
        for record_hash in job.names:
            entry = self._index.get(record_hash)
            if record_hash not in stored:
                self._index.forget(record_hash)
            elif entry is None:
                self._remove([record_hash])
            else:
                self._index.confirm(entry, stored[record_hash])
        self._note_fault(done.fault)
        self._events.append(BundleStored(done.ticket, len(stored), done.error))

    def _take_save(self, done: SaveDone) -> None:
        self._other_bytes = done.other_bytes
        del self._queued[done.record_hash]
        entry = self._index.get(done.record_hash)
        if done.file_bytes is None:
            self._index.forget(done.record_hash)
            self._note_fault(done.fault)
            self._events.append(Saved(done.record_hash, retry=entry is not None))
            return
        self._health.note_success(done.file_bytes)
        if entry is None:
            self._remove([done.record_hash])
        else:
            self._index.confirm(entry, done.file_bytes)
        self._events.append(Saved(done.record_hash, retry=False))

    def _take_fetch(self, done: FetchDone) -> None:
        del self._reading[done.ticket]
        entry = self._index.get(done.record_hash)
        if entry is not None:
            entry.num_readers -= 1
            self._index.offer(done.record_hash)
        if done.is_lost:
            self._index.forget(done.record_hash)
            self._health.num_damaged += 1
            log.warning("record %s was not used: %s", done.record_hash.hex(), done.damage)
        self._note_fault(done.fault, is_write=False)
        self._events.append(Fetched(done.ticket, done.data))

    def _take_commit(self, done: CommitDone) -> None:
        self._other_bytes = done.other_bytes
        agent_id = self._commits.pop(done.ticket)
        last_ticket, _ = self._pending[agent_id]
        if done.fault is not None:
            self._refused.add(agent_id)
            self._note_fault(done.fault, is_commit=True)
            if done.is_over_budget:
                self._make_room(MIN_BUDGET_BYTES // 8, None)
        elif done.refusal is not None:
            log.error("agent %r cannot be stored: %s", agent_id, done.refusal)
        else:
            self._health.note_success(0, is_commit=True)
            if done.ticket == last_ticket:
                del self._pending[agent_id], self._uncommitted[agent_id]
        durable = done.fault is None and done.refusal is None
        self._answer_commit(done.ticket, durable=durable)

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

    def _note_fault(
        self, fault: str | None, *, is_write: bool = True, is_commit: bool = False
    ) -> None:
        if fault is not None and not is_write:
            self._health.note_read_fault(fault)
        elif fault is not None:
            self._health.note_fault(fault, self._clock(), is_commit=is_commit)

    # -- commits ---------------------------------------------------------------------------------

    def _answer_commit(self, ticket: int, *, durable: bool) -> None:
        """A retry was answered long ago, when it was refused for the first time."""
        if ticket in self._silent:
            self._silent.remove(ticket)
        else:
            self._events.append(Committed(ticket, durable=durable))

    def _post_commit(self, ticket: int, agent_id: str, state: AgentState | None) -> int:
        self._commits[ticket] = agent_id
        self._pending[agent_id] = (ticket, state)
        self._uncommitted[agent_id] = state
        if state is None:
            command = partial(self._disk.delete_agent, ticket, agent_id)
        else:
            command = partial(self._disk.commit, ticket, state)
        self._thread.post(Priority.COMMIT, command)
        return ticket

    def _retry_commits(self) -> None:
        """What the disk refused, whole; the tickets were answered with `durable=False` long ago."""
        refused, self._refused = self._refused, set()
        for agent_id in refused & self._pending.keys():
            ticket, state = self._pending[agent_id]
            if ticket not in self._commits:
                self._silent.add(self._post_commit(next(self._tickets), agent_id, state))

    def _answer_for_the_dead(self) -> None:
        """The thread has died of a bug: whoever waits is told so, and memory serves on."""
        self._health.note_death(self._thread.failure)
        for record_hash in list(self._queued):
            del self._queued[record_hash]
            self._index.forget(record_hash)
            self._events.append(Saved(record_hash, retry=False))
        for ticket in list(self._reading):
            del self._reading[ticket]
            self._events.append(Fetched(ticket, None))
        for ticket, job in list(self._bundles.items()):
            del self._bundles[ticket]
            for record_hash in job.names:
                self._index.forget(record_hash)
            error = BundleFailed(job.path, "the store's thread has died")
            self._events.append(job.answer(ticket, error=error))
        for ticket in list(self._commits):
            del self._commits[ticket]
            self._answer_commit(ticket, durable=False)

    # -- room ------------------------------------------------------------------------------------

    def _make_room(self, nbytes: int, maker: str | None) -> bool:
        """Evict until the budget, and the maker's quota, have room. False when they cannot."""
        quota_bytes = self._index.usage.quota_of(maker)
        if maker is not None and quota_bytes is not None:
            over = self._index.bytes_of(maker) + nbytes - quota_bytes
            self._evict(self._index.choose_victims_of(maker, over))
            if self._index.bytes_of(maker) + nbytes > quota_bytes:
                return False
        over = self._index.num_bytes + self._other_bytes + nbytes - self._room_for_records()
        self._evict(self._index.choose_victims(over))
        used_bytes = self._index.num_bytes + self._other_bytes
        return used_bytes + nbytes <= self._room_for_records()

    def _room_for_records(self) -> int:
        """Of the budget, what records may fill: the catalogue's log comes and goes beside them."""
        return self.config.disk_budget_bytes - min(16 << 20, self.config.disk_budget_bytes // 8)

    def _evict(self, victims: Sequence[Entry]) -> None:
        self._health.evicted_bytes += sum(entry.file_bytes for entry in victims)
        self._remove([entry.record.hash for entry in victims])

    def _remove(self, hashes: Sequence[BlockHash], priority: Priority = Priority.SAVE) -> None:
        """In the saves' own order: what is written next finds the room that this makes."""
        for start in range(0, len(hashes), REMOVALS_PER_COMMAND):
            part = tuple(hashes[start : start + REMOVALS_PER_COMMAND])
            self._thread.post(priority, partial(self._disk.remove, part))


@dataclass(frozen=True, slots=True)
class _BundleJob:
    """A bundle that the I/O thread works at; `names`: records that it is storing."""

    path: Path
    answer: type[BundleWritten] | type[BundleRead] | type[BundleStored]
    names: tuple[BlockHash, ...] = ()


@dataclass(slots=True)
class _Health:
    """What the disk has refused lately, and when it is asked again."""

    fault: str | None = None
    num_faults: int = 0
    num_damaged: int = 0
    written_bytes: int = 0
    evicted_bytes: int = 0
    _refused: set[bool] = field(default_factory=set)
    _pause_s: float = FIRST_RETRY_S
    _suspended_until_s: float | None = None

    def note_read_fault(self, fault: str) -> None:
        self.num_faults += 1
        log.warning("a record could not be read: %s", fault)

    def note_fault(self, fault: str, now_s: float, *, is_commit: bool) -> None:
        self.num_faults += 1
        if self.fault is None:
            log.error("the disk refuses writes; serving goes on from memory: %s", fault)
        self.fault = fault
        self._refused.add(is_commit)
        self._suspended_until_s = now_s + self._pause_s
        self._pause_s = min(2 * self._pause_s, LAST_RETRY_S)

    def note_success(self, written_bytes: int, *, is_commit: bool = False) -> None:
        """A disk that is full for records may take commits for long: both must be taken again."""
        self.written_bytes += written_bytes
        self._refused.discard(is_commit)
        if self._refused:
            return
        if self.fault is not None:
            log.warning("the disk takes writes again")
        self.fault, self._suspended_until_s, self._pause_s = None, None, FIRST_RETRY_S

    def note_death(self, failure: BaseException | None) -> None:
        if self.fault is None or not self.fault.startswith("the store's thread"):
            self.fault = f"the store's thread has died: {failure!r}"
            log.critical("%s; nothing is saved any more", self.fault, exc_info=failure)

    def is_suspended(self, now_s: float) -> bool:
        return self._suspended_until_s is not None and now_s < self._suspended_until_s
