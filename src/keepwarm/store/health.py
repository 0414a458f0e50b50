"""How the disk is: what it has refused, when it is asked again, and what it has taken."""

import logging
from dataclasses import dataclass, field

log = logging.getLogger("keepwarm.store")

FIRST_RETRY_S = 0.5
LAST_RETRY_S = 30.0


@dataclass(slots=True)
class DiskHealth:
    """What the disk has refused lately, and when it is asked again."""

    fault: str | None = None
    num_faults: int = 0
    num_damaged: int = 0
    written_bytes: int = 0
    evicted_bytes: int = 0
    _refused: set[bool] = field(default_factory=set)
    _pause_s: float = FIRST_RETRY_S
    _suspended_until_s: float | None = None

    def note_read_fault(self, fault: str) -> None:
        self.num_faults += 1
        log.warning("a record could not be read: %s", fault)

    def note_fault(self, fault: str, now_s: float, *, is_commit: bool) -> None:
        self.num_faults += 1
        if self.fault is None:
            log.error("the disk refuses writes; serving goes on from memory: %s", fault)
        self.fault = fault
        self._refused.add(is_commit)
        self._suspended_until_s = now_s + self._pause_s
        self._pause_s = min(2 * self._pause_s, LAST_RETRY_S)

    def note_success(self, written_bytes: int, *, is_commit: bool = False) -> None:
        """A disk that is full for records may take commits for long: both must be taken again."""
        self.written_bytes += written_bytes
        self._refused.discard(is_commit)
        if self._refused:
            return
        if self.fault is not None:
            log.warning("the disk takes writes again")
        self.fault, self._suspended_until_s, self._pause_s = None, None, FIRST_RETRY_S

    def note_death(self, failure: BaseException | None) -> None:
        if self.fault is None or not self.fault.startswith("the store's thread"):
            self.fault = f"the store's thread has died: {failure!r}"
            log.critical("%s; nothing is saved any more", self.fault, exc_info=failure)

    def is_suspended(self, now_s: float) -> bool:
        return self._suspended_until_s is not None and now_s < self._suspended_until_s
