"""The catalogue in one SQLite database: agents as data, and which records of KV lie on disk.

Agents are durable when `commit` returns. Records are rows about files that may be lost: they
survive the process, and a power cut may take the last of them.
"""

import logging
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import starmap
from pathlib import Path
from typing import Literal

from keepwarm.core.block import BlockHash
from keepwarm.core.errors import DamagedAgent, InvariantBroken
from keepwarm.core.stored import AgentState, KVFamily
from keepwarm.store.bulk import without_gc
from keepwarm.store.catalog import schema
from keepwarm.store.catalog.check import check_tables
from keepwarm.store.catalog.errors import CatalogUnavailable
from keepwarm.store.catalog.load import UNREADABLE, read_agent
from keepwarm.store.catalog.plan import RowIds, plan_commit
from keepwarm.store.catalog.reader import CatalogConnection
from keepwarm.store.catalog.recent import RecentAgents
from keepwarm.store.catalog.rows import BlockUsage, RecordRow, decode_layout, encode_layout
from keepwarm.store.catalog.schema import translated
from keepwarm.store.catalog.seals import COLUMNS, insert, seal_of, sealed, select, sound

log = logging.getLogger("keepwarm.store")

Synchronous = Literal["FULL", "NORMAL"]

_PUT_RECORD = insert("records")
_RECORDS = f"SELECT created, {COLUMNS['records']}, seal FROM records ORDER BY created"
_DISOWN = f"""
    UPDATE records SET maker = NULL, seal = seal_of({COLUMNS["records"].replace("maker", "NULL")})
    WHERE maker = ?
"""
_SCRUB = "scrub"
_PROBE = "probe"
_ADD_FAMILY = insert("families")
_USERS = """
    SELECT hash, line FROM line_blocks WHERE typeof(hash) = 'blob' AND length(hash) = 32
"""
_ORPHANS = (
    "DELETE FROM lines WHERE agent NOT IN (SELECT agent FROM agents)",
    *(
        f"DELETE FROM {table} WHERE line NOT IN (SELECT line FROM lines)"
        for table in ("spans", "messages", "turns", "line_blocks")
    ),
)
_MAX_ID = 1 << 40
"""Larger ids of agents and lines are damage, and new ids do not follow them."""


class Catalog(CatalogConnection):
    """The one connection that writes. It remembers what it committed, and writes only what is new.

    Nothing else may write to the file meanwhile; a state that was committed must not be changed.
    """

    def __init__(self, path: Path, db: sqlite3.Connection) -> None:
        super().__init__(path, db)
        self._recent = RecentAgents()
        self._ids = self._read_ids()
        self._families = self._read_families()

    def __repr__(self) -> str:
        return f"Catalog({str(self.path)!r}, {len(self._recent)} agents remembered)"

    @classmethod
    def open(cls, path: Path, steps: Sequence[schema.Step] = schema.STEPS) -> "Catalog":
        """Create the file or bring it up to date.

        Raises CatalogCorrupt, CatalogTooNew, CatalogUnavailable; the file is closed then.
        """
        db = schema.open_for_writing(path, steps)
        try:
            with translated(path, "open", opening=True):
                return cls(path, db)
        except BaseException:
            db.close()
            raise

    # -- agents ----------------------------------------------------------------------------------

    def commit(self, state: AgentState) -> None:
        """Make the agent what the state says. When this returns, a power cut changes nothing.

        Rows that turn out to be damaged are written anew. Raises UnstorableMessage, and
        CatalogUnavailable; nothing of the state is kept then.
        """
        name = state.agent_id
        try:
            known, is_damaged = self._recent.take(name) or self._read(name, "commit"), False
        except DamagedAgent as error:
            log.warning("agent %r is written anew: %s", name, error.problem)
            known, is_damaged = None, True
        plan = plan_commit(known, state, self._ids)
        if plan.writes:
            with self._transaction("commit", "FULL"):
                if is_damaged:
                    self._remove(name, is_damaged=True)
                for write in plan.writes:
                    self._db.executemany(write.sql, write.rows)
        self._recent.put(plan.committed)

    def delete_agent(self, name: str, *, scrub: bool = True, is_damaged: bool = False) -> None:
        """Remove every trace of the agent. Its records stay, without a maker.

        Without `scrub`, which takes as long as copying the whole file, traces stay until it is
        called. After CatalogUnavailable a second call finishes the work. A damaged agent may have
        left rows that name no line or agent: `is_damaged` removes those as well.
        """
        self._recent.take(name)
        with self._transaction("delete_agent", "FULL"):
            changes = self._db.total_changes
            self._db.execute(_DISOWN, (name,))
            self._remove(name, is_damaged=is_damaged)
            if self._db.total_changes > changes:
                self._db.execute("INSERT OR IGNORE INTO chores (chore) VALUES (?)", (_SCRUB,))
        if scrub and self.needs_scrub:
            self.scrub()

    def _remove(self, name: str, *, is_damaged: bool) -> None:
        self._db.execute("DELETE FROM agents WHERE name = ?", (name,))
        for orphans in _ORPHANS if is_damaged else ():
            self._db.execute(orphans)

    @property
    def needs_scrub(self) -> bool:
        """Whether traces of deleted agents may be left, which the file remembers."""
        with translated(self.path, "needs_scrub"):
            query = "SELECT 1 FROM chores WHERE chore = ?"
            return self._db.execute(query, (_SCRUB,)).fetchone() is not None

    def scrub(self) -> None:
        """Write the file anew, so that it and its log have nothing but the rows that are there."""
        # secure_delete overwrites a deleted row, but not the copies that SQLite (3.40) leaves in
        # the unused middle of a page when it moves rows to another. Only VACUUM ends those.
        with translated(self.path, "scrub"):
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.execute("VACUUM")
        self._empty_log("scrub")
        with self._transaction("scrub", "FULL"):
            self._db.execute("DELETE FROM chores WHERE chore = ?", (_SCRUB,))

    def probe(self) -> None:
        """Write and remove a row as a commit would. Raises CatalogUnavailable."""
        for query in (
            "INSERT OR IGNORE INTO chores (chore) VALUES (?)",
            "DELETE FROM chores WHERE chore = ?",
        ):
            with self._transaction("probe", "FULL"):
                self._db.execute(query, (_PROBE,))

    # -- records ---------------------------------------------------------------------------------

    def add_records(self, rows: Iterable[RecordRow]) -> None:
        """Add records in one transaction that is not synced. Known ones are replaced."""
        rows = list(rows)
        if not rows:
            return
        new_families = self._new_families(rows)
        families = self._families | new_families
        ids = {family.root: family_id for family_id, family in families.items()}
        with self._transaction("add_records", "NORMAL"):
            self._db.executemany(_ADD_FAMILY, sealed(starmap(_family_row, new_families.items())))
            self._db.executemany(
                _PUT_RECORD,
                sealed((*row[:6], ids[row.family.root], row.file_bytes, row.maker) for row in rows),
            )
        self._families = families

    def remove_records(self, hashes: Iterable[BlockHash]) -> None:
        """Remove records in one transaction that is not synced. Unknown ones are ignored."""
        rows = [(record_hash,) for record_hash in hashes]
        if not rows:
            return
        with self._transaction("remove_records", "NORMAL"):
            self._db.executemany("DELETE FROM records WHERE hash = ?", rows)

    def load_records(self) -> list[RecordRow]:
        """Return all records in the order of their creation, and drop damaged rows.

        Files of dropped rows are found again. Raises CatalogCorrupt for a damaged page.
        """
        families = self._families
        rows: list[RecordRow] = []
        damaged: list[int] = []
        with self._bulk_read("load_records"):
            for (
                created,
                h,
                before,
                parent,
                depth,
                start,
                stop,
                kin,
                size,
                maker,
                seal,
            ) in self._db.execute(_RECORDS):
                family = families.get(kin)
                sum_ = seal_of(h, before, parent, depth, start, stop, kin, size, maker)
                if family is None or sum_ != seal:
                    damaged.append(created)
                    continue
                rows.append(RecordRow(h, before, parent, depth, start, stop, family, size, maker))
        self._drop_damaged(damaged)
        return rows

    def _drop_damaged(self, records: Sequence[int]) -> None:
        """Drop damaged rows; a disk that refuses leaves them for another time."""
        with self._snapshot("load_records"):
            ids = {row[0] for row in self._db.execute("SELECT family FROM families")}
        families = [(family_id,) for family_id in ids - self._families.keys()]
        if not records and not families:
            return
        log.error(
            "%d damaged rows about records and %d about their families are dropped; the records "
            "are found again by their files",
            len(records),
            len(families),
        )
        with suppress(CatalogUnavailable), self._transaction("load_records", "NORMAL"):
            rows = [(created,) for created in records]
            self._db.executemany("DELETE FROM records WHERE created = ?", rows)
            self._db.executemany("DELETE FROM families WHERE family = ?", families)

    def begin_records_anew(self) -> None:
        """Empty the tables about KV, where a page of them is damaged."""
        with self._transaction("begin_records_anew", "NORMAL"):
            schema.begin_anew(self._db, ("records", "families", "line_blocks"))
        self._families = {}
        self._recent = RecentAgents()

    def load_usage(self) -> BlockUsage:
        """Return how many lines use which blocks, stored or not."""
        with self._bulk_read("load_usage"):
            age_of = {row[0]: row[7] for row in sound(self._db.execute(select("lines")))}
            users = self._db.execute(_USERS).fetchall()
            num_lines = Counter(block_hash for block_hash, _ in users)
            last_used: dict[BlockHash, int] = {}
            for block_hash, line in users:
                age = age_of.get(line, 0)
                if age > last_used.get(block_hash, 0):
                    last_used[block_hash] = age
        return BlockUsage(num_lines, last_used)

    def namespaces(self) -> set[str]:
        """Return the namespaces of all lines."""
        with translated(self.path, "namespaces"):
            rows = self._db.execute("SELECT DISTINCT namespace FROM lines").fetchall()
        return {namespace for (namespace,) in rows}

    def clock(self) -> int:
        """Return the latest `last_used` of any line; 0 without lines."""
        with translated(self.path, "clock"):
            rows = sound(self._db.execute(select("lines")))
            return max((int(row[7]) for row in rows), default=0)

    def check(self) -> None:
        """Raise InvariantBroken unless the tables agree with one another and with memory."""
        with self._snapshot("check"):
            check_tables(self._db)
            for agent in self._recent:
                stored = read_agent(self._db, agent.state.agent_id)
                if stored is None or stored.state != agent.state:
                    raise InvariantBroken(
                        f"{self!r}: {agent.state.agent_id!r} is not as remembered"
                    )

    # -- inside ----------------------------------------------------------------------------------

    @contextmanager
    def _transaction(self, operation: str, synchronous: Synchronous) -> Iterator[None]:
        """Commit what the block does, all or nothing; the connection is ready for the next then."""
        with translated(self.path, operation):
            self._db.execute(f"PRAGMA synchronous={synchronous}")
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            finally:
                self._end_transaction()

    @contextmanager
    def _bulk_read(self, operation: str) -> Iterator[None]:
        """Translate errors of reading some 100,000 rows, with the garbage collector off."""
        with translated(self.path, operation), without_gc():
            yield

    def _empty_log(self, operation: str) -> None:
        with translated(self.path, operation):
            busy, *_ = self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        if busy:
            raise CatalogUnavailable(
                self.path,
                operation=operation,
                message="a reader kept the write-ahead log from being emptied",
                errorname="SQLITE_BUSY",
            )

    def _read_ids(self) -> RowIds:
        query = """
            SELECT (SELECT max(agent) FROM agents WHERE agent < ?),
                (SELECT max(line) FROM lines WHERE line < ?)
        """
        last_agent, last_line = self._db.execute(query, (_MAX_ID, _MAX_ID)).fetchone()
        return RowIds(last_agent=last_agent or 0, last_line=last_line or 0)

    def _read_families(self) -> dict[int, KVFamily]:
        """Return the sound families by their row ids."""
        families: dict[int, KVFamily] = {}
        for row in sound(self._db.execute(select("families"))):
            family_id, fingerprint, layout, lineage, namespace = row
            with suppress(*UNREADABLE):
                layers = decode_layout(layout)
                families[family_id] = KVFamily(fingerprint, layers, lineage, namespace)
        return families

    def _new_families(self, rows: Iterable[RecordRow]) -> dict[int, KVFamily]:
        known = {family.root for family in self._families.values()}
        new = {row.family.root: row.family for row in rows if row.family.root not in known}
        return dict(enumerate(new.values(), max(self._families, default=0) + 1))


def _family_row(family_id: int, family: KVFamily) -> tuple[int, str, str, str, str]:
    layout = encode_layout(family.layout)
    return family_id, family.fingerprint, layout, family.lineage, family.namespace
