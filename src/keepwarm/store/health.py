"""The disk's health: what it has refused, when it is asked again, and what it has taken."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

log = logging.getLogger("keepwarm.store")

FIRST_RETRY_S = 0.5
LAST_RETRY_S = 30.0
PROBE_AFTER_S = 1.0
"""How many seconds after the pause the disk is probed, when nothing else has tried it."""


class Work(Enum):
    """What a disk may refuse while it takes the rest."""

    COMMITS = "commits"
    RECORDS = "records"
    ERASING = "erasing what was deleted"


@dataclass(slots=True)
class DiskHealth:
    """What the disk has refused lately, and when it is asked again. `clock` counts seconds."""

    clock: Callable[[], float]
    fault: str | None = None
    num_faults: int = 0
    num_damaged: int = 0
    written_bytes: int = 0
    evicted_bytes: int = 0
    _refused: set[Work] = field(default_factory=set)
    _pause_s: float = FIRST_RETRY_S
    _suspended_until_s: float | None = None

    def note_read_fault(self, fault: str) -> None:
        self.num_faults += 1
        log.warning("a record could not be read: %s", fault)

    def note_fault(self, fault: str | None, work: Work) -> None:
        """Note that the disk has refused this work, if there is a `fault`."""
        if fault is None:
            return
        self.num_faults += 1
        if self.fault is None:
            log.error("the disk refuses writes; serving goes on from memory: %s", fault)
        self.fault = fault
        self._refused.add(work)
        self._suspended_until_s = self.clock() + self._pause_s
        self._pause_s = min(2 * self._pause_s, LAST_RETRY_S)

    def note_success(self, *works: Work, written_bytes: int = 0) -> None:
        """Note that the disk has taken this work again.

        The fault is over when everything refused has been taken: a disk that is full for records
        may take commits for long.
        """
        self.written_bytes += written_bytes
        self._refused.difference_update(works)
        if self._refused:
            return
        if self.fault is not None:
            log.warning("the disk takes writes again")
        self.fault, self._suspended_until_s, self._pause_s = None, None, FIRST_RETRY_S

    def is_probe_due(self) -> bool:
        """Whether nothing has tried the disk for a while after it might have been tried again."""
        until_s = self._suspended_until_s
        return until_s is not None and self.clock() > until_s + PROBE_AFTER_S

    def note_probe(self, fault: str | None) -> None:
        """Something was written only to see whether that works again."""
        if fault is None:
            self.note_success(Work.COMMITS, Work.RECORDS)
        elif self.fault is not None:
            self.note_fault(fault, Work.COMMITS)

    def note_death(self, failure: BaseException | None) -> None:
        if self.fault is None or not self.fault.startswith("the store's thread"):
            self.fault = f"the store's thread has died: {failure!r}"
            log.critical("%s; nothing is saved any more", self.fault, exc_info=failure)

    def ask_again(self) -> None:
        """End the pause."""
        if self._suspended_until_s is not None:
            self._suspended_until_s, self._pause_s = self.clock(), FIRST_RETRY_S

    @property
    def is_suspended(self) -> bool:
        return self._suspended_until_s is not None and self.clock() < self._suspended_until_s
