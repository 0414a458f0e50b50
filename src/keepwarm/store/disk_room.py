"""Room in the disk's budget and in an agent's quota, and which records are evicted for it."""

from collections.abc import Iterable, Sequence
from functools import partial

from keepwarm.core.block import BlockHash
from keepwarm.store.disk.disk_store import REMOVALS_PER_COMMAND, DiskStore
from keepwarm.store.disk.io_thread import IOThread, Priority
from keepwarm.store.health import DiskHealth
from keepwarm.store.record_index import Entry, RecordIndex


class DiskRoom:
    """Decides by the index which records go, ahead of the files, which the I/O thread removes.

    `other_bytes` is what else there is in the folder, as the disk said last.
    """

    def __init__(
        self,
        thread: IOThread,
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
        """Evict until the budget, and the maker's quota, have room. Returns whether they have."""
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

    def drop(self, hashes: Iterable[BlockHash]) -> None:
        """Forget these records, and remove the files of those that there were."""
        self.remove([h for h in hashes if self._index.forget(h) is not None])

    def remove(self, hashes: Sequence[BlockHash], priority: Priority = Priority.SAVE) -> None:
        """Remove the files in the order of the saves: the next one finds their room."""
        for start in range(0, len(hashes), REMOVALS_PER_COMMAND):
            part = tuple(hashes[start : start + REMOVALS_PER_COMMAND])
            self._thread.post(priority, partial(self._disk.remove, part))

    def _room_for_records(self) -> int:
        """Return what records may fill of the budget: the catalogue's log comes and goes beside
        them.
        """
        return self._budget_bytes - min(16 << 20, self._budget_bytes // 8)

    def _evict(self, victims: Sequence[Entry], priority: Priority) -> None:
        self._health.evicted_bytes += sum(entry.file_bytes for entry in victims)
        self.remove([entry.record.hash for entry in victims], priority)
