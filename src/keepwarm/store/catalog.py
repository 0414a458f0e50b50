"""The catalogue: agents as data, and which records of KV lie on disk, in one SQLite database.

Agents are durable when `commit` returns. Records are rows about files that may be lost: they
survive the process, and a power cut may take the last of them.
"""

import sqlite3
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import starmap
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from keepwarm.core.block import BlockHash
from keepwarm.core.errors import InvariantBroken
from keepwarm.core.stored import AgentState, AgentSummary, KVFamily
from keepwarm.store import schema
from keepwarm.store.bulk import without_gc
from keepwarm.store.catalog_check import check_tables
from keepwarm.store.catalog_errors import CatalogUnavailable
from keepwarm.store.catalog_load import (
    MainLine,
    decoding,
    read_agent,
    read_main_line,
    read_summaries,
)
from keepwarm.store.catalog_plan import CommittedAgent, RowIds, plan_commit
from keepwarm.store.catalog_rows import BlockUsage, RecordRow, decode_layout, encode_layout
from keepwarm.store.schema import set_aside, translated

__all__ = ["Catalog", "CatalogReader", "RecordRow", "set_aside"]

Synchronous = Literal["FULL", "NORMAL"]

MAX_RECENT_AGENTS = 256
MAX_RECENT_TOKENS = 2_000_000
"""About 80 MB where nobody else holds the states."""

_RECORD_COLUMNS = "hash, before, parent, depth, start, stop, family, file_bytes, maker"
_PUT_RECORD = f"INSERT OR REPLACE INTO records ({_RECORD_COLUMNS}) VALUES (?,?,?,?,?,?,?,?,?)"
_SCRUB = "scrub"
_PROBE = "probe"
_ADD_FAMILY = """
    INSERT INTO families (family, fingerprint, layout, lineage, namespace) VALUES (?, ?, ?, ?, ?)
"""


class _Connection:
    """What both connections can do. Each belongs to the thread that opened it; SQLite checks."""

    def __init__(self, path: Path, db: sqlite3.Connection) -> None:
        self.path = path
        self._db = db

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._db.close()

    def names(self) -> list[str]:
        with translated(self.path, "names"):
            return [name for (name,) in self._db.execute("SELECT name FROM agents ORDER BY name")]

    def summaries(self) -> list[AgentSummary]:
        """All agents by name. Tokens and turns are those of the main line."""
        with translated(self.path, "summaries"):
            return read_summaries(self._db)

    def models(self) -> dict[str, str]:
        """By agent, the model that it talked to last."""
        with translated(self.path, "models"):
            return dict(self._db.execute("SELECT name, model FROM agents"))

    def main_line(self, name: str) -> MainLine | None:
        """As far as its KV is looked up by it. Raises CatalogCorrupt."""
        with self._snapshot("main_line"):
            return read_main_line(self._db, self.path, name)

    def load_agent(self, name: str) -> AgentState | None:
        """What was committed last, equal to it. Raises CatalogCorrupt."""
        with self._snapshot("load_agent"):
            found = read_agent(self._db, self.path, name)
        return None if found is None else found.state

    def load_pinned(self) -> list[AgentState]:
        """The pinned agents."""
        with translated(self.path, "load_pinned"):
            names = self._db.execute(
                "SELECT name FROM agents WHERE pinned ORDER BY name"
            ).fetchall()
        states = [self.load_agent(name) for (name,) in names]
        return [state for state in states if state is not None]

    def size_bytes(self) -> int:
        """What the database, its log and its index take on disk."""
        return schema.size_bytes(self.path)

    @contextmanager
    def _snapshot(self, operation: str) -> Iterator[None]:
        """Everything read inside is of one moment."""
        with translated(self.path, operation):
            self._db.execute("BEGIN")
            try:
                yield
            finally:
                self._end_transaction()

    def _end_transaction(self) -> None:
        """Undo what was not committed; after some errors SQLite has done so itself."""
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")


class CatalogReader(_Connection):
    """Reads beside the catalogue's owner, and sees what that has committed. It cannot write."""

    def __repr__(self) -> str:
        return f"CatalogReader({str(self.path)!r})"

    @classmethod
    def open(cls, path: Path) -> "CatalogReader":
        """Of a catalogue that is open. Raises CatalogCorrupt, CatalogTooNew, CatalogUnavailable."""
        return cls(path, schema.open_for_reading(path))


class Catalog(_Connection):
    """The one connection that writes. It remembers what it committed, and writes only what is new.

    Nobody else may write to the file meanwhile; a state that was committed must not be changed.
    """

    def __init__(self, path: Path, db: sqlite3.Connection) -> None:
        super().__init__(path, db)
        self._recent = _RecentAgents()
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

        Raises CatalogUnavailable, and then nothing of it is kept; UnstorableMessage.
        """
        known = self._recent.take(state.agent_id) or self._read_committed(state.agent_id)
        plan = plan_commit(known, state, self._ids)
        if plan.writes:
            with self._transaction("commit", "FULL"):
                for write in plan.writes:
                    self._db.executemany(write.sql, write.rows)
        self._recent.put(plan.committed)

    def delete_agent(self, name: str, *, scrub: bool = True) -> None:
        """Remove every trace of the agent. Its records stay, as nobody's.

        Without `scrub`, which takes as long as copying the whole file, traces stay until it is
        called. After CatalogUnavailable a second call finishes the work.
        """
        self._recent.take(name)
        with self._transaction("delete_agent", "FULL"):
            changes = self._db.total_changes
            self._db.execute("UPDATE records SET maker = NULL WHERE maker = ?", (name,))
            self._db.execute("DELETE FROM agents WHERE name = ?", (name,))
            if self._db.total_changes > changes:
                self._db.execute("INSERT OR IGNORE INTO chores (chore) VALUES (?)", (_SCRUB,))
        if scrub and self.needs_scrub:
            self.scrub()

    @property
    def needs_scrub(self) -> bool:
        """Whether traces of deleted agents may be left; it is remembered in the file."""
        with translated(self.path, "needs_scrub"):
            query = "SELECT 1 FROM chores WHERE chore = ?"
            return self._db.execute(query, (_SCRUB,)).fetchone() is not None

    def scrub(self) -> None:
        """Leave nothing in the file and its log but the rows that are there."""
        # secure_delete overwrites a deleted row, but not the copies that SQLite (3.40) leaves in
        # the unused middle of a page when it moves rows to another. Only VACUUM ends those.
        with translated(self.path, "scrub"):
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.execute("VACUUM")
        self._empty_log("scrub")
        with self._transaction("scrub", "FULL"):
            self._db.execute("DELETE FROM chores WHERE chore = ?", (_SCRUB,))

    def probe(self) -> None:
        """Whether the disk would take a commit. Raises CatalogUnavailable where it does not."""
        for query in (
            "INSERT OR IGNORE INTO chores (chore) VALUES (?)",
            "DELETE FROM chores WHERE chore = ?",
        ):
            with self._transaction("probe", "FULL"):
                self._db.execute(query, (_PROBE,))

    # -- records ---------------------------------------------------------------------------------

    def add_records(self, rows: Iterable[RecordRow]) -> None:
        """In one transaction that is not synced. A record that is known already is replaced."""
        rows = list(rows)
        if not rows:
            return
        new_families = self._new_families(rows)
        families = self._families | new_families
        ids = {family.root: family_id for family_id, family in families.items()}
        with self._transaction("add_records", "NORMAL"):
            self._db.executemany(_ADD_FAMILY, starmap(_family_row, new_families.items()))
            self._db.executemany(
                _PUT_RECORD,
                ((*row[:6], ids[row.family.root], row.file_bytes, row.maker) for row in rows),
            )
        self._families = families

    def remove_records(self, hashes: Iterable[BlockHash]) -> None:
        """In one transaction that is not synced. What is not known is ignored."""
        rows = [(record_hash,) for record_hash in hashes]
        if not rows:
            return
        with self._transaction("remove_records", "NORMAL"):
            self._db.executemany("DELETE FROM records WHERE hash = ?", rows)

    def load_records(self) -> list[RecordRow]:
        """All records in the order of their creation."""
        families = self._families
        with self._bulk_read("load_records"), decoding(self.path, "a record"):
            return [
                RecordRow(h, before, parent, depth, start, stop, families[family], size, maker)
                for h, before, parent, depth, start, stop, family, size, maker in self._db.execute(
                    f"SELECT {_RECORD_COLUMNS} FROM records ORDER BY created"
                )
            ]

    def load_usage(self) -> BlockUsage:
        """Who uses which blocks, stored or not."""
        with self._bulk_read("load_usage"):
            age_of = dict(self._db.execute("SELECT line, last_used FROM lines"))
            users = self._db.execute("SELECT hash, line FROM line_blocks").fetchall()
            num_lines = Counter(block_hash for block_hash, _ in users)
            last_used: dict[BlockHash, int] = {}
            for block_hash, line in users:
                if age_of[line] > last_used.get(block_hash, 0):
                    last_used[block_hash] = age_of[line]
        return BlockUsage(num_lines, last_used)

    def namespaces(self) -> set[str]:
        """Those of all lines."""
        with translated(self.path, "namespaces"):
            rows = self._db.execute("SELECT DISTINCT namespace FROM lines").fetchall()
        return {namespace for (namespace,) in rows}

    def clock(self) -> int:
        """The latest `last_used` of any line; 0 without lines."""
        with translated(self.path, "clock"):
            query = "SELECT coalesce(max(last_used), 0) FROM lines"
            return int(self._db.execute(query).fetchone()[0])

    def check(self) -> None:
        """The tables agree with one another, and with what is remembered of them."""
        with self._snapshot("check"):
            check_tables(self._db)
            for agent in self._recent:
                stored = read_agent(self._db, self.path, agent.state.agent_id)
                if stored is None or stored.state != agent.state:
                    raise InvariantBroken(
                        f"{self!r}: {agent.state.agent_id!r} is not as remembered"
                    )

    # -- inside ----------------------------------------------------------------------------------

    @contextmanager
    def _transaction(self, operation: str, synchronous: Synchronous) -> Iterator[None]:
        """All of it or nothing, and afterwards the connection is ready for the next."""
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
        """Of some 100,000 rows."""
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

    def _read_committed(self, name: str) -> CommittedAgent | None:
        with self._snapshot("commit"):
            return read_agent(self._db, self.path, name)

    def _read_ids(self) -> RowIds:
        query = "SELECT (SELECT max(agent) FROM agents), (SELECT max(line) FROM lines)"
        last_agent, last_line = self._db.execute(query).fetchone()
        return RowIds(last_agent=last_agent or 0, last_line=last_line or 0)

    def _read_families(self) -> dict[int, KVFamily]:
        rows = self._db.execute(
            "SELECT family, fingerprint, layout, lineage, namespace FROM families"
        )
        with decoding(self.path, "a family"):
            return {
                family_id: KVFamily(fingerprint, decode_layout(layout), lineage, namespace)
                for family_id, fingerprint, layout, lineage, namespace in rows
            }

    def _new_families(self, rows: Iterable[RecordRow]) -> dict[int, KVFamily]:
        known = {family.root for family in self._families.values()}
        new = {row.family.root: row.family for row in rows if row.family.root not in known}
        return dict(enumerate(new.values(), max(self._families, default=0) + 1))


def _family_row(family_id: int, family: KVFamily) -> tuple[int, str, str, str, str]:
    layout = encode_layout(family.layout)
    return family_id, family.fingerprint, layout, family.lineage, family.namespace


class _RecentAgents:
    """What was committed last of the agents that were committed last, within two limits."""

    def __init__(self) -> None:
        self._agents: OrderedDict[str, CommittedAgent] = OrderedDict()
        self._num_tokens: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._agents)

    def __iter__(self) -> Iterator[CommittedAgent]:
        return iter(self._agents.values())

    def take(self, name: str) -> CommittedAgent | None:
        """Hand it out and forget it: a commit that fails leaves nothing to believe."""
        self._num_tokens.pop(name, None)
        return self._agents.pop(name, None)

    def put(self, agent: CommittedAgent) -> None:
        """As the latest; the longest unused leave, but never this one."""
        self._agents[agent.state.agent_id] = agent
        self._num_tokens[agent.state.agent_id] = agent.num_tokens
        while len(self._agents) > 1 and self._is_too_large():
            self.take(next(iter(self._agents)))

    def _is_too_large(self) -> bool:
        num_tokens = sum(self._num_tokens.values())
        return len(self._agents) > MAX_RECENT_AGENTS or num_tokens > MAX_RECENT_TOKENS
