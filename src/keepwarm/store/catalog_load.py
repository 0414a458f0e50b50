"""An agent as the catalogue holds it, read back from its rows."""

import sqlite3
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keepwarm.core.block import BlockHash, root_hash
from keepwarm.core.layout import BLOCK_TOKENS
from keepwarm.core.stored import AgentSettings, AgentState, AgentSummary, LineState, Overflow
from keepwarm.core.transcript import Span, Transcript, Turn
from keepwarm.store.catalog_errors import CatalogCorrupt
from keepwarm.store.catalog_plan import CommittedAgent, CommittedLine, Head, MessageTree
from keepwarm.store.catalog_rows import decode_ids, decode_message, decode_receipt, span_of_row

_SUMMARIES = """
    SELECT name, model, pinned, priority, quota_bytes, policy, overflow,
        coalesce(max(CASE number WHEN 0 THEN num_tokens END), 0),
        coalesce(max(CASE number WHEN 0 THEN num_turns END), 0),
        count(DISTINCT number), coalesce(max(last_used), 0),
        coalesce(max(CASE number WHEN 0 THEN namespace GLOB 'import:*' END), 0)
    FROM agents LEFT JOIN lines USING (agent) GROUP BY agents.agent ORDER BY name
"""


_MAIN_LINE = """
    SELECT line, num_tokens, lines.namespace FROM lines JOIN agents USING (agent)
    WHERE name = ? AND number = 0 ORDER BY last_used DESC LIMIT 1
"""
_FAMILIES = "SELECT fingerprint, lineage FROM families WHERE namespace = ?"


@dataclass(frozen=True, slots=True)
class MainLine:
    """What names a main line's KV: its whole blocks, and the ids behind them.

    `roots` are those that it may begin with: the store does not know its model.
    """

    block_hashes: tuple[BlockHash, ...]
    tail_ids: tuple[int, ...]
    roots: tuple[BlockHash, ...]


def read_main_line(db: sqlite3.Connection, path: Path, name: str) -> MainLine | None:
    """Of the tokenizer that it was used in last; inside a transaction. Raises CatalogCorrupt."""
    found = db.execute(_MAIN_LINE, (name,)).fetchone()
    if found is None:
        return None
    line_id, num_tokens, namespace = found
    with decoding(path, f"the main line of agent {name!r}"):
        return MainLine(
            _read_blocks(db, line_id),
            _read_last_ids(db, line_id, num_tokens % BLOCK_TOKENS),
            tuple(
                root_hash(fingerprint=fingerprint, lineage=lineage, namespace=namespace)
                for fingerprint, lineage in db.execute(_FAMILIES, (namespace,))
            ),
        )


def read_agent(db: sqlite3.Connection, path: Path, name: str) -> CommittedAgent | None:
    """Inside a transaction, so that all rows are of one commit. Raises CatalogCorrupt."""
    found = db.execute(
        "SELECT agent, model, has_fixed_main, pinned, priority, quota_bytes, policy, overflow"
        " FROM agents WHERE name = ?",
        (name,),
    ).fetchone()
    if found is None:
        return None
    agent_row, model, has_fixed_main, *settings = found
    with decoding(path, f"the rows of agent {name!r}"):
        lines = list(_read_lines(db, agent_row))
        states = tuple(line.state for line in lines)
        state = AgentState(name, _settings(*settings), states, model, bool(has_fixed_main))
    return CommittedAgent(agent_row, state, {line.state.key: line for line in lines})


def read_summaries(db: sqlite3.Connection) -> list[AgentSummary]:
    return [_summary(row) for row in db.execute(_SUMMARIES)]


def _summary(row: tuple[Any, ...]) -> AgentSummary:
    name, model, pinned, priority, quota_bytes, policy, overflow, *numbers, is_private = row
    num_tokens, num_turns, num_lines, last_used = numbers
    return AgentSummary(
        agent_id=name,
        settings=_settings(pinned, priority, quota_bytes, policy, overflow),
        num_tokens=num_tokens,
        num_turns=num_turns,
        num_lines=num_lines,
        last_used=last_used,
        is_private=bool(is_private),
        model=model,
    )


@contextmanager
def decoding(path: Path, what: str) -> Iterator[None]:
    """Values that nobody can have written mean a damaged file: SQLite has no checksums."""
    try:
        yield
    except (ValueError, LookupError, TypeError, struct.error) as error:
        raise CatalogCorrupt(path, f"{what} cannot be decoded: {error!r}") from error


def _settings(
    pinned: int, priority: int, quota_bytes: int | None, policy: str, overflow: str
) -> AgentSettings:
    return AgentSettings(bool(pinned), priority, quota_bytes, policy, Overflow(overflow))


def _read_lines(db: sqlite3.Connection, agent_row: int) -> Iterator[CommittedLine]:
    rows = db.execute(
        "SELECT line, number, tokenizer, head, last_used, namespace FROM lines WHERE agent = ?"
        " ORDER BY number, tokenizer",
        (agent_row,),
    ).fetchall()
    for line_id, number, tokenizer, head, last_used, namespace in rows:
        tree = _read_tree(db, line_id)
        turn_rows = _read_turns(db, line_id)
        for turn_head in (*(turn_head for _, turn_head, _ in turn_rows), head):
            tree.hold_stored(turn_head)
        conversation = tree.conversations()
        state = LineState(
            number=number,
            tokenizer=tokenizer,
            transcript=_read_transcript(db, line_id),
            turns=tuple(
                Turn(num_tokens, conversation(turn_head), decode_receipt(receipt))
                for num_tokens, turn_head, receipt in turn_rows
            ),
            messages=conversation(head),
            block_hashes=_read_blocks(db, line_id),
            last_used=last_used,
            namespace=namespace,
        )
        yield CommittedLine(line_id, state, tree, head, [h for _, h, _ in turn_rows])


def _read_tree(db: sqlite3.Connection, line_id: int) -> MessageTree:
    tree = MessageTree()
    for node, parent, data in db.execute(
        "SELECT node, parent, json FROM messages WHERE line = ? ORDER BY node", (line_id,)
    ):
        tree.load(node, parent, decode_message(data))
    return tree


def _read_turns(db: sqlite3.Connection, line_id: int) -> list[tuple[int, Head, bytes | None]]:
    return db.execute(
        "SELECT num_tokens, head, receipt FROM turns WHERE line = ? ORDER BY position", (line_id,)
    ).fetchall()


def _read_transcript(db: sqlite3.Connection, line_id: int) -> Transcript:
    rows = db.execute(
        "SELECT text, token_ids, is_whole, is_special FROM spans WHERE line = ? ORDER BY position",
        (line_id,),
    )
    spans: list[Span] = [span_of_row(*row) for row in rows]
    return Transcript(tuple(spans))


def _read_last_ids(db: sqlite3.Connection, line_id: int, number: int) -> tuple[int, ...]:
    """The line's last token ids, so many of them."""
    rows = db.execute(
        "SELECT token_ids FROM spans WHERE line = ? ORDER BY position DESC", (line_id,)
    )
    last: tuple[int, ...] = ()
    for (data,) in rows if number else ():
        last = (*decode_ids(data), *last)
        if len(last) >= number:
            break
    return last[len(last) - number :]


def _read_blocks(db: sqlite3.Connection, line_id: int) -> tuple[BlockHash, ...]:
    rows = db.execute("SELECT hash FROM line_blocks WHERE line = ? ORDER BY depth", (line_id,))
    return tuple(BlockHash(block_hash) for (block_hash,) in rows)
