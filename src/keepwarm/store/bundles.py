"""Bundles under way: what the I/O thread writes, checks and stores a record at a time.

So commits, restores and saves never wait longer for a bundle than for one another.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from keepwarm.core.agent_store import BundleAnswer, BundleTicket
from keepwarm.core.block import BlockHash
from keepwarm.core.errors import BundleFailed
from keepwarm.core.stored import (
    AgentState,
    Bundle,
    BundleRead,
    BundleStored,
    BundleTerms,
    BundleWritten,
    KVFamily,
    Record,
)
from keepwarm.store.bundle.export import Export
from keepwarm.store.disk.io_thread import Priority, Units
from keepwarm.store.disk.outcomes import ExportDone, ImportDone
from keepwarm.store.disk.record import max_file_bytes
from keepwarm.store.health import Work
from keepwarm.store.parts import StoreParts
from keepwarm.store.record_index import Entry

T = TypeVar("T")

Hashes = tuple[BlockHash, ...]
Undo = Callable[[], object]


def _nothing() -> None:
    return


class DiskBundles:
    """Implements `BundleStore`. Owns the bundles under way, behind the saves queued before them."""

    def __init__(self, parts: StoreParts) -> None:
        self.storing: set[BlockHash] = set()
        """The records that are being stored."""
        self.num_reads = 0
        """How many records are being read; those that more than one job reads count again."""
        self._thread = parts.thread
        self._disk = parts.disk
        self._index = parts.index
        self._room = parts.room
        self._health = parts.health
        self._answers = parts.answers
        self._under_way: set[BundleTicket[Any]] = set()

    def __repr__(self) -> str:
        return f"DiskBundles({len(self)} under way)"

    def __len__(self) -> int:
        return len(self._under_way)

    def write_bundle(
        self, family: KVFamily, tokenizer: str, state: AgentState, path: Path
    ) -> BundleTicket[BundleWritten]:
        records: dict[BlockHash, tuple[Record, KVFamily]] = {}
        for line in state.lines:
            if line.tokenizer == tokenizer:
                own = replace(family, namespace=line.namespace)
                for entry in self._index.plan(own.root, line.transcript.token_ids):
                    records.setdefault(entry.record.hash, (entry.record, own))
        names = tuple(records)
        self._hold(names)
        export = Export(family, tokenizer, state, tuple(records.values()))
        return self._begin(
            path,
            BundleWritten,
            self._disk.export(path, export),
            partial(self._take_written, path, names),
            partial(self._release, names),
        )

    def read_bundle(self, path: Path, terms: BundleTerms) -> BundleTicket[BundleRead]:
        units = self._disk.read_bundle(path, terms)
        return self._begin(path, BundleRead, units, lambda read: (read, _nothing), _nothing)

    def store_bundle(self, bundle: Bundle, agent_id: str) -> BundleTicket[BundleStored]:
        names = self._make_room_for(bundle, agent_id)
        self.storing.update(names)
        return self._begin(
            bundle.path,
            BundleStored,
            self._disk.import_records(bundle, len(names), agent_id),
            partial(self._take_stored, names),
            partial(self._give_up, names),
        )

    def cancel_all(self) -> None:
        for ticket in self._under_way:
            ticket.cancel()

    # -- inside ----------------------------------------------------------------------------------

    def _begin(
        self,
        path: Path,
        kind: type[BundleAnswer],
        units: Units[T],
        take: Callable[[T], tuple[BundleAnswer, Undo]],
        give_up: Callable[[], object],
    ) -> BundleTicket[BundleAnswer]:
        """Begin work that `take` makes an answer of, and the way to undo it.

        `give_up` is called instead where the work was cancelled, or the thread has died.
        """

        def end(answer: BundleAnswer, undo: Undo) -> None:
            self._under_way.remove(ticket)
            ticket.end(undo)
            self._answers.add(ticket.put, answer)

        def lost() -> None:
            give_up()
            end(kind(error=BundleFailed(path, "the store's thread has died")), _nothing)

        cancel = self._thread.ask_units(
            Priority.SAVE, units, lambda value: end(*take(value)), lost=lost
        )
        ticket: BundleTicket[BundleAnswer] = BundleTicket(cancel)
        self._under_way.add(ticket)
        return ticket

    def _take_written(
        self, path: Path, names: Hashes, done: ExportDone
    ) -> tuple[BundleWritten, Undo]:
        """Forget records that turned out to be damaged."""
        self._release(names)
        lost = [h for h in done.lost if self._index.forget(h) is not None]
        self._health.num_damaged += len(lost)
        remove = partial(self._thread.post, Priority.SAVE, partial(self._disk.remove_export, path))
        return done.written, remove if done.written.error is None else _nothing

    def _take_stored(self, names: Hashes, done: ImportDone) -> tuple[BundleStored, Undo]:
        """Forget the records that the disk has not taken, and remove those evicted meanwhile."""
        self._room.other_bytes = done.other_bytes
        self._health.note_fault(done.fault, Work.RECORDS)
        self.storing.difference_update(names)
        stored = {row.hash: row.file_bytes for row in done.stored}
        for record_hash in names:
            entry = self._index.get(record_hash)
            if record_hash not in stored:
                self._index.forget(record_hash)
            elif entry is None:
                self._room.remove([record_hash])
            else:
                self._index.confirm(entry, stored[record_hash])
        return BundleStored(len(stored), done.error), partial(self._room.drop, names)

    def _give_up(self, names: Hashes) -> None:
        self.storing.difference_update(names)
        for record_hash in names:
            self._index.forget(record_hash)

    def _hold(self, names: Hashes) -> None:
        """Keep these records while they are read."""
        self.num_reads += len(names)
        for record_hash in names:
            if (entry := self._index.get(record_hash)) is not None:
                entry.num_readers += 1

    def _release(self, names: Hashes) -> None:
        self.num_reads -= len(names)
        for record_hash in names:
            entry = self._index.get(record_hash)
            if entry is not None:
                # An entry may be a later one of that name, which nothing of this has held.
                entry.num_readers = max(entry.num_readers - 1, 0)
                self._index.offer(record_hash)

    def _make_room_for(self, bundle: Bundle, agent_id: str) -> Hashes:
        """Return the first records of the bundle, as many as budget and the agent's quota allow."""
        names: list[BlockHash] = []
        family, quota_bytes = bundle.terms.family, bundle.state.settings.quota_bytes
        for record in bundle.records:
            nbytes = max_file_bytes(family, record.num_tokens)
            is_within = quota_bytes is None or (
                self._index.bytes_of(agent_id) + nbytes <= quota_bytes
            )
            if not is_within or not self._room.make(nbytes, None):
                break
            self._index.add(Entry(record, nbytes, agent_id, self._index.clock, is_saved=False))
            names.append(record.hash)
        return tuple(names)
