"""The store's work on files and catalogue: what its I/O thread does, one command at a time.

Every command returns what came of it. A disk that refuses is an answer (`fault`), not an exception.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec, TypeVar

from keepwarm.core.block import BlockHash
from keepwarm.core.stored import AgentState, KVFamily, Record
from keepwarm.store.budget import DiskBudget
from keepwarm.store.catalog import Catalog
from keepwarm.store.catalog_errors import CatalogCorrupt, CatalogUnavailable, UnstorableMessage
from keepwarm.store.catalog_rows import RecordRow, UsageRow
from keepwarm.store.disk import RecordFiles, StoredFile
from keepwarm.store.errors import BadRecord, DiskTooFull, OverBudget
from keepwarm.store.home_lock import HomeLock
from keepwarm.store.record import decode, encode, read_header
from keepwarm.store.schema import set_aside

log = logging.getLogger("keepwarm.store")

FAULTS = (OSError, CatalogUnavailable, CatalogCorrupt, UnstorableMessage, OverBudget, DiskTooFull)
"""What a disk, or the budget on it, may answer."""

CATALOG_NAME = "catalog.sqlite3"
COMMIT_BYTES = 256 << 10
"""What a commit must have room for in the budget."""
REMOVALS_PER_COMMAND = 64

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Limits:
    """What the store may take. `set_aside_bytes` of it for damaged files."""

    budget_bytes: int
    free_floor_bytes: int
    set_aside_bytes: int


@dataclass(frozen=True, slots=True)
class Opened:
    """What the catalogue knows."""

    rows: list[RecordRow]
    usage: list[UsageRow]
    pinned: list[AgentState]
    clock: int
    other_bytes: int


@dataclass(frozen=True, slots=True)
class OpenFailed:
    error: Exception


@dataclass(frozen=True, slots=True)
class SaveDone:
    """`file_bytes` None: nothing was written, because of the fault."""

    record_hash: BlockHash
    file_bytes: int | None
    other_bytes: int
    fault: str | None = None


@dataclass(frozen=True, slots=True)
class FetchDone:
    """`data` None: the record is gone, damaged (and set aside), or could not be read."""

    ticket: int
    record_hash: BlockHash
    data: memoryview | None
    is_lost: bool = False
    damage: str | None = None
    fault: str | None = None


@dataclass(frozen=True, slots=True)
class CommitDone:
    ticket: int
    other_bytes: int
    fault: str | None = None


@dataclass(frozen=True, slots=True)
class Reconciled:
    """What a look at a part of the files has changed: records that were found, and lost ones."""

    found: tuple[RecordRow, ...]
    lost: tuple[BlockHash, ...]
    is_last: bool


Outcome = Opened | OpenFailed | SaveDone | FetchDone | CommitDone | Reconciled


class DiskStore:
    """Owns the home's lock, the catalogue and the record files. Belongs to the I/O thread."""

    def __init__(self, root: Path, limits: Limits) -> None:
        """Creates what is missing. A damaged catalogue is set aside and begun anew.

        Raises HomeInUse, CatalogTooNew, CatalogUnavailable and OSError.
        """
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = HomeLock(root)
        try:
            self._catalog = _open_catalog(root / CATALOG_NAME)
            self._budget = DiskBudget(
                root,
                budget_bytes=limits.budget_bytes,
                free_floor_bytes=limits.free_floor_bytes,
                other_bytes=self._catalog.size_bytes,
            )
            self._files = RecordFiles(
                root, self._budget, max_set_aside_bytes=limits.set_aside_bytes
            )
            self._rows = self._catalog.load_records()
        except BaseException:
            self._lock.release()
            raise
        self._files.set_records_bytes(sum(row.file_bytes for row in self._rows))
        self._known = {row.hash for row in self._rows}
        self._unseen: set[BlockHash] = set(self._known)
        self._scan: Iterator[StoredFile] | None = None

    def opened(self) -> Opened:
        rows, self._rows = self._rows, []
        catalog = self._catalog
        return Opened(
            rows, catalog.load_usage(), catalog.load_pinned(), catalog.clock(), self._other_bytes()
        )

    def close(self) -> None:
        self._catalog.close()
        self._lock.release()

    # -- records ---------------------------------------------------------------------------------

    def save(
        self,
        family: KVFamily,
        record: Record,
        token_ids: Sequence[int],
        pieces: Sequence[memoryview],
        maker: str | None,
    ) -> SaveDone:
        """Write the file, then name it in the catalogue. Only then does it exist."""
        try:
            file_bytes = self._files.publish(record.hash, encode(family, record, token_ids, pieces))
            row = RecordRow.of(record, family, file_bytes=file_bytes, maker=maker)
            self._catalog.add_records([row])
        except FAULTS as error:
            return SaveDone(record.hash, None, self._other_bytes(), _describe(error))
        self._known.add(record.hash)
        self._unseen.discard(record.hash)
        return SaveDone(record.hash, file_bytes, self._other_bytes())

    def fetch(
        self, ticket: int, family: KVFamily, record_hash: BlockHash, buffer: bytearray
    ) -> FetchDone:
        """Read and check. What is damaged is set aside, and the catalogue forgets it."""
        try:
            raw = self._files.read_into(record_hash, buffer)
            if raw is not None:
                decoded = decode(raw, family)
                if decoded.record.hash == record_hash:
                    return FetchDone(ticket, record_hash, decoded.data)
                raise BadRecord("it is another record than its name says")
            damage = "its file is gone"
        except BadRecord as error:
            damage = str(error)
        except OSError as error:
            return FetchDone(ticket, record_hash, None, fault=_describe(error))
        self._give_up(record_hash, damage)
        return FetchDone(ticket, record_hash, None, is_lost=True, damage=damage)

    def remove(self, hashes: Sequence[BlockHash]) -> None:
        """First out of the catalogue: a name without a file would be a lie."""
        try:
            self._catalog.remove_records(hashes)
            for record_hash in hashes:
                self._files.remove(record_hash)
                self._known.discard(record_hash)
                self._unseen.discard(record_hash)
        except FAULTS as error:
            log.warning("%d records could not be removed: %s", len(hashes), error)

    def _give_up(self, record_hash: BlockHash, reason: str) -> None:
        try:
            self._catalog.remove_records([record_hash])
            self._files.set_aside(record_hash, reason)
        except FAULTS as error:
            log.warning("%s could not be set aside: %s", record_hash.hex(), error)
        self._known.discard(record_hash)
        self._unseen.discard(record_hash)

    # -- agents ----------------------------------------------------------------------------------

    def commit(self, ticket: int, state: AgentState) -> CommitDone:
        return self._committing(ticket, lambda: self._catalog.commit(state))

    def delete_agent(self, ticket: int, agent_id: str) -> CommitDone:
        return self._committing(ticket, lambda: self._catalog.delete_agent(agent_id))

    def _committing(self, ticket: int, write: Callable[[], None]) -> CommitDone:
        try:
            self._budget.require(COMMIT_BYTES)
            write()
        except FAULTS as error:
            return CommitDone(ticket, self._other_bytes(), _describe(error))
        return CommitDone(ticket, self._other_bytes())

    # -- reconciling -----------------------------------------------------------------------------

    def reconcile(self, num_files: int) -> Reconciled:
        """Look at the next files: catalogue and disk must name the same records.

        A file that the catalogue does not know, because the process was killed before it was named
        there or the catalogue was lost, is adopted when its header is sound, and set aside if not.
        """
        self._scan = self._scan or self._files.scan()
        found: list[RecordRow] = []
        num_seen = 0
        try:
            for stored in self._scan:
                num_seen += 1
                self._unseen.discard(stored.record_hash)
                if stored.record_hash not in self._known:
                    found += self._adopt(stored)
                if num_seen >= num_files:
                    return Reconciled(tuple(found), (), is_last=False)
            self._catalog.remove_records(self._unseen)
        except FAULTS as error:
            log.warning("the files could not be compared with the catalogue: %s", error)
        lost, self._unseen = tuple(self._unseen), set()
        return Reconciled(tuple(found), lost, is_last=True)

    def _adopt(self, stored: StoredFile) -> list[RecordRow]:
        try:
            with stored.path.open("rb") as file:
                header = read_header(file)
            if header.record.hash != stored.record_hash:
                raise BadRecord("it is another record than its name says")
        except BadRecord as error:
            self._budget.records_bytes += stored.size_bytes
            self._give_up(stored.record_hash, str(error))
            return []
        row = RecordRow.of(header.record, header.family, file_bytes=stored.size_bytes, maker=None)
        self._catalog.add_records([row])
        self._budget.records_bytes += stored.size_bytes
        self._known.add(stored.record_hash)
        return [row]

    def _other_bytes(self) -> int:
        return self._budget.used_bytes - self._budget.records_bytes


def _open_catalog(path: Path) -> Catalog:
    try:
        return Catalog.open(path)
    except CatalogCorrupt as error:
        moved = set_aside(path)
        log.error(
            "%s. It was moved to %s and a new one is begun: the agents' conversations are lost, "
            "their KV is found again by content",
            error,
            moved,
        )
        return Catalog.open(path)


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
