"""What commands of the I/O thread return: a disk that refuses is a `fault` in it, not an exception.

`other_bytes` is what the store's folder takes beside the records, after the command.
"""

from dataclasses import dataclass

from keepwarm.core.block import BlockHash
from keepwarm.core.errors import KeepwarmError
from keepwarm.core.stored import BundleWritten
from keepwarm.store.catalog.rows import RecordRow


@dataclass(frozen=True, slots=True)
class SaveDone:
    """`file_bytes` None: nothing was written, because of the fault or because it was removed."""

    file_bytes: int | None
    other_bytes: int
    fault: str | None = None


@dataclass(frozen=True, slots=True)
class FetchDone:
    """A record's data, or why there is none.

    `damage`: the record is gone, or was set aside. `fault`: the disk could not read it.
    """

    data: memoryview | None
    damage: str | None = None
    fault: str | None = None


@dataclass(frozen=True, slots=True)
class CommitDone:
    """Whether the catalogue took a change of an agent.

    `fault`: the disk, or the budget on it, refused. `refusal`: it can never be written.
    """

    other_bytes: int
    fault: str | None = None
    refusal: str | None = None
    is_over_budget: bool = False

    @property
    def is_taken(self) -> bool:
        return self.fault is None and self.refusal is None


@dataclass(frozen=True, slots=True)
class Erased:
    """Nothing of a deleted agent is left in the files; or `fault` says what the disk refused."""

    other_bytes: int
    fault: str | None = None


@dataclass(frozen=True, slots=True)
class Reconciled:
    """What a look at a part of the files has changed: records that were found, and lost ones."""

    found: tuple[RecordRow, ...]
    lost: tuple[BlockHash, ...]
    is_last: bool


@dataclass(frozen=True, slots=True)
class ExportDone:
    """A bundle was written or not; `lost` are records that were gone, or damaged and set aside."""

    written: BundleWritten
    lost: tuple[BlockHash, ...]


@dataclass(frozen=True, slots=True)
class ImportDone:
    """The records of a bundle that were stored, with their files' bytes.

    After a fault those that were written before it stay; after an `error` none does.
    """

    stored: tuple[RecordRow, ...]
    other_bytes: int
    fault: str | None = None
    error: KeepwarmError | None = None
