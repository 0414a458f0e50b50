"""Records of KV on disk: what is written, what is read, and what there is to be found."""

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from keepwarm.core.block import BlockHash
from keepwarm.core.stored import KVFamily, Record, Saved
from keepwarm.store.disk.io_thread import Priority
from keepwarm.store.disk.outcomes import FetchDone, SaveDone
from keepwarm.store.disk.record import max_file_bytes
from keepwarm.store.health import Work
from keepwarm.store.parts import StoreParts
from keepwarm.store.record_index import Entry

log = logging.getLogger("keepwarm.store")


class DiskRecords:
    """Implements `RecordStore`. Owns the saves and reads that are on their way.

    The queue of saves holds `queue_bytes` at most.
    """

    def __init__(self, parts: StoreParts, *, queue_bytes: int) -> None:
        self.queued: dict[BlockHash, int] = {}
        """The bytes of each record that is on its way to the disk."""
        self.num_reads = 0
        self.last_refused_bytes = 0
        """The bytes of the record that the disk refused last."""
        self._thread = parts.thread
        self._disk = parts.disk
        self._index = parts.index
        self._room = parts.room
        self._health = parts.health
        self._answers = parts.answers
        self._max_queue_bytes = queue_bytes

    def __repr__(self) -> str:
        return f"DiskRecords({len(self.queued)} to write, {self.num_reads} to read)"

    @property
    def queued_bytes(self) -> int:
        return sum(self.queued.values())

    def plan(self, family: KVFamily, parent: BlockHash, token_ids: Sequence[int]) -> list[Record]:
        return [entry.record for entry in self._index.plan(parent, token_ids)]

    def missing_from(self, parent: BlockHash, token_ids: Sequence[int]) -> int:
        runs = self._index.runs_of_block(parent, token_ids)
        return runs[-1].record.stop if runs else 0

    def record_bytes(self, family: KVFamily, num_tokens: int) -> int:
        return max_file_bytes(family, num_tokens)

    def accepts(self, nbytes: int) -> bool:
        if self._health.is_suspended or self._thread.failure is not None:
            return False
        # One record is taken whatever its size, or one larger than the queue would never be.
        return not self.queued or self.queued_bytes + nbytes <= self._max_queue_bytes

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
        entry = Entry(record, nbytes, maker, self._index.clock, is_saved=False)
        entry.num_readers = 0 if unreachable is None else unreachable.num_readers
        self._index.add(entry)
        self.queued[record.hash] = nbytes
        self._thread.ask(
            Priority.SAVE,
            partial(self._disk.save, family, record, tuple(token_ids), tuple(pieces), maker),
            partial(self._take_save, record.hash, answer),
            lost=partial(self._lose_save, record.hash, answer),
        )

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
        entry.num_readers += 1
        self.num_reads += 1
        self._thread.ask(
            # Behind the save of this very record, if that is still queued.
            Priority.RESTORE if entry.is_saved else Priority.SAVE,
            partial(self._disk.fetch, family, record, buffer),
            partial(self._take_fetch, record.hash, answer),
            lost=partial(self._answers.add, answer, None),
        )

    def drop(self, hashes: Iterable[BlockHash], *, if_unused: bool = False) -> None:
        is_used = self._index.usage.is_used
        self._room.drop([h for h in hashes if not (if_unused and is_used(h))])

    def clock(self) -> int:
        return self._index.clock

    # -- answers ---------------------------------------------------------------------------------

    def _take_save(
        self, record_hash: BlockHash, answer: Callable[[Saved], object], done: SaveDone
    ) -> None:
        self._room.other_bytes = done.other_bytes
        nbytes = self.queued.pop(record_hash)
        entry = self._index.get(record_hash)
        if done.file_bytes is None:
            self._index.forget(record_hash)
            self.last_refused_bytes = nbytes
            self._health.note_fault(done.fault, Work.RECORDS)
            self._answers.add(answer, Saved.GIVEN_UP if entry is None else Saved.REFUSED)
            return
        self._health.note_success(Work.RECORDS, written_bytes=done.file_bytes)
        if entry is None:
            self._room.remove([record_hash])
        else:
            self._index.confirm(entry, done.file_bytes)
        self._answers.add(answer, Saved.WRITTEN)

    def _lose_save(self, record_hash: BlockHash, answer: Callable[[Saved], object]) -> None:
        del self.queued[record_hash]
        self._index.forget(record_hash)
        self._answers.add(answer, Saved.GIVEN_UP)

    def _take_fetch(
        self,
        record_hash: BlockHash,
        answer: Callable[[memoryview | None], object],
        done: FetchDone,
    ) -> None:
        self.num_reads -= 1
        entry = self._index.get(record_hash)
        if entry is not None:
            entry.num_readers -= 1
            self._index.offer(record_hash)
        if done.damage is not None:
            self._index.forget(record_hash)
            self._health.num_damaged += 1
            log.warning("record %s was not used: %s", record_hash.hex(), done.damage)
        if done.fault is not None:
            self._health.note_read_fault(done.fault)
        self._answers.add(answer, done.data)
