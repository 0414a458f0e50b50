"""How the disk is: what it has refused, when it is asked again, and what it has taken."""

import logging
from dataclasses import dataclass, field
from enum import Enum

log = logging.getLogger("keepwarm.store")

FIRST_RETRY_S = 0.5
LAST_RETRY_S = 30.0
PROBE_AFTER_S = 1.0
"""After the time at which the disk is asked again: then nothing else asks it."""


class Work(Enum):
    """What a disk may refuse while it takes the rest."""

    COMMITS = "commits"
    RECORDS = "records"
    ERASING = "erasing what was deleted"


@dataclass(slots=True)
class DiskHealth:
    """What the disk has refused lately, and when it is asked again."""

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

    def note_fault(self, fault: str, now_s: float, work: Work) -> None:
        self.num_faults += 1
        if self.fault is None:
            log.error("the disk refuses writes; serving goes on from memory: %s", fault)
        self.fault = fault
        self._refused.add(work)
        self._suspended_until_s = now_s + self._pause_s
        self._pause_s = min(2 * self._pause_s, LAST_RETRY_S)

    def note_success(self, *works: Work, written_bytes: int = 0) -> None:
        """A disk that is full for records may take commits for long: all must be taken again."""
        self.written_bytes += written_bytes
        self._refused.difference_update(works)
        if self._refused:
            return
        if self.fault is not None:
            log.warning("the disk takes writes again")
        self.fault, self._suspended_until_s, self._pause_s = None, None, FIRST_RETRY_S

    def is_probe_due(self, now_s: float) -> bool:
        """Whether nothing has tried the disk for a while after it might have been tried again."""
        return (
            self._suspended_until_s is not None and now_s > self._suspended_until_s + PROBE_AFTER_S
        )

    def note_probe(self, fault: str | None, now_s: float) -> None:
        """Something was written for no other reason than to see whether that works again."""
        if fault is None:
            self.note_success(Work.COMMITS, Work.RECORDS)
        elif self.fault is not None:
            self.note_fault(fault, now_s, Work.COMMITS)

    def note_death(self, failure: BaseException | None) -> None:
        if self.fault is None or not self.fault.startswith("the store's thread"):
            self.fault = f"the store's thread has died: {failure!r}"
            log.critical("%s; nothing is saved any more", self.fault, exc_info=failure)

    def ask_again(self, now_s: float) -> None:
        """The pause is over."""
        if self._suspended_until_s is not None:
            self._suspended_until_s, self._pause_s = now_s, FIRST_RETRY_S

    def is_suspended(self, now_s: float) -> bool:
        return self._suspended_until_s is not None and now_s < self._suspended_until_s
