"""Bundles that the I/O thread writes, reads and takes in, as the engine's thread sees them.

Each is work of many units, a record at most, so that commits, restores and saves never wait longer.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from keepwarm.core.block import BlockHash
from keepwarm.core.errors import BundleFailed
from keepwarm.core.stored import (
    AgentState,
    Bundle,
    BundleEvent,
    BundleRead,
    BundleStored,
    BundleTerms,
    BundleWritten,
    KVFamily,
    Record,
)
from keepwarm.store.bundle.export import Export
from keepwarm.store.disk.disk_store import DiskStore, ExportDone, ImportDone, Outcome
from keepwarm.store.disk.io_thread import IOThread, Priority
from keepwarm.store.disk.record import max_file_bytes
from keepwarm.store.disk.units import Units, UnitWork
from keepwarm.store.disk_room import DiskRoom
from keepwarm.store.health import DiskHealth
from keepwarm.store.record_index import Entry, RecordIndex


@dataclass(slots=True, eq=False)
class _Job:
    """A bundle that the I/O thread works at.

    `names`: records that it is storing; `reads`: those that it is reading, which stay meanwhile.
    """

    path: Path
    answer: type[BundleWritten] | type[BundleRead] | type[BundleStored]
    names: tuple[BlockHash, ...] = ()
    reads: tuple[BlockHash, ...] = ()
    work: UnitWork[Outcome] | None = None
    is_called_off: bool = False


class BundleJobs:
    """Owns the jobs that have not ended. They run behind the saves that were queued before them."""

    def __init__(
        self,
        thread: IOThread[Outcome],
        disk: DiskStore,
        index: RecordIndex,
        *,
        room: DiskRoom,
        health: DiskHealth,
        next_ticket: Callable[[], int],
    ) -> None:
        self._thread = thread
        self._disk = disk
        self._index = index
        self._room = room
        self._health = health
        self._next_ticket = next_ticket
        self._jobs: dict[int, _Job] = {}

    def __repr__(self) -> str:
        return f"BundleJobs({len(self._jobs)} under way)"

    def names(self) -> Iterator[BlockHash]:
        """The records that are being stored."""
        for job in self._jobs.values():
            yield from job.names

    @property
    def num_reads(self) -> int:
        """How many records are being read, those that more than one reads counted again."""
        return sum(len(job.reads) for job in self._jobs.values())

    def write(self, family: KVFamily, tokenizer: str, state: AgentState, path: Path) -> int:
        records: dict[BlockHash, tuple[Record, KVFamily]] = {}
        for line in state.lines:
            if line.tokenizer == tokenizer:
                own = replace(family, namespace=line.namespace)
                for entry in self._index.plan(own.root, line.transcript.token_ids):
                    if entry.record.hash not in records:
                        entry.num_readers += 1
                        records[entry.record.hash] = (entry.record, own)
        ticket = self._next_ticket()
        export = Export(family, tokenizer, state, tuple(records.values()))
        called_off = ExportDone(ticket, 0, 0, (), _called_off(path))
        return self._begin(
            ticket,
            _Job(path, BundleWritten, reads=tuple(records)),
            self._disk.export(ticket, path, export),
            lambda: called_off,
        )

    def read(self, path: Path, terms: BundleTerms) -> int:
        ticket = self._next_ticket()
        called_off = BundleRead(ticket, error=_called_off(path))
        units = self._disk.read_bundle(ticket, path, terms)
        return self._begin(ticket, _Job(path, BundleRead), units, lambda: called_off)

    def store(self, bundle: Bundle, agent_id: str, now: int) -> int:
        """`now`: when the records were used last, by the store's clock."""
        names = self._make_room_for(bundle, agent_id, now)
        ticket = self._next_ticket()
        return self._begin(
            ticket,
            _Job(bundle.path, BundleStored, names),
            self._disk.import_records(ticket, bundle, len(names), agent_id),
            lambda: self._disk.import_called_off(ticket, _called_off(bundle.path)),
        )

    def call_off(self, ticket: int) -> None:
        """What the job has begun is undone; nobody is told."""
        job = self._jobs.get(ticket)
        if job is not None and job.work is not None:
            job.is_called_off = True
            job.work.call_off()

    def remove(self, path: Path) -> None:
        self._thread.post(Priority.SAVE, partial(self._disk.remove_export, path))

    def call_off_all(self) -> None:
        for ticket in self._jobs:
            self.call_off(ticket)

    def note_read(self, read: BundleRead) -> Iterator[BundleEvent]:
        job = self._jobs.pop(read.ticket)
        if not job.is_called_off:
            yield read

    def note_written(self, done: ExportDone) -> Iterator[BundleEvent]:
        """Records that turned out to be damaged are forgotten."""
        job = self._jobs.pop(done.ticket)
        self._release(job)
        lost = [h for h in done.lost if self._index.forget(h) is not None]
        self._health.num_damaged += len(lost)
        if not job.is_called_off:
            yield BundleWritten(done.ticket, done.file_bytes, done.num_records, done.error)
        elif done.error is None:
            self.remove(job.path)

    def note_stored(self, done: ImportDone) -> Iterator[BundleEvent]:
        """Those of its records that the disk has not taken, and those evicted meanwhile, go."""
        job = self._jobs.pop(done.ticket)
        stored = {row.hash: row.file_bytes for row in done.stored}
        for record_hash in job.names:
            entry = self._index.get(record_hash)
            if record_hash not in stored:
                self._index.forget(record_hash)
            elif entry is None or job.is_called_off:
                self._index.forget(record_hash)
                self._room.remove([record_hash])
            else:
                self._index.confirm(entry, stored[record_hash])
        if not job.is_called_off:
            yield BundleStored(done.ticket, len(stored), done.error)

    def fail(self, reason: str) -> list[BundleEvent]:
        """No job is ended any more: what is told to those who wait."""
        jobs, self._jobs = self._jobs, {}
        for job in jobs.values():
            self._release(job)
            for record_hash in job.names:
                self._index.forget(record_hash)
        return [
            job.answer(ticket, error=BundleFailed(job.path, reason))
            for ticket, job in jobs.items()
            if not job.is_called_off
        ]

    def _begin(
        self, ticket: int, job: _Job, units: Units[Outcome], called_off: Callable[[], Outcome]
    ) -> int:
        post = partial(self._thread.post, Priority.SAVE)
        job.work = UnitWork(units, called_off=called_off, again=post)
        self._jobs[ticket] = job
        post(job.work)
        return ticket

    def _release(self, job: _Job) -> None:
        for record_hash in job.reads:
            entry = self._index.get(record_hash)
            if entry is not None:
                entry.num_readers = max(entry.num_readers - 1, 0)
                self._index.offer(record_hash)

    def _make_room_for(self, bundle: Bundle, agent_id: str, now: int) -> tuple[BlockHash, ...]:
        """The first records of the bundle, as many as budget and the agent's quota allow."""
        names: list[BlockHash] = []
        family, quota_bytes = bundle.terms.family, bundle.state.settings.quota_bytes
        for record in bundle.records:
            nbytes = max_file_bytes(family, record.num_tokens)
            is_within = quota_bytes is None or (
                self._index.bytes_of(agent_id) + nbytes <= quota_bytes
            )
            if not is_within or not self._room.make(nbytes, None):
                break
            self._index.add(Entry(record, nbytes, agent_id, now, is_saved=False))
            names.append(record.hash)
        return tuple(names)


def _called_off(path: Path) -> BundleFailed:
    return BundleFailed(path, "it was called off")
