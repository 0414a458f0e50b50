"""Bundles that the I/O thread writes, reads and takes in, as the engine's thread sees them.

Each is work of many units, a record at most, so that commits, restores and saves never wait longer.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic

from keepwarm.core.agent_store import Answers, BundleAnswer, BundleTicket
from keepwarm.core.block import BlockHash
from keepwarm.core.errors import BundleFailed
from keepwarm.core.stored import (
    AgentState,
    Bundle,
    BundleRead,
    BundleStored,
    BundleTerms,
    BundleWritten,
    KVFamily,
    Record,
)
from keepwarm.store.bundle.export import Export
from keepwarm.store.disk.disk_store import CheckDone, DiskStore, ExportDone, ImportDone, Outcome
from keepwarm.store.disk.io_thread import IOThread, Priority
from keepwarm.store.disk.record import max_file_bytes
from keepwarm.store.disk.units import Units, UnitWork
from keepwarm.store.disk_room import DiskRoom
from keepwarm.store.health import DiskHealth
from keepwarm.store.record_index import Entry, RecordIndex


@dataclass(slots=True, eq=False)
class _Job(Generic[BundleAnswer]):
    """A bundle that the I/O thread works at.

    `names`: records that it stores; `reads`: records that it reads, which stay meanwhile.
    """

    path: Path
    kind: type[BundleAnswer]
    names: tuple[BlockHash, ...] = ()
    reads: tuple[BlockHash, ...] = ()
    work: UnitWork[Outcome] | None = None
    answer: BundleAnswer | None = None
    ticket: BundleTicket[BundleAnswer] = field(init=False)


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
        answers: Answers,
    ) -> None:
        self._thread = thread
        self._disk = disk
        self._index = index
        self._room = room
        self._health = health
        self._answers = answers
        self._numbers = itertools.count(1)
        self._jobs: dict[int, _Job[Any]] = {}

    def __repr__(self) -> str:
        return f"BundleJobs({len(self._jobs)} under way)"

    def names(self) -> Iterator[BlockHash]:
        """Yield the records that are being stored."""
        for job in self._jobs.values():
            yield from job.names

    @property
    def num_reads(self) -> int:
        """How many records are being read, those that more than one job reads counted again."""
        return sum(len(job.reads) for job in self._jobs.values())

    def write(
        self, family: KVFamily, tokenizer: str, state: AgentState, path: Path
    ) -> BundleTicket[BundleWritten]:
        records: dict[BlockHash, tuple[Record, KVFamily]] = {}
        for line in state.lines:
            if line.tokenizer == tokenizer:
                own = replace(family, namespace=line.namespace)
                for entry in self._index.plan(own.root, line.transcript.token_ids):
                    if entry.record.hash not in records:
                        entry.num_readers += 1
                        records[entry.record.hash] = (entry.record, own)
        number = next(self._numbers)
        export = Export(family, tokenizer, state, tuple(records.values()))
        cancelled = ExportDone(number, 0, 0, (), _cancelled(path))
        return self._begin(
            number,
            _Job(path, BundleWritten, reads=tuple(records)),
            self._disk.export(number, path, export),
            lambda: cancelled,
        )

    def read(self, path: Path, terms: BundleTerms) -> BundleTicket[BundleRead]:
        number = next(self._numbers)
        cancelled = CheckDone(number, BundleRead(error=_cancelled(path)))
        units = self._disk.read_bundle(number, path, terms)
        return self._begin(number, _Job(path, BundleRead), units, lambda: cancelled)

    def store(self, bundle: Bundle, agent_id: str, now: int) -> BundleTicket[BundleStored]:
        """Store the bundle's records; `now` is when they were used last, by the store's clock."""
        names = self._make_room_for(bundle, agent_id, now)
        number = next(self._numbers)
        return self._begin(
            number,
            _Job(bundle.path, BundleStored, names),
            self._disk.import_records(number, bundle, len(names), agent_id),
            lambda: self._disk.import_called_off(number, _cancelled(bundle.path)),
        )

    def cancel_all(self) -> None:
        for job in self._jobs.values():
            job.ticket.cancel()

    def note_read(self, done: CheckDone) -> None:
        self._end(done.ticket, done.read)

    def note_written(self, done: ExportDone) -> None:
        """Forget records that turned out to be damaged."""
        written = BundleWritten(done.file_bytes, done.num_records, done.error)
        job = self._end(done.ticket, written)
        self._release(job)
        lost = [h for h in done.lost if self._index.forget(h) is not None]
        self._health.num_damaged += len(lost)
        if job.ticket.is_cancelled and done.error is None:
            self._remove_file(job)

    def note_stored(self, done: ImportDone) -> None:
        """Forget the records that the disk has not taken, and remove those evicted meanwhile."""
        job = self._end(done.ticket, BundleStored(len(done.stored), done.error))
        stored = {row.hash: row.file_bytes for row in done.stored}
        for record_hash in job.names:
            entry = self._index.get(record_hash)
            if record_hash not in stored:
                self._index.forget(record_hash)
            elif entry is None or job.ticket.is_cancelled:
                self._index.forget(record_hash)
                self._room.remove([record_hash])
            else:
                self._index.confirm(entry, stored[record_hash])

    def fail(self, reason: str) -> None:
        """Answer all jobs, which nothing will end any more."""
        for number, job in list(self._jobs.items()):
            self._end(number, job.kind(error=BundleFailed(job.path, reason)))
            self._release(job)
            for record_hash in job.names:
                self._index.forget(record_hash)

    def _begin(
        self,
        number: int,
        job: _Job[BundleAnswer],
        units: Units[Outcome],
        cancelled: Callable[[], Outcome],
    ) -> BundleTicket[BundleAnswer]:
        post = partial(self._thread.post, Priority.SAVE)
        job.work = UnitWork(units, called_off=cancelled, again=post)
        job.ticket = BundleTicket(partial(self._cancel, job))
        self._jobs[number] = job
        post(job.work)
        return job.ticket

    def _end(self, number: int, answer: BundleAnswer) -> _Job[BundleAnswer]:
        job = self._jobs.pop(number)
        job.answer = answer
        self._answers.add(job.ticket.put, answer)
        return job

    def _cancel(self, job: _Job[Any]) -> None:
        """Undo what the job has begun, or what it has done."""
        if job.answer is None and job.work is not None:
            job.work.call_off()
        elif job.answer is None or job.answer.error is not None:
            return
        elif job.kind is BundleWritten:
            self._remove_file(job)
        else:
            self._room.remove([h for h in job.names if self._index.forget(h) is not None])

    def _remove_file(self, job: _Job[Any]) -> None:
        self._thread.post(Priority.SAVE, partial(self._disk.remove_export, job.path))

    def _release(self, job: _Job[Any]) -> None:
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


def _cancelled(path: Path) -> BundleFailed:
    return BundleFailed(path, "it was called off")
