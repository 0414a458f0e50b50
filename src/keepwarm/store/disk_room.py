"""Room in the disk's budget, and in an agent's quota: which records go for it."""

from collections.abc import Sequence
from functools import partial

from keepwarm.core.block import BlockHash
from keepwarm.store.disk.disk_store import REMOVALS_PER_COMMAND, DiskStore, Outcome
from keepwarm.store.disk.io_thread import IOThread, Priority
from keepwarm.store.health import DiskHealth
from keepwarm.store.record_index import Entry, RecordIndex


class DiskRoom:
    """Decides it by the index, ahead of the files, which the I/O thread then removes.

    `other_bytes` is what else is in the folder, as the disk said last.
    """

    def __init__(
        self,
        thread: IOThread[Outcome],
        disk: DiskStore,
        index: RecordIndex,
        *,
        health: DiskHealth,
        budget_bytes: int,
        other_bytes: int,
    ) -> None:
        self.other_bytes = other_bytes
        self._thread = thread
        self._disk = disk
        self._index = index
        self._health = health
        self._budget_bytes = budget_bytes

    def make(self, nbytes: int, maker: str | None, priority: Priority = Priority.SAVE) -> bool:
        """Evict until the budget, and the maker's quota, have room. False when they cannot."""
        quota_bytes = self._index.usage.quota_of(maker)
        if maker is not None and quota_bytes is not None:
            over = self._index.bytes_of(maker) + nbytes - quota_bytes
            self._evict(self._index.choose_victims_of(maker, over), priority)
            if self._index.bytes_of(maker) + nbytes > quota_bytes:
                return False
        over = self._index.num_bytes + self.other_bytes + nbytes - self._room_for_records()
        self._evict(self._index.choose_victims(over), priority)
        used_bytes = self._index.num_bytes + self.other_bytes
        return used_bytes + nbytes <= self._room_for_records()

    def remove(self, hashes: Sequence[BlockHash], priority: Priority = Priority.SAVE) -> None:
        """In the saves' own order: what is written next finds the room that this makes."""
        for start in range(0, len(hashes), REMOVALS_PER_COMMAND):
            part = tuple(hashes[start : start + REMOVALS_PER_COMMAND])
            self._thread.post(priority, partial(self._disk.remove, part))

    def _room_for_records(self) -> int:
        """Of the budget, what records may fill: the catalogue's log comes and goes beside them."""
        return self._budget_bytes - min(16 << 20, self._budget_bytes // 8)

    def _evict(self, victims: Sequence[Entry], priority: Priority) -> None:
        self._health.evicted_bytes += sum(entry.file_bytes for entry in victims)
        self.remove([entry.record.hash for entry in victims], priority)
