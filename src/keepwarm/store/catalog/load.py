"""An agent as the catalogue holds it, read back from its rows; and which agents cannot be read."""

import sqlite3
import struct
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from keepwarm.core.block import BlockHash, root_hash
from keepwarm.core.errors import DamagedAgent
from keepwarm.core.layout import BLOCK_TOKENS
from keepwarm.core.stored import AgentSettings, AgentState, AgentSummary, LineState, Overflow
from keepwarm.core.transcript import Span, Transcript, Turn
from keepwarm.store.catalog.plan import CommittedAgent, CommittedLine, Head, MessageTree
from keepwarm.store.catalog.rows import decode_ids, decode_message, decode_receipt, span_of_row
from keepwarm.store.catalog.seals import Row, select, sound

UNREADABLE = (ValueError, LookupError, TypeError, OverflowError, RecursionError, struct.error)
"""Errors of decoding values that cannot have been written."""

_SUMMARIES = """
    SELECT name, model, pinned, priority, quota_bytes, policy, overflow,
        coalesce(max(CASE number WHEN 0 THEN num_tokens END), 0),
        coalesce(max(CASE number WHEN 0 THEN num_turns END), 0),
        count(DISTINCT number), coalesce(max(last_used), 0),
        coalesce(max(CASE number WHEN 0 THEN namespace GLOB 'import:*' END), 0)
    FROM agents LEFT JOIN lines USING (agent) GROUP BY agents.agent ORDER BY name
"""
_BLOCKS = """
    SELECT hash FROM line_blocks
    WHERE line = ? AND typeof(hash) = 'blob' AND length(hash) = 32 ORDER BY depth
"""


_MAIN_LINE = """
    SELECT line, num_tokens, lines.namespace FROM lines JOIN agents USING (agent)
    WHERE name = ? AND number = 0 ORDER BY last_used DESC LIMIT 1
"""
_FAMILIES = "SELECT fingerprint, lineage FROM families WHERE namespace = ?"


@dataclass(frozen=True, slots=True)
class MainLine:
    """The names of a main line's KV: its whole blocks, and the ids behind them.

    It begins with one of `roots`: the store does not know its model.
    """

    block_hashes: tuple[BlockHash, ...]
    tail_ids: tuple[int, ...]
    roots: tuple[BlockHash, ...]


def read_main_line(db: sqlite3.Connection, name: str) -> MainLine | None:
    """Read the main line in the tokenizer that it was used in last; inside a transaction.

    Raises DamagedAgent.
    """
    found = db.execute(_MAIN_LINE, (name,)).fetchone()
    if found is None:
        return None
    line_id, num_tokens, namespace = found
    with _reading(name):
        return MainLine(
            read_blocks(db, line_id),
            _read_last_ids(db, line_id, num_tokens % BLOCK_TOKENS),
            tuple(
                root_hash(fingerprint=fingerprint, lineage=lineage, namespace=namespace)
                for fingerprint, lineage in db.execute(_FAMILIES, (namespace,))
            ),
        )


def read_agent(db: sqlite3.Connection, name: str) -> CommittedAgent | None:
    """Read an agent inside a transaction, so that all rows are of one commit.

    Raises DamagedAgent.
    """
    found = db.execute(select("agents", "WHERE name = ?"), (name,)).fetchone()
    if found is None:
        return None
    with _reading(name):
        return _read_agent(db, _only(found))


def find_damaged(db: sqlite3.Connection) -> dict[str, str]:
    """Return the agents whose own row, or a line's, is damaged or missing, and what is wrong.

    What lies below the lines is checked when an agent is read.
    """
    num_lines = Counter(row[1] for row in sound(db.execute(select("lines"))))
    damaged: dict[str, str] = {}
    for row in db.execute(select("agents")):
        name = row[1]
        try:
            agent_row, *_, expected = _only(row)
            _require(num_lines[agent_row] == expected, "one of its lines is damaged or missing")
        except UNREADABLE as error:
            damaged[name] = str(error)
    return damaged


def read_summaries(db: sqlite3.Connection) -> list[AgentSummary]:
    return [_summary(row) for row in db.execute(_SUMMARIES)]


def damaged_summary(name: str, problem: str) -> AgentSummary:
    """Return the summary of an agent that cannot be read."""
    return AgentSummary(name, AgentSettings(), 0, 0, 1, 0, damage=problem)


def _summary(row: Row) -> AgentSummary:
    name, model, pinned, priority, quota_bytes, policy, overflow, *numbers, is_private = row
    num_tokens, num_turns, num_lines, last_used = numbers
    try:
        settings = settings_of(pinned, priority, quota_bytes, policy, overflow)
    except UNREADABLE as error:
        return damaged_summary(name, str(error))
    return AgentSummary(
        agent_id=name,
        settings=settings,
        num_tokens=num_tokens,
        num_turns=num_turns,
        num_lines=num_lines,
        last_used=last_used,
        is_private=bool(is_private),
        model=model,
    )


@contextmanager
def _reading(name: str) -> Iterator[None]:
    try:
        yield
    except UNREADABLE as error:
        raise DamagedAgent(name, str(error)) from error


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise ValueError(problem)


def _only(row: Row) -> Row:
    """Return the agent's own row without its seal. Raises ValueError where that is wrong."""
    rows = list(sound([row]))
    _require(bool(rows), "its settings are damaged")
    return rows[0]


def _read_agent(db: sqlite3.Connection, row: Row) -> CommittedAgent:
    agent_row, name, *settings, model, has_fixed_main, num_lines = row
    all_ids = db.execute("SELECT line FROM lines WHERE agent = ?", (agent_row,)).fetchall()
    lines = list(_read_lines(db, agent_row))
    _require(len(lines) == num_lines, "one of its lines is damaged or missing")
    states = tuple(line.state for line in lines)
    state = AgentState(name, settings_of(*settings), states, model, bool(has_fixed_main))
    known = {line.line_id for line in lines}
    strays = tuple(line_id for (line_id,) in all_ids if line_id not in known)
    return CommittedAgent(agent_row, state, {line.state.key: line for line in lines}, strays)


def settings_of(
    pinned: int, priority: int, quota_bytes: int | None, policy: str, overflow: str
) -> AgentSettings:
    """Return the settings. Raises ValueError for an unknown overflow policy."""
    return AgentSettings(bool(pinned), priority, quota_bytes, policy, Overflow(overflow))


def _read_lines(db: sqlite3.Connection, agent_row: int) -> Iterator[CommittedLine]:
    query = select("lines", "WHERE agent = ? ORDER BY number, tokenizer")
    for row in sound(db.execute(query, (agent_row,)).fetchall()):
        line_id, _, number, tokenizer, head, num_tokens, num_turns, last_used, namespace = row
        tree = _read_tree(db, line_id)
        turn_rows = _read_turns(db, line_id)
        _require(len(turn_rows) == num_turns, "one of its turns is damaged or missing")
        _hold(tree, [*(turn_head for _, turn_head, _ in turn_rows), head])
        conversation = tree.conversations()
        transcript = _read_transcript(db, line_id)
        _require(transcript.num_tokens == num_tokens, "a part of what it said is damaged")
        state = LineState(
            number=number,
            tokenizer=tokenizer,
            transcript=transcript,
            turns=tuple(
                Turn(num_tokens, conversation(turn_head), decode_receipt(receipt))
                for num_tokens, turn_head, receipt in turn_rows
            ),
            messages=conversation(head),
            block_hashes=read_blocks(db, line_id),
            last_used=last_used,
            namespace=namespace,
        )
        yield CommittedLine(line_id, state, tree, head, [h for _, h, _ in turn_rows])


def _hold(tree: MessageTree, heads: list[Head]) -> None:
    try:
        for head in heads:
            tree.hold_stored(head)
    except LookupError as error:
        raise ValueError("one of its messages is damaged or missing") from error


def _read_tree(db: sqlite3.Connection, line_id: int) -> MessageTree:
    tree = MessageTree()
    for _, node, parent, data in message_rows(db, line_id):
        try:
            tree.load(node, parent, decode_message(data))
        except LookupError as error:
            raise ValueError("one of its messages is damaged or missing") from error
    return tree


def message_rows(db: sqlite3.Connection, line_id: int) -> Iterator[Row]:
    """Yield the sound rows of a line's messages, in the order of their nodes."""
    return sound(db.execute(select("messages", "WHERE line = ? ORDER BY node"), (line_id,)))


def _read_turns(db: sqlite3.Connection, line_id: int) -> list[tuple[int, Head, bytes | None]]:
    return [
        (num_tokens, head, receipt)
        for _, _, num_tokens, head, receipt in contiguous(turn_rows(db, line_id))
    ]


def turn_rows(db: sqlite3.Connection, line_id: int) -> Iterator[Row]:
    """Yield the sound rows of a line's turns, in order."""
    return sound(db.execute(select("turns", "WHERE line = ? ORDER BY position"), (line_id,)))


def _read_transcript(db: sqlite3.Connection, line_id: int) -> Transcript:
    spans = read_spans(db, line_id)
    _require(not spans or len(spans) % 2 == 1, "a part of what it said is damaged")
    return Transcript(tuple(spans))


def _read_last_ids(db: sqlite3.Connection, line_id: int, number: int) -> tuple[int, ...]:
    """Return the line's last `number` token ids."""
    rows = db.execute(
        "SELECT token_ids FROM spans WHERE line = ? ORDER BY position DESC", (line_id,)
    )
    last: tuple[int, ...] = ()
    for (data,) in rows if number else ():
        last = (*decode_ids(data), *last)
        if len(last) >= number:
            break
    return last[len(last) - number :]


def read_spans(db: sqlite3.Connection, line_id: int) -> list[Span]:
    """Return a line's spans up to the first that is damaged or missing."""
    rows = sound(db.execute(select("spans", "WHERE line = ? ORDER BY position"), (line_id,)))
    return [span_of_row(*row[2:]) for row in contiguous(rows)]


def contiguous(rows: Iterator[Row]) -> Iterator[Row]:
    """Yield the rows before the first gap; a row's second column is its position."""
    for position, row in enumerate(rows):
        if row[1] != position:
            return
        yield row


def read_blocks(db: sqlite3.Connection, line_id: int) -> tuple[BlockHash, ...]:
    """Return the line's block table, which is only about KV: damaged rows are left out."""
    return tuple(BlockHash(block_hash) for (block_hash,) in db.execute(_BLOCKS, (line_id,)))
