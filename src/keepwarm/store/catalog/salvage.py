"""Salvage of a damaged agent: its whole turns, and what was said up to the damage."""

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

from keepwarm.core.errors import DamagedAgent
from keepwarm.core.ports import Message
from keepwarm.core.stored import DEFAULT_SETTINGS, AgentSettings, AgentState, LineState
from keepwarm.core.transcript import Span, Transcript, Turn
from keepwarm.store.catalog.load import (
    UNREADABLE,
    contiguous,
    message_rows,
    read_spans,
    settings_of,
    turn_rows,
)
from keepwarm.store.catalog.plan import Head, MessageTree
from keepwarm.store.catalog.rows import decode_message, decode_receipt
from keepwarm.store.catalog.seals import Row, select, sound

Conversation = Callable[[Head], tuple[Message, ...] | None]


def salvage(db: sqlite3.Connection, name: str) -> AgentState:
    """Return the agent with what is sound of its main lines, in their order.

    Raises DamagedAgent where that is nothing.
    """
    found = db.execute(select("agents", "WHERE name = ?"), (name,)).fetchone()
    lines = [] if found is None else list(_main_lines(db, found[0]))
    if not any(line.messages or line.turns or line.transcript.num_tokens for line in lines):
        raise DamagedAgent(name, "nothing of it can be read")
    lines.sort(key=lambda line: line.key)
    return AgentState(name, _settings(found), tuple(lines))


def _settings(row: Row) -> AgentSettings:
    for _, _, *settings, _, _, _ in sound([row]):
        with suppress(*UNREADABLE):
            return settings_of(*settings)
    return DEFAULT_SETTINGS


def _main_lines(db: sqlite3.Connection, agent_row: int) -> Iterator[LineState]:
    """Yield the sound main lines, or the longest of the damaged ones, whose parts may be sound."""
    rows = db.execute(select("lines", "WHERE agent = ?"), (agent_row,)).fetchall()
    mains = [row for row in sound(rows) if row[2] == 0]
    for line_id, _, _, tokenizer, head, _, _, last_used, namespace in mains:
        yield _line(db, line_id, head, tokenizer, last_used, namespace)
    if not mains and rows:
        most = max((_line(db, row[0], None, "unknown", 0, "") for row in rows), key=_size)
        yield replace(most, messages=_last_messages(most.turns))


def _size(line: LineState) -> tuple[int, int]:
    return len(line.turns), line.transcript.num_tokens


def _last_messages(turns: Sequence[Turn]) -> tuple[Message, ...]:
    return next((turn.messages for turn in reversed(turns) if turn.messages), ())


def _line(
    db: sqlite3.Connection,
    line_id: int,
    head: Head,
    tokenizer: str,
    last_used: int,
    namespace: str,
) -> LineState:
    spans = _well_formed(read_spans(db, line_id))
    transcript = Transcript(tuple(spans))
    conversation = _conversations(db, line_id)
    turns = tuple(_turns(db, line_id, transcript.num_tokens, conversation))
    messages = conversation(head)
    if messages is None and head is not None:
        messages = _last_messages(turns)
    return LineState(
        number=0,
        tokenizer=tokenizer,
        transcript=transcript,
        messages=messages,
        turns=turns,
        block_hashes=(),
        last_used=last_used,
        namespace=namespace,
    )


def _well_formed(spans: list[Span]) -> list[Span]:
    """Return the first spans that are texts and special tokens in turns, ending with a text."""
    num_sound = 0
    for span in spans:
        if span.is_special != bool(num_sound % 2):
            break
        num_sound += 1
    kept = spans[: num_sound - (num_sound % 2 == 0)] if num_sound else []
    return kept or list(Transcript().spans)


def _conversations(db: sqlite3.Connection, line_id: int) -> Conversation:
    """Return a function from heads to conversations, None for those that are not whole."""
    tree = MessageTree()
    nodes = {0}
    for _, node, parent, data in message_rows(db, line_id):
        with suppress(*UNREADABLE):
            if parent in nodes:
                tree.load(node, parent, decode_message(data))
                nodes.add(node)
    whole = tree.conversations()
    return lambda head: whole(head) if head in nodes else None


def _turns(
    db: sqlite3.Connection, line_id: int, num_tokens: int, conversation: Conversation
) -> Iterator[Turn]:
    """Yield turns up to the first whose messages are gone.

    A turn that ends beyond the tokens that are left ends nowhere (0).
    """
    for _, _, end, head, receipt in contiguous(turn_rows(db, line_id)):
        messages = conversation(head)
        if head is not None and messages is None:
            return
        if messages is None and end > num_tokens:
            return
        yield Turn(end if end <= num_tokens else 0, messages, decode_receipt(receipt))
