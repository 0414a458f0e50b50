"""Seals: each row of the catalogue carries a checksum of its columns, because SQLite has none.

A row whose seal is wrong counts as not there, and what reads it says what is missing. Block tables
have no seals: they say which line uses which record, and are written anew when they differ.
"""

import sqlite3
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Any

from xxhash import xxh3_64_intdigest

COLUMNS = {
    "agents": (
        "agent, name, pinned, priority, quota_bytes, policy, overflow, model, has_fixed_main, "
        "num_lines"
    ),
    "lines": ("line, agent, number, tokenizer, head, num_tokens, num_turns, last_used, namespace"),
    "spans": "line, position, text, token_ids, is_whole, is_special",
    "messages": "line, node, parent, json",
    "turns": "line, position, num_tokens, head, receipt",
    "families": "family, fingerprint, layout, lineage, namespace",
    "records": "hash, before, parent, depth, start, stop, family, file_bytes, maker",
}
"""The columns that a row's seal covers, in this order."""

Row = tuple[Any, ...]


def seal_of(*values: object) -> int:
    """Return a signed 64-bit checksum of a row, in which the values' types count as well."""
    # One formatting, because start-up looks at 100,000 rows: 1 us each, a fourth of joined parts.
    return xxh3_64_intdigest(_form_of(tuple(map(type, values))) % values) - (1 << 63)


@cache
def _form_of(types: tuple[type, ...]) -> bytes:
    """Return the format by which a row of these types is written for its seal."""
    return b"".join(map(_FORMS.__getitem__, types))


_FORMS = defaultdict(
    lambda: b"?%a;",  # what SQLite has and we never write
    {int: b"i%d;", bool: b"i%d;", str: b"s%a;", bytes: b"b%b;", type(None): b"-%.0a;"},
)


def sealed(rows: Iterable[Row]) -> list[Row]:
    """Return the rows, each with its seal behind it."""
    return [(*row, seal_of(*row)) for row in rows]


def sound(rows: Iterable[Row]) -> Iterator[Row]:
    """Yield the rows whose seal, their last column, is right, without the seal."""
    for *row, seal in rows:
        if seal_of(*row) == seal:
            yield tuple(row)


def select(table: str, rest: str = "") -> str:
    """Return a query for the table's sealed columns and the seal."""
    return f"SELECT {COLUMNS[table]}, seal FROM {table} {rest}"


def insert(table: str, *, replace: bool = True) -> str:
    """Return a statement that inserts sealed rows into the table."""
    columns = f"{COLUMNS[table]}, seal"
    marks = ", ".join("?" * (columns.count(",") + 1))
    verb = "INSERT OR REPLACE" if replace else "INSERT"
    return f"{verb} INTO {table} ({columns}) VALUES ({marks})"


def install(db: sqlite3.Connection) -> None:
    """Let statements of this connection use `seal_of`."""
    db.create_function("seal_of", -1, seal_of, deterministic=True)


def seal_all(db: sqlite3.Connection, tables: Sequence[str] = tuple(COLUMNS)) -> None:
    """Seal every row as it is, in a catalogue of a version without seals."""
    install(db)
    for table in tables:
        db.execute(f"UPDATE {table} SET seal = seal_of({COLUMNS[table]})")
