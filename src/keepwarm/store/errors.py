"""Errors of the store, each with the facts that it was decided on."""

from keepwarm.core.errors import KeepwarmError


class BadRecord(KeepwarmError):
    """A file that must not be used as the record it was taken for."""


class DamagedRecord(BadRecord):
    """The bytes are not what was written, or were never a record."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class ForeignRecord(BadRecord):
    """A sound record of other weights, another layout, lineage, namespace or encoding."""

    def __init__(self, *, field: str, found: str, expected: str) -> None:
        super().__init__(f"its {field} is {found!r}; expected {expected!r}")
        self.field = field
        self.found = found
        self.expected = expected


class OverBudget(KeepwarmError):
    """The bytes do not fit into the store's budget. Nothing was written."""

    def __init__(self, *, needed_bytes: int, used_bytes: int, budget_bytes: int) -> None:
        super().__init__(
            f"{needed_bytes:,} bytes do not fit: {used_bytes:,} of the disk budget's "
            f"{budget_bytes:,} are used"
        )
        self.needed_bytes = needed_bytes
        self.used_bytes = used_bytes
        self.budget_bytes = budget_bytes


class DiskTooFull(KeepwarmError):
    """Writing would leave less of the disk free than others were promised: nothing was written."""

    def __init__(self, *, needed_bytes: int, free_bytes: int, floor_bytes: int) -> None:
        super().__init__(
            f"{needed_bytes:,} bytes do not fit: {free_bytes:,} are free on the disk and "
            f"{floor_bytes:,} must stay free"
        )
        self.needed_bytes = needed_bytes
        self.free_bytes = free_bytes
        self.floor_bytes = floor_bytes
