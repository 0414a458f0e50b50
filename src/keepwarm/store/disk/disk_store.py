"""The store's disk: the commands that its I/O thread runs on files and catalogue.

Every command returns what came of it (`outcomes.py`), also where the disk refused.
"""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import ParamSpec, TypeVar

from keepwarm.core.block import BlockHash
from keepwarm.core.errors import BadBundle, BundleFailed
from keepwarm.core.stored import (
    AgentState,
    Bundle,
    BundleRead,
    BundleTerms,
    BundleWritten,
    KVFamily,
    Record,
)
from keepwarm.store.bundle.archive import Moved, read_bundle, read_records
from keepwarm.store.bundle.export import Export, export_agent
from keepwarm.store.catalog.catalog import Catalog
from keepwarm.store.catalog.errors import CatalogCorrupt, CatalogUnavailable, UnstorableMessage
from keepwarm.store.catalog.opening import Opened, is_unclaimed, open_catalog
from keepwarm.store.catalog.rows import RecordRow
from keepwarm.store.disk.budget import DiskBudget
from keepwarm.store.disk.files import BLOCKS_FOLDER, RecordFiles, StoredFile
from keepwarm.store.disk.home_lock import HomeLock
from keepwarm.store.disk.io_thread import Units
from keepwarm.store.disk.outcomes import (
    CommitDone,
    Erased,
    ExportDone,
    FetchDone,
    ImportDone,
    Reconciled,
    SaveDone,
)
from keepwarm.store.disk.record import decode, encode, read_header
from keepwarm.store.errors import BadRecord, DiskTooFull, OverBudget

log = logging.getLogger("keepwarm.store")

FAULTS = (OSError, CatalogUnavailable, CatalogCorrupt, OverBudget, DiskTooFull)
"""Errors by which a disk, or the budget on it, refuses."""

CATALOG_NAME = "catalog.sqlite3"
COMMIT_BYTES = 256 << 10
"""How many bytes of the budget must be free for a commit."""
REMOVALS_PER_COMMAND = 64

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Limits:
    """The bytes that the store may take, `set_aside_bytes` of them for damaged files."""

    budget_bytes: int
    free_floor_bytes: int
    set_aside_bytes: int


class DiskStore:
    """Owns the home's lock, the catalogue and the record files. Belongs to the I/O thread."""

    def __init__(
        self,
        root: Path,
        lock: HomeLock,
        catalog: Catalog,
        *,
        files: RecordFiles,
        budget: DiskBudget,
        rows: Sequence[RecordRow],
        between: Callable[[], None],
    ) -> None:
        self._root = root
        self._lock = lock
        self._catalog = catalog
        self._files = files
        self._budget = budget
        self._between = between
        self._files.set_records_bytes(sum(row.file_bytes for row in rows))
        self._known = {row.hash: row.file_bytes for row in rows}
        self._unseen: set[BlockHash] = set(self._known)
        self._unwanted: set[BlockHash] = set()
        self._scan: Iterator[StoredFile] | None = None

    @classmethod
    def open(
        cls, root: Path, limits: Limits, between: Callable[[], None] = lambda: None
    ) -> tuple["DiskStore", Opened]:
        """Open a home, and return what its catalogue knows.

        Creates what is missing; a damaged catalogue is set aside and begun anew. `between` is
        called while a record is being written, to let commits go before it. Raises HomeInUse,
        CatalogTooNew, CatalogUnavailable and OSError.
        """
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = HomeLock(root)
        try:
            was_used = (root / BLOCKS_FOLDER).is_dir()
            catalog, opened = open_catalog(root / CATALOG_NAME, was_used=was_used)
            budget = DiskBudget(
                root,
                budget_bytes=limits.budget_bytes,
                free_floor_bytes=limits.free_floor_bytes,
                other_bytes=catalog.size_bytes,
            )
            files = RecordFiles(root, budget, max_set_aside_bytes=limits.set_aside_bytes)
        except BaseException:
            lock.release()
            raise
        disk = cls(
            root, lock, catalog, files=files, budget=budget, rows=opened.rows, between=between
        )
        return disk, replace(opened, other_bytes=budget.bytes_beside_records)

    def close(self) -> None:
        self._catalog.close()
        self._lock.release()

    def give_home_back(self) -> None:
        """Let another store open the home, after the thread that owns this one has died."""
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
        if self._is_unwanted(record.hash):
            return SaveDone(None, self._budget.bytes_beside_records)
        try:
            parts = encode(family, record, token_ids, pieces)
            file_bytes = self._files.publish(record.hash, parts, self._between)
            if self._is_unwanted(record.hash):  # since it was begun
                self._files.remove(record.hash)
                return SaveDone(None, self._budget.bytes_beside_records)
            row = RecordRow.of(record, family, file_bytes=file_bytes, maker=maker)
            self._catalog.add_records([row])
        except FAULTS as error:
            self._remove_unnamed(record.hash)
            return SaveDone(None, self._budget.bytes_beside_records, self._describe(error))
        self._known[record.hash] = file_bytes
        self._unseen.discard(record.hash)
        return SaveDone(file_bytes, self._budget.bytes_beside_records)

    def _is_unwanted(self, record_hash: BlockHash) -> bool:
        """Whether the record was removed before it was saved; that is forgotten now."""
        is_unwanted = record_hash in self._unwanted
        self._unwanted.discard(record_hash)
        return is_unwanted

    def _remove_unnamed(self, record_hash: BlockHash) -> None:
        """Remove a file that the catalogue could not be told of: it would stay uncounted."""
        if record_hash not in self._known:
            with suppress(OSError):
                self._files.remove(record_hash)

    def fetch(self, family: KVFamily, record: Record, buffer: bytearray) -> FetchDone:
        """Read a record and check it. A damaged one is set aside, and the catalogue forgets it."""
        try:
            raw = self._files.read_into(record.hash, buffer)
            if raw is not None:
                decoded = decode(raw, family)
                # After a kill before the catalogue knew, a block's file may hold more of its
                # tokens than the run that it replaced.
                if decoded.record == record:
                    return FetchDone(decoded.data)
                raise BadRecord("it is another record than its name says")
            damage = "its file is gone"
        except BadRecord as error:
            damage = str(error)
        except OSError as error:
            return FetchDone(None, fault=self._describe(error))
        self._give_up(record.hash, damage)
        return FetchDone(None, damage)

    def remove(self, hashes: Sequence[BlockHash]) -> None:
        """Remove records from the catalogue and then from the disk.

        A record that is not there is still to be saved, and is not written then.
        """
        # The catalogue first: after a kill in between, a file without a name is found and adopted
        # or collected, and a name without a file would have been a lie.
        self._unwanted.update(h for h in hashes if h not in self._known)
        try:
            self._catalog.remove_records(hashes)
            for record_hash in hashes:
                self._forget(record_hash)
                self._files.remove(record_hash)
        except FAULTS as error:
            log.warning("%d records could not be removed: %s", len(hashes), error)

    def _give_up(self, record_hash: BlockHash, reason: str) -> None:
        try:
            self._catalog.remove_records([record_hash])
            self._forget(record_hash)
            self._files.set_aside(record_hash, reason)
        except FAULTS as error:
            log.warning("%s could not be set aside: %s", record_hash.hex(), error)

    def _forget(self, record_hash: BlockHash) -> None:
        """Forget a record; of its file, the budget counts what is there."""
        actual_bytes = self._files.size_of(record_hash) or 0
        self._budget.records_bytes += actual_bytes - self._known.pop(record_hash, actual_bytes)
        self._unseen.discard(record_hash)

    # -- bundles ---------------------------------------------------------------------------------

    def export(self, path: Path, export: Export) -> Units[ExportDone]:
        """Write an agent and those of its records that are sound into one file."""
        lost: dict[BlockHash, str] = {}
        check_room = partial(self._check_room_beside, path)
        try:
            num_records, file_bytes = yield from export_agent(
                path, export, self._files, lost, check_room
            )
        except BundleFailed as error:
            return ExportDone(BundleWritten(error=error), tuple(lost))
        except DiskTooFull as error:
            return ExportDone(BundleWritten(error=BundleFailed(path, str(error))), tuple(lost))
        except OSError as error:
            return ExportDone(BundleWritten(error=_refused(path, error)), tuple(lost))
        finally:
            for record_hash, reason in lost.items():
                self._give_up(record_hash, reason)
        return ExportDone(BundleWritten(file_bytes, num_records), tuple(lost))

    def _check_room_beside(self, path: Path, nbytes: int) -> None:
        """Raise DiskTooFull where a file on the store's disk would take what is left to others."""
        if path.parent.stat().st_dev == self._root.stat().st_dev:
            self._budget.require_free(nbytes)

    def remove_export(self, path: Path) -> None:
        """Remove the file of an export that was cancelled when it had just ended."""
        with suppress(OSError):
            path.unlink(missing_ok=True)

    def read_bundle(self, path: Path, terms: BundleTerms) -> Units[BundleRead]:
        try:
            bundle = yield from read_bundle(path, terms)
        except BadBundle as error:
            return BundleRead(error=error)
        except OSError as error:
            return BundleRead(error=_refused(path, error))
        return BundleRead(bundle)

    def import_records(self, bundle: Bundle, num_records: int, maker: str) -> Units[ImportDone]:
        """Store the first records of a bundle, which is checked again while it is read."""
        family = bundle.terms.family
        rows: list[RecordRow] = []
        are_wanted = False
        fault: str | None = None
        try:
            for moved in islice(read_records(bundle), num_records):
                rows.append(self._import_record(moved, family, maker))
                yield
            are_wanted = True
        except BadBundle as error:
            return ImportDone((), self._budget.bytes_beside_records, error=error)
        except FAULTS as refused:
            are_wanted, fault = True, self._describe(refused)
        finally:
            if not are_wanted:
                self.remove([row.hash for row in rows])
        return ImportDone(tuple(rows), self._budget.bytes_beside_records, fault)

    def _import_record(self, moved: Moved, family: KVFamily, maker: str) -> RecordRow:
        parts = moved.parts(family)
        file_bytes = self._files.publish(moved.record.hash, parts, self._between)
        row = RecordRow.of(moved.record, family, file_bytes=file_bytes, maker=maker)
        try:
            self._catalog.add_records([row])
        except FAULTS:
            self._files.remove(row.hash)
            raise
        self._known[row.hash] = file_bytes
        return row

    # -- agents ----------------------------------------------------------------------------------

    def commit(self, state: AgentState) -> CommitDone:
        return self._committing(lambda: self._catalog.commit(state))

    def delete_agent(self, agent_id: str, *, is_damaged: bool) -> CommitDone:
        """Remove the agent's rows for good; what they leave in the file is for `erase`."""
        delete = partial(self._catalog.delete_agent, agent_id, scrub=False, is_damaged=is_damaged)
        return self._committing(delete)

    def erase(self) -> Erased:
        """Write the catalogue anew, without what was deleted from it."""
        try:
            if self._catalog.needs_scrub:
                # A scrub writes the whole catalogue into its log before it makes it smaller.
                self._budget.require(self._catalog.size_bytes())
                self._catalog.scrub()
        except FAULTS as error:
            return Erased(self._budget.bytes_beside_records, self._describe(error))
        return Erased(self._budget.bytes_beside_records)

    def probe(self, record_bytes: int) -> str | None:
        """Write something like a record and something like a commit, and take them back.

        Returns what the disk refused, if anything.
        """
        try:
            self._files.probe(record_bytes)
            self._budget.require(COMMIT_BYTES)
            self._catalog.probe()
        except FAULTS as error:
            return self._describe(error)
        return None

    def _committing(self, write: Callable[[], None]) -> CommitDone:
        try:
            self._budget.require(COMMIT_BYTES)
            write()
        except UnstorableMessage as error:
            return CommitDone(self._budget.bytes_beside_records, refusal=str(error))
        except FAULTS as error:
            is_over = isinstance(error, OverBudget)
            fault = self._describe(error)
            return CommitDone(self._budget.bytes_beside_records, fault, is_over_budget=is_over)
        return CommitDone(self._budget.bytes_beside_records)

    # -- reconciling -----------------------------------------------------------------------------

    def reconcile(self, num_files: int) -> Reconciled:
        """Compare the next files with the catalogue: both must name the same records.

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
            self._unseen = set()  # that they were not seen says nothing
        lost = tuple(self._unseen)
        for record_hash in lost:
            self._forget(record_hash)
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
        if is_unclaimed(header.family, self._catalog.namespaces()):
            self._budget.records_bytes += stored.size_bytes
            self._files.remove(stored.record_hash)
            return []
        row = RecordRow.of(header.record, header.family, file_bytes=stored.size_bytes, maker=None)
        self._catalog.add_records([row])
        self._budget.records_bytes += stored.size_bytes
        self._known[stored.record_hash] = stored.size_bytes
        return [row]

    def _describe(self, error: BaseException) -> str:
        """Return the error as text without the home's path, because clients may read it."""
        return f"{type(error).__name__}: {error}".replace(f"{self._root}{os.sep}", "")


def _refused(path: Path, error: OSError) -> BundleFailed:
    """Return the error of a bundle without the disk's path, because clients may read it."""
    return BundleFailed(path, error.strerror or str(error))
