"""AgentCacheStore: agents and their KV on disk, within a budget, whatever becomes of the process.

This is the side that the engine's thread sees. It decides, in memory, what is written, read and
evicted; the I/O thread acts (`disk_store.py`) and answers, and `poll` passes the answers on.
"""

import itertools
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

from keepwarm.core.agent_store import Answers, BundleTicket
from keepwarm.core.block import BlockHash
from keepwarm.core.errors import ConfigError, DamagedAgent, InvariantBroken
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
from keepwarm.store.bundle.jobs import BundleJobs
from keepwarm.store.catalog.catalog import CatalogReader
from keepwarm.store.catalog.errors import CatalogCorrupt, CatalogUnavailable
from keepwarm.store.catalog.load import damaged_summary
from keepwarm.store.catalog.opening import Opened
from keepwarm.store.commits import Change, Commits
from keepwarm.store.disk.disk_store import (
    CATALOG_NAME,
    CheckDone,
    CommitDone,
    Erased,
    ExportDone,
    FetchDone,
    ImportDone,
    Limits,
    Outcome,
    Probed,
    Reconciled,
    SaveDone,
)
from keepwarm.store.disk.io_thread import IOThread, Priority
from keepwarm.store.disk.record import max_file_bytes
from keepwarm.store.disk_room import DiskRoom
from keepwarm.store.health import DiskHealth, Work
from keepwarm.store.losses import loss_of
from keepwarm.store.opening import open_disk
from keepwarm.store.record_index import Entry, RecordIndex

log = logging.getLogger("keepwarm.store")

FILES_PER_LOOK = 32
"""How many files are compared with the catalogue at a time, when nothing else is to be done."""


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

    def limits(self) -> Limits:
        """Of what is set aside, an eighth of the budget at most."""
        return Limits(
            self.disk_budget_bytes,
            self.free_floor_bytes,
            min(self.set_aside_bytes, self.disk_budget_bytes // 8),
        )


MIN_BUDGET_BYTES = 8 << 20
_UNLISTED = (
    "agents that are only on disk cannot be listed: a page of the catalogue is damaged; start the "
    "server again, which takes over those that can be read"
)
PROBE_BYTES = 64 << 10
MAX_PROBE_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class _Saving:
    nbytes: int
    answer: Callable[[Saved], object]


@dataclass(frozen=True, slots=True)
class _Reading:
    record_hash: BlockHash
    answer: Callable[[memoryview | None], object]


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
        self._queued: dict[BlockHash, _Saving] = {}
        self._reading: dict[int, _Reading] = {}
        self._commits = Commits()
        self._refused = self._commits.refused
        self._answers = Answers()
        self._health = DiskHealth()
        self._erasing: dict[int, Change] = {}
        self._refused_bytes = PROBE_BYTES
        self._is_probing = False
        self._is_closed = False
        self._thread: IOThread[Outcome] = IOThread("keepwarm-store")
        self._thread.start()
        self._disk, opened = open_disk(self._thread, self.path, self.config.limits())
        self._room = DiskRoom(
            self._thread,
            self._disk,
            self._index,
            health=self._health,
            budget_bytes=self.config.disk_budget_bytes,
            other_bytes=opened.other_bytes,
        )
        self._bundles = BundleJobs(
            self._thread,
            self._disk,
            self._index,
            room=self._room,
            health=self._health,
            answers=self._answers,
        )
        self._clock_ticks = opened.clock
        self._is_erasure_due = opened.needs_erasing
        self._notices = opened.notices
        self._damaged: dict[str, str] = {}
        for agent_id, problem in opened.damaged.items():
            self._note_damage(agent_id, problem)
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
        """Do what is queued, try once more what the disk refused, and give the home back.

        What it refuses to the end is lost, and the log says what that is.
        """
        if self._is_closed:
            return
        self._is_closed = True
        self._retry_commits()
        losses = [
            loss_of(change, self._committed(change)) for change in self._commits.not_durable()
        ]
        self._bundles.cancel_all()
        self._reader.close()
        self._thread.post(Priority.STOP, self._disk.close)
        if not self._thread.stop(timeout_s):
            log.error("%s did not close within %s s", self.path, timeout_s)
        self.poll()
        for loss in losses:
            if not self.is_durable(loss.agent_id):
                fault = self._health.fault
                log.error("lost, because the disk did not take it (%s): %s", fault, loss)

    def _committed(self, change: Change) -> AgentState | None:
        """The agent as the catalogue has it, as far as it can be read."""
        try:
            return self._reader.load_agent(change.agent_id)
        except (DamagedAgent, CatalogUnavailable):
            return None

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
        queued_bytes = self._queued_bytes()
        return not queued_bytes or queued_bytes + nbytes <= self.config.queue_bytes

    def save(
        self,
        family: KVFamily,
        record: Record,
        token_ids: Sequence[int],
        pieces: Sequence[memoryview],
        maker: str | None,
        answer: Callable[[Saved], object],
    ) -> None:
        nbytes = max_file_bytes(family, record.num_tokens)
        # A record of that name may be there, behind one that is lost: this one replaces it.
        unreachable = self._index.forget(record.hash)
        if not self._room.make(nbytes, maker):
            if unreachable is not None:
                self._room.remove([record.hash])
            self._answers.add(answer, Saved.GIVEN_UP)
            return
        entry = Entry(record, nbytes, maker, self._clock_ticks, is_saved=False)
        entry.num_readers = 0 if unreachable is None else unreachable.num_readers
        self._index.add(entry)
        self._queued[record.hash] = _Saving(nbytes, answer)
        command = partial(self._disk.save, family, record, tuple(token_ids), tuple(pieces), maker)
        self._thread.post(Priority.SAVE, command)

    def fetch(
        self,
        family: KVFamily,
        record: Record,
        buffer: bytearray,
        answer: Callable[[memoryview | None], object],
    ) -> None:
        entry = self._index.get(record.hash)
        if entry is None or entry.record != record:
            self._answers.add(answer, None)
            return
        ticket = next(self._tickets)
        entry.num_readers += 1
        self._reading[ticket] = _Reading(record.hash, answer)
        # Behind the save of this very record, if that is still queued.
        priority = Priority.RESTORE if entry.is_saved else Priority.SAVE
        command = partial(self._disk.fetch, ticket, family, record, buffer)
        self._thread.post(priority, command)

    def drop(self, hashes: Iterable[BlockHash], *, if_unused: bool = False) -> None:
        is_used = self._index.usage.is_used
        chosen = [h for h in hashes if not (if_unused and is_used(h))]
        self._room.remove([h for h in chosen if self._index.forget(h) is not None])

    def clock(self) -> int:
        return self._clock_ticks

    # -- agents ----------------------------------------------------------------------------------

    def commit(self, state: AgentState, answer: Callable[[bool], object]) -> None:
        self._index.use(state)
        self._clock_ticks = max([self._clock_ticks, *(line.last_used for line in state.lines)])
        self._post_commit(Change(next(self._tickets), state.agent_id, state, answer))

    def delete_agent(self, agent_id: str, answer: Callable[[bool], object]) -> None:
        with suppress(DamagedAgent):
            self.load_agent(agent_id)  # whose records are counted then
        self._post_commit(Change(next(self._tickets), agent_id, None, answer))

    def is_durable(self, agent_id: str) -> bool:
        return self._commits.last_of(agent_id) is None

    def load_agent(self, agent_id: str) -> AgentState | None:
        change = self._commits.last_of(agent_id)
        if change is not None:
            return change.state
        if agent_id in self._damaged:
            raise DamagedAgent(agent_id, self._damaged[agent_id])
        try:
            state = self._reader.load_agent(agent_id)
        except DamagedAgent as error:
            self._note_damage(agent_id, error.problem)
            raise
        if state is not None:
            self._index.usage.know(state)
        return state

    def salvage_agent(self, agent_id: str) -> AgentState:
        return self._reader.salvage_agent(agent_id)

    def summaries(self) -> list[AgentSummary]:
        gone = self._commits.deleted()
        found = {s.agent_id: s for s in self._summaries() if s.agent_id not in gone}
        for name, problem in self._damaged.items():
            if name in found:
                found[name] = damaged_summary(name, problem)
        return list(found.values())

    def _summaries(self) -> list[AgentSummary]:
        """None where a page is damaged: the next start takes over what can be read of the rest."""
        try:
            return self._reader.summaries()
        except CatalogCorrupt as error:
            if _UNLISTED not in self._notices:
                self._notices = (*self._notices, _UNLISTED)
                log.error("%s; %s", error, _UNLISTED)
            return []

    def _note_damage(self, agent_id: str, problem: str) -> None:
        log.error("%s. Other agents are not affected", DamagedAgent(agent_id, problem))
        self._damaged[agent_id] = problem

    def models(self) -> dict[str, str]:
        gone = self._commits.deleted()
        try:
            models = self._reader.models()
        except CatalogCorrupt:  # said where agents are listed
            return {}
        models |= dict.fromkeys(self._damaged.keys() & models.keys(), "")
        return {name: model for name, model in models.items() if name not in gone}

    def num_stored(self, agent_id: str) -> int:
        with suppress(DamagedAgent):  # nothing can be served of an agent that cannot be read
            line = self._reader.main_line(agent_id)
            if line is not None:
                return self._index.num_stored(line.block_hashes, line.tail_ids, line.roots)
        return 0

    # -- bundles ---------------------------------------------------------------------------------

    def write_bundle(
        self, family: KVFamily, tokenizer: str, state: AgentState, path: Path
    ) -> BundleTicket[BundleWritten]:
        return self._bundles.write(family, tokenizer, state, path)

    def read_bundle(self, path: Path, terms: BundleTerms) -> BundleTicket[BundleRead]:
        return self._bundles.read(path, terms)

    def store_bundle(self, bundle: Bundle, agent_id: str) -> BundleTicket[BundleStored]:
        return self._bundles.store(bundle, agent_id, self._clock_ticks)

    # -- the whole -------------------------------------------------------------------------------

    def poll(self) -> None:
        for outcome in self._thread.take():
            self._take(outcome)
        if self._thread.failure is not None:
            self._answer_for_the_dead()
        elif not self._health.is_suspended(self._clock()):
            self._try_again()
        self._answers.deliver()

    def wait(self, timeout_s: float) -> None:
        if not self._answers.take_news():
            self._thread.wait(timeout_s)

    def ask_again(self) -> None:
        self._health.ask_again(self._clock())

    def health(self) -> StoreHealth:
        return StoreHealth(
            fault=self._health.fault,
            num_faults=self._health.num_faults,
            num_damaged=self._health.num_damaged,
            num_records=len(self._index),
            record_bytes=self._index.num_bytes,
            disk_bytes=self._index.num_bytes + self._room.other_bytes,
            budget_bytes=self.config.disk_budget_bytes,
            queued_bytes=self._queued_bytes(),
            num_queued=len(self._queued),
            written_bytes=self._health.written_bytes,
            evicted_bytes=self._health.evicted_bytes,
            notices=(*self._notices, *self._damage_notices()),
        )

    def _queued_bytes(self) -> int:
        return sum(saving.nbytes for saving in self._queued.values())

    def _damage_notices(self) -> tuple[str, ...]:
        """Without names: whoever asks for health may not know all agents."""
        if not self._damaged:
            return ()
        number = len(self._damaged)
        agents = "1 agent is" if number == 1 else f"{number} agents are"
        return (f"{agents} damaged and set aside; the log and the list of agents name what is",)

    def check(self) -> None:
        self._index.check()
        unsaved = {entry.record.hash for entry in self._index if not entry.is_saved}
        unsaved -= set(self._bundles.names())
        if not unsaved <= self._queued.keys():
            raise InvariantBroken(f"{self!r}: records that nobody writes: {len(unsaved)}")
        readers = sum(entry.num_readers for entry in self._index)
        if readers > len(self._reading) + self._bundles.num_reads:
            raise InvariantBroken(f"{self!r}: {readers} readers of {len(self._reading)} reads")

    # -- opening ---------------------------------------------------------------------------------

    def _load(self, opened: Opened) -> None:
        last_used = opened.usage.last_used
        self._index.load(
            Entry(row.record, row.file_bytes, row.maker, last_used.get(row.hash, 0))
            for row in opened.rows
        )
        self._index.usage.load(opened.usage.num_lines)
        for state in opened.pinned:
            self._index.usage.know(state)
        self.drop(opened.unclaimed)

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
        elif isinstance(outcome, Erased):
            self._take_erased(outcome)
        else:
            self._take_other(outcome)

    def _take_other(self, outcome: Outcome) -> None:
        if isinstance(outcome, Probed):
            self._is_probing = False
            self._health.note_probe(outcome.fault, self._clock())
        elif isinstance(outcome, CheckDone):
            self._bundles.note_read(outcome)
        elif isinstance(outcome, ExportDone):
            self._bundles.note_written(outcome)
        elif isinstance(outcome, ImportDone):
            self._room.other_bytes = outcome.other_bytes
            self._note_fault(outcome.fault, Work.RECORDS)
            self._bundles.note_stored(outcome)

    def _take_save(self, done: SaveDone) -> None:
        self._room.other_bytes = done.other_bytes
        saving = self._queued.pop(done.record_hash)
        entry = self._index.get(done.record_hash)
        if done.file_bytes is None:
            self._index.forget(done.record_hash)
            self._refused_bytes = min(saving.nbytes, MAX_PROBE_BYTES)
            self._note_fault(done.fault, Work.RECORDS)
            self._answers.add(saving.answer, Saved.GIVEN_UP if entry is None else Saved.REFUSED)
            return
        self._health.note_success(Work.RECORDS, written_bytes=done.file_bytes)
        if entry is None:
            self._room.remove([done.record_hash])
        else:
            self._index.confirm(entry, done.file_bytes)
        self._answers.add(saving.answer, Saved.WRITTEN)

    def _take_fetch(self, done: FetchDone) -> None:
        reading = self._reading.pop(done.ticket)
        entry = self._index.get(done.record_hash)
        if entry is not None:
            entry.num_readers -= 1
            self._index.offer(done.record_hash)
        if done.is_lost:
            self._index.forget(done.record_hash)
            self._health.num_damaged += 1
            log.warning("record %s was not used: %s", done.record_hash.hex(), done.damage)
        if done.fault is not None:
            self._health.note_read_fault(done.fault)
        self._answers.add(reading.answer, done.data)

    def _take_commit(self, done: CommitDone) -> None:
        self._room.other_bytes = done.other_bytes
        change = self._commits.arrived(done.ticket)
        if done.fault is None and done.refusal is None:
            self._health.note_success(Work.COMMITS)
            self._commits.note_taken(change)
            self._damaged.pop(change.agent_id, None)
            if change.state is None:
                self._erase(change)
                return
        elif done.fault is not None:
            self._commits.note_refused(change)
            self._note_fault(done.fault, Work.COMMITS)
            if done.is_over_budget:
                self._room.make(MIN_BUDGET_BYTES // 8, None)
        else:
            log.error("agent %r cannot be stored: %s", change.agent_id, done.refusal)
        durable = done.fault is None and done.refusal is None
        self._answer_commit(change, durable=durable)

    def _erase(self, change: Change) -> None:
        """The agent's rows are gone; what else there was of it goes before that is answered."""
        own = [entry.record.hash for entry in self._index.disuse(change.agent_id)]
        self._room.remove(own, Priority.COMMIT)
        self._room.make(self._room.other_bytes, None, Priority.COMMIT)  # to write the rest anew
        self._erasing[change.ticket] = change
        self._thread.post(Priority.COMMIT, partial(self._disk.erase, change.ticket))

    def _take_erased(self, done: Erased) -> None:
        """The agent is gone for good, whatever traces of it could not be erased yet."""
        self._room.other_bytes = done.other_bytes
        self._is_erasure_due = done.fault is not None
        if done.fault is None:
            self._health.note_success(Work.ERASING)
        else:
            log.error("traces of deleted agents are left until the disk permits: %s", done.fault)
            self._note_fault(done.fault, Work.ERASING)
        if done.ticket is not None:
            self._answer_commit(self._erasing.pop(done.ticket), durable=True)

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

    def _note_fault(self, fault: str | None, work: Work) -> None:
        if fault is not None:
            self._health.note_fault(fault, self._clock(), work)

    # -- commits ---------------------------------------------------------------------------------

    def _answer_commit(self, change: Change, *, durable: bool) -> None:
        if change.answer is not None:
            self._answers.add(change.answer, durable)

    def _post_commit(self, change: Change) -> None:
        self._commits.begin(change)
        if change.state is None:
            is_damaged = change.agent_id in self._damaged
            command = partial(
                self._disk.delete_agent, change.ticket, change.agent_id, is_damaged=is_damaged
            )
        else:
            command = partial(self._disk.commit, change.ticket, change.state)
        self._thread.post(Priority.COMMIT, command)

    def _try_again(self) -> None:
        """What the disk refused; and where nothing is left of that, whether it still refuses."""
        if self._refused:
            self._retry_commits()
        if self._is_erasure_due:
            self._is_erasure_due = False
            self._thread.post(Priority.COMMIT, partial(self._disk.erase, None))
        if self._health.is_probe_due(self._clock()) and not self._is_probing:
            self._is_probing = True
            self._thread.post(Priority.SAVE, partial(self._disk.probe, self._refused_bytes))

    def _retry_commits(self) -> None:
        """Write refused states again, whole; that they were refused has been answered."""
        for change in self._commits.take_refused():
            self._post_commit(replace(change, ticket=next(self._tickets), answer=None))

    def _answer_for_the_dead(self) -> None:
        """The thread has died of a bug: whoever waits is told so, and memory serves on."""
        self._health.note_death(self._thread.failure)
        while self._queued:
            record_hash, saving = self._queued.popitem()
            self._index.forget(record_hash)
            self._answers.add(saving.answer, Saved.GIVEN_UP)
        while self._reading:
            self._answers.add(self._reading.popitem()[1].answer, None)
        self._bundles.fail("the store's thread has died")
        for change in self._commits.abandon():
            self._commits.note_refused(change)
            self._answer_commit(change, durable=False)
        while self._erasing:
            self._answer_commit(self._erasing.popitem()[1], durable=True)
