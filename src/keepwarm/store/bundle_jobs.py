"""Bundles that the I/O thread writes, reads and takes in, as the engine's thread sees them."""

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
from keepwarm.store.bundle_export import Export
from keepwarm.store.disk_room import DiskRoom
from keepwarm.store.disk_store import DiskStore, ExportDone, ImportDone, Outcome
from keepwarm.store.health import DiskHealth
from keepwarm.store.io_thread import IOThread, Priority
from keepwarm.store.record import max_file_bytes
from keepwarm.store.record_index import Entry, RecordIndex


@dataclass(frozen=True, slots=True)
class _Job:
    """A bundle that the I/O thread works at; `names`: records that it is storing."""

    path: Path
    answer: type[BundleWritten] | type[BundleRead] | type[BundleStored]
    names: tuple[BlockHash, ...] = ()


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

    def write(self, family: KVFamily, tokenizer: str, state: AgentState, path: Path) -> int:
        records: dict[BlockHash, tuple[Record, KVFamily]] = {}
        for line in state.lines:
            if line.tokenizer == tokenizer:
                own = replace(family, namespace=line.namespace)
                for entry in self._index.plan(own.root, line.transcript.token_ids):
                    records.setdefault(entry.record.hash, (entry.record, own))
        ticket = self._begin(_Job(path, BundleWritten))
        export = Export(family, tokenizer, state, tuple(records.values()))
        self._thread.post(Priority.SAVE, partial(self._disk.export, ticket, path, export))
        return ticket

    def read(self, path: Path, terms: BundleTerms) -> int:
        ticket = self._begin(_Job(path, BundleRead))
        self._thread.post(Priority.SAVE, partial(self._disk.read_bundle, ticket, path, terms))
        return ticket

    def store(self, bundle: Bundle, agent_id: str, now: int) -> int:
        """`now`: when the records were used last, by the store's clock."""
        names = self._make_room_for(bundle, agent_id, now)
        ticket = self._begin(_Job(bundle.path, BundleStored, names))
        command = partial(self._disk.import_records, ticket, bundle, len(names), agent_id)
        self._thread.post(Priority.SAVE, command)
        return ticket

    def note_read(self, read: BundleRead) -> BundleEvent:
        del self._jobs[read.ticket]
        return read

    def note_written(self, done: ExportDone) -> BundleEvent:
        """Records that turned out to be damaged are forgotten."""
        del self._jobs[done.ticket]
        lost = [h for h in done.lost if self._index.forget(h) is not None]
        self._health.num_damaged += len(lost)
        return BundleWritten(done.ticket, done.file_bytes, done.num_records, done.error)

    def note_stored(self, done: ImportDone) -> BundleEvent:
        """Those of its records that the disk has not taken, and those evicted meanwhile, go."""
        job = self._jobs.pop(done.ticket)
        stored = {row.hash: row.file_bytes for row in done.stored}
        for record_hash in job.names:
            entry = self._index.get(record_hash)
            if record_hash not in stored:
                self._index.forget(record_hash)
            elif entry is None:
                self._room.remove([record_hash])
            else:
                self._index.confirm(entry, stored[record_hash])
        return BundleStored(done.ticket, len(stored), done.error)

    def fail(self, reason: str) -> list[BundleEvent]:
        """No job is ended any more: what is told to those who wait."""
        jobs, self._jobs = self._jobs, {}
        for job in jobs.values():
            for record_hash in job.names:
                self._index.forget(record_hash)
        return [
            job.answer(ticket, error=BundleFailed(job.path, reason)) for ticket, job in jobs.items()
        ]

    def _begin(self, job: _Job) -> int:
        ticket = self._next_ticket()
        self._jobs[ticket] = job
        return ticket

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
