"""Reading the catalogue: what its owner and the engines' thread can both ask of it."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from keepwarm.core.errors import DamagedAgent
from keepwarm.core.stored import AgentState, AgentSummary
from keepwarm.store.catalog import schema
from keepwarm.store.catalog.errors import CatalogCorrupt
from keepwarm.store.catalog.load import (
    MainLine,
    find_damaged,
    read_agent,
    read_main_line,
    read_summaries,
)
from keepwarm.store.catalog.plan import CommittedAgent
from keepwarm.store.catalog.salvage import salvage
from keepwarm.store.catalog.schema import translated


class CatalogConnection:
    """Reads a catalogue. A connection belongs to the thread that opened it, which SQLite checks."""

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
        """Return all agents by name. Tokens and turns are those of the main line."""
        with translated(self.path, "summaries"):
            return read_summaries(self._db)

    def models(self) -> dict[str, str]:
        """Return the model that each agent talked to last."""
        with translated(self.path, "models"):
            return dict(self._db.execute("SELECT name, model FROM agents"))

    def main_line(self, name: str) -> MainLine | None:
        """Return what a main line's KV is looked up by. Raises DamagedAgent."""
        try:
            with self._snapshot("main_line"):
                return read_main_line(self._db, name)
        except CatalogCorrupt as error:
            raise DamagedAgent(name, error.problem) from error

    def load_agent(self, name: str) -> AgentState | None:
        """Return a state equal to the one committed last. Raises DamagedAgent."""
        found = self._read(name, "load_agent")
        return None if found is None else found.state

    def salvage_agent(self, name: str) -> AgentState:
        """Return what can be read of a damaged agent. Raises DamagedAgent where that is nothing."""
        with self._snapshot("salvage_agent"):
            return salvage(self._db, name)

    def _read(self, name: str, operation: str) -> CommittedAgent | None:
        """Read an agent. A damaged page is a damage of the agents whose rows are on it."""
        try:
            with self._snapshot(operation):
                return read_agent(self._db, name)
        except CatalogCorrupt as error:
            raise DamagedAgent(name, error.problem) from error

    def find_damaged(self) -> dict[str, str]:
        """Return the agents that are known to be damaged without reading them whole, and why."""
        with self._snapshot("find_damaged"):
            return find_damaged(self._db)

    def load_pinned(self, damaged: dict[str, str]) -> list[AgentState]:
        """Return the pinned agents. Those that cannot be read are added to `damaged`."""
        with translated(self.path, "load_pinned"):
            names = self._db.execute(
                "SELECT name FROM agents WHERE pinned ORDER BY name"
            ).fetchall()
        states: list[AgentState] = []
        for (name,) in names:
            try:
                state = self.load_agent(name)
            except DamagedAgent as error:
                damaged.setdefault(name, error.problem)
            else:
                states += [] if state is None else [state]
        return states

    def size_bytes(self) -> int:
        """Return the bytes that the database, its log and its index take on disk."""
        return schema.size_bytes(self.path)

    @contextmanager
    def _snapshot(self, operation: str) -> Iterator[None]:
        """Read everything inside the block as of one moment."""
        with translated(self.path, operation):
            self._db.execute("BEGIN")
            try:
                yield
            finally:
                self._end_transaction()

    def _end_transaction(self) -> None:
        """Undo what was not committed. After some errors SQLite has done so itself."""
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")


class CatalogReader(CatalogConnection):
    """Reads beside the catalogue's owner, and sees what that has committed. It cannot write."""

    def __repr__(self) -> str:
        return f"CatalogReader({str(self.path)!r})"

    @classmethod
    def open(cls, path: Path) -> "CatalogReader":
        """Open a second connection to a catalogue that is open.

        Raises CatalogCorrupt, CatalogTooNew and CatalogUnavailable.
        """
        return cls(path, schema.open_for_reading(path))
