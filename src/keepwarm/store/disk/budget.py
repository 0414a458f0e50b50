"""The budget in bytes that the store keeps to on its disk."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from keepwarm.store.errors import DiskTooFull, OverBudget


class DiskBudget:
    """Counts the bytes of files before they are written. `RecordFiles` keeps its three counts.

    `folder` names the disk whose free space counts; `other_bytes` measures what else the store
    keeps there, now. A file counts with its length: the disk may round it up to its own blocks.

    >>> budget = DiskBudget(Path("/"), budget_bytes=100)
    >>> budget.records_bytes = 60
    >>> budget.require(40)
    >>> budget
    DiskBudget(60 of 100 bytes: 60 in records, 0 being written, 0 set aside, 0 other)
    """

    def __init__(
        self,
        folder: Path,
        *,
        budget_bytes: int,
        free_floor_bytes: int = 0,
        other_bytes: Callable[[], int] = lambda: 0,
    ) -> None:
        self.budget_bytes = budget_bytes
        self.free_floor_bytes = free_floor_bytes
        self.records_bytes = 0
        self.temporary_bytes = 0
        self.set_aside_bytes = 0
        self._folder = folder
        self._other_bytes = other_bytes
        self._last_beside_records = 0

    def __repr__(self) -> str:
        return (
            f"DiskBudget({self.used_bytes:,} of {self.budget_bytes:,} bytes: "
            f"{self.records_bytes:,} in records, {self.temporary_bytes:,} being written, "
            f"{self.set_aside_bytes:,} set aside, {self._other_bytes():,} other)"
        )

    @property
    def used_bytes(self) -> int:
        kept = self.records_bytes + self.temporary_bytes + self.set_aside_bytes
        return kept + self._other_bytes()

    @property
    def bytes_beside_records(self) -> int:
        """What the store takes beside records, or took last where the disk does not say."""
        with suppress(OSError):
            self._last_beside_records = self.used_bytes - self.records_bytes
        return self._last_beside_records

    def require(self, nbytes: int) -> None:
        """Raise OverBudget or DiskTooFull unless `nbytes` more may be written. Takes nothing."""
        used_bytes = self.used_bytes
        if used_bytes + nbytes > self.budget_bytes:
            raise OverBudget(
                needed_bytes=nbytes, used_bytes=used_bytes, budget_bytes=self.budget_bytes
            )
        self.require_free(nbytes)

    def require_free(self, nbytes: int) -> None:
        """Raise DiskTooFull unless the disk has `nbytes` beyond what is left to others."""
        disk = os.statvfs(self._folder)
        free_bytes = disk.f_bavail * disk.f_frsize
        if free_bytes < self.free_floor_bytes + nbytes:
            raise DiskTooFull(
                needed_bytes=nbytes, free_bytes=free_bytes, floor_bytes=self.free_floor_bytes
            )
