"""Rescue of the agents in a catalogue that cannot be used as a whole."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

from keepwarm.core.errors import DamagedAgent
from keepwarm.store.catalog import schema
from keepwarm.store.catalog.catalog import Catalog
from keepwarm.store.catalog.errors import CatalogUnavailable
from keepwarm.store.catalog.load import read_agent

DAMAGE = (sqlite3.DatabaseError, UnicodeDecodeError)
"""Errors of SQLite for a damaged page, and for a complaint that quotes one."""

Place = tuple[int, str]
"""An agent's row and its name."""


@dataclass(frozen=True, slots=True)
class Rescued:
    """How many agents were taken over, and how many are known not to be."""

    num_agents: int = 0
    num_lost: int = 0
    is_complete: bool = False
    """Whether all of the agents' names could be read."""

    def __str__(self) -> str:
        if not self.num_agents and not self.num_lost:
            return "no agent could be read of it"
        others = "" if self.is_complete else ", and there may have been others"
        return f"{self.num_agents} agents were taken over, {self.num_lost} are lost{others}"


def rescue(moved: Path, catalog: Catalog) -> Rescued:
    """Commit every agent that can be read whole of the catalogue that was moved to the new one.

    Nothing is read of a catalogue of another version, or of what is none.
    """
    if not moved.exists():
        return Rescued()
    try:
        with closing(schema.open_damaged(moved)) as db:
            return _rescue(db, catalog) if schema.is_current(db) else Rescued()
    except DAMAGE:
        return Rescued()


def _rescue(db: sqlite3.Connection, catalog: Catalog) -> Rescued:
    names, is_complete = _names(db)
    num_agents = 0
    for name in names:
        with suppress(DamagedAgent, CatalogUnavailable, *DAMAGE):
            found = read_agent(db, name)
            if found is not None:
                catalog.commit(found.state)
                num_agents += 1
    return Rescued(num_agents, len(names) - num_agents, is_complete)


def _names(db: sqlite3.Connection) -> tuple[list[str], bool]:
    """Read the names from both ends, because a page in the middle may be damaged.

    Returns whether that was all of them as well.
    """
    first = list(_until_damage(db, "agent > ? ORDER BY agent", -1))
    names = [name for place in first if (name := place[1])]
    if first and first[-1] == (_END, ""):
        return names, True
    last = _until_damage(db, "agent < ? ORDER BY agent DESC", _END)
    return [*names, *(name for _, name in last if name and name not in names)], False


_END = 1 << 62


def _until_damage(db: sqlite3.Connection, which: str, place: int) -> Iterator[Place]:
    """Yield one row after the other, and (_END, "") behind the last one if that is reached."""
    query = f"SELECT agent, name FROM agents WHERE {which} LIMIT 1"
    try:
        while (row := db.execute(query, (place,)).fetchone()) is not None:
            yield row
            place = row[0]
        yield _END, ""
    except DAMAGE:
        return
