"""What a commit writes: the difference between what the catalogue holds and a new state."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from keepwarm.core.errors import InvariantBroken
from keepwarm.core.ports import Message
from keepwarm.core.stored import AgentState, LineKey, LineState
from keepwarm.core.transcript import Receipt, Transcript, Turn
from keepwarm.store.catalog.rows import encode_message, encode_receipt, span_row
from keepwarm.store.catalog.seals import insert, sealed

NodeId = int
Head = NodeId | None
"""The last message of a conversation, ROOT if it has none, None if its messages are unknown."""

ROOT: NodeId = 0

_PUT_AGENT = f"""
    {insert("agents", replace=False)}
    ON CONFLICT (agent) DO UPDATE SET pinned = excluded.pinned, priority = excluded.priority,
        quota_bytes = excluded.quota_bytes, policy = excluded.policy, overflow = excluded.overflow,
        model = excluded.model, has_fixed_main = excluded.has_fixed_main,
        num_lines = excluded.num_lines, seal = excluded.seal
"""
_PUT_LINE = f"""
    {insert("lines", replace=False)}
    ON CONFLICT (line) DO UPDATE SET tokenizer = excluded.tokenizer, head = excluded.head,
        num_tokens = excluded.num_tokens, num_turns = excluded.num_turns,
        last_used = excluded.last_used, namespace = excluded.namespace, seal = excluded.seal
"""
_MOVE_STRAY = "UPDATE lines SET number = -line WHERE line = ?"
_DROP_LINE = "DELETE FROM lines WHERE line = ?"
_PUT_MESSAGE = insert("messages")
_DROP_MESSAGE = "DELETE FROM messages WHERE line = ? AND node = ?"
_PUT_SPAN = insert("spans")
_DROP_SPANS = "DELETE FROM spans WHERE line = ? AND position >= ?"
_PUT_TURN = insert("turns")
_DROP_TURNS = "DELETE FROM turns WHERE line = ? AND position >= ?"
_PUT_BLOCK = "INSERT OR REPLACE INTO line_blocks (line, depth, hash) VALUES (?, ?, ?)"
_DROP_BLOCKS = "DELETE FROM line_blocks WHERE line = ? AND depth >= ?"


@dataclass(frozen=True, slots=True)
class Write:
    """A statement, and the rows to run it with."""

    sql: str
    rows: Sequence[tuple[Any, ...]]


@dataclass(slots=True, eq=False)
class _Node:
    parent: NodeId
    message: Message
    children: list[NodeId] = field(default_factory=list)
    num_holders: int = 0


class MessageTree:
    """The messages of a line's conversations, each stored once; a conversation is a path.

    A node stays while it has children or a turn, or the line itself, holds it as its head.
    """

    def __init__(self) -> None:
        self._nodes = {ROOT: _Node(ROOT, {}, num_holders=1)}
        self._added: list[NodeId] = []
        self._removed: list[NodeId] = []

    def load(self, node_id: NodeId, parent: NodeId, message: Message) -> None:
        """Enter a stored node; parents come first. Raises KeyError where the parent is missing."""
        self._nodes[parent].children.append(node_id)
        self._nodes[node_id] = _Node(parent, message)

    def hold(self, messages: tuple[Message, ...] | None) -> Head:
        """Add a conversation's new messages and return its head; `release` is the inverse."""
        if messages is None:
            return None
        node_id = ROOT
        for message in messages:
            node_id = self._child(node_id, message)
        self._nodes[node_id].num_holders += 1
        return node_id

    def hold_stored(self, head: Head) -> None:
        """Hold a head that is stored. Raises KeyError where its node is missing."""
        if head is not None:
            self._nodes[head].num_holders += 1

    def release(self, head: Head) -> None:
        if head is None:
            return
        self._nodes[head].num_holders -= 1
        node = self._nodes[head]
        while not node.num_holders and not node.children:
            del self._nodes[head]
            self._removed.append(head)
            parent = self._nodes[node.parent]
            parent.children.remove(head)
            head, node = node.parent, parent

    def conversations(self) -> Callable[[Head], tuple[Message, ...] | None]:
        """Return a function from heads to conversations; continuing an earlier one is fast."""
        known: dict[NodeId, tuple[Message, ...]] = {ROOT: ()}

        def conversation(head: Head) -> tuple[Message, ...] | None:
            if head is None:
                return None
            node_id, latest = head, []
            while node_id not in known:
                latest.append(self._nodes[node_id].message)
                node_id = self._nodes[node_id].parent
            known[head] = (*known[node_id], *reversed(latest)) if latest else known[head]
            return known[head]

        return conversation

    def take_changes(self) -> tuple[list[tuple[NodeId, NodeId, Message]], list[NodeId]]:
        """Return the nodes added since the last call, as (node, parent, message), and removed."""
        added = [(i, self._nodes[i].parent, self._nodes[i].message) for i in self._added]
        removed = self._removed
        self._added, self._removed = [], []
        return added, removed

    def _child(self, parent: NodeId, message: Message) -> NodeId:
        children = self._nodes[parent].children
        for node_id in children:
            stored = self._nodes[node_id].message
            if stored is message or stored == message:
                return node_id
        node_id = next(reversed(self._nodes)) + 1  # they are entered in the order of their ids
        children.append(node_id)
        self._nodes[node_id] = _Node(parent, message)
        self._added.append(node_id)
        return node_id


@dataclass(slots=True, eq=False)
class CommittedLine:
    """A line as the catalogue holds it, and under which ids."""

    line_id: int
    state: LineState
    tree: MessageTree = field(default_factory=MessageTree)
    head: Head = None
    turn_heads: list[Head] = field(default_factory=list)

    @property
    def row(self) -> tuple[str, Head, int, int, int, str]:
        state = self.state
        return (
            state.tokenizer,
            self.head,
            state.transcript.num_tokens,
            len(state.turns),
            state.last_used,
            state.namespace,
        )


@dataclass(slots=True, eq=False)
class CommittedAgent:
    """An agent as the catalogue holds it. A commit uses it up and makes the next one.

    `strays` are damaged lines that name this agent: their numbers must not be in the way.
    """

    agent_row: int
    state: AgentState
    lines: dict[LineKey, CommittedLine]
    strays: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(line.transcript.num_tokens for line in self.state.lines)


class RowIds:
    """Gives the ids of agents and lines that are yet to be written, none of them twice."""

    def __init__(self, *, last_agent: int, last_line: int) -> None:
        self.agents = count(last_agent + 1)
        self.lines = count(last_line + 1)


@dataclass(frozen=True, slots=True)
class CommitPlan:
    """The writes of a commit, in order, and what the catalogue holds after them."""

    writes: list[Write]
    committed: CommittedAgent


def plan_commit(known: CommittedAgent | None, state: AgentState, ids: RowIds) -> CommitPlan:
    """Plan to write what is new. `known` is used up, whether the commit succeeds or not."""
    _check_numbers(state)
    agent_row = next(ids.agents) if known is None else known.agent_row
    known_lines = {} if known is None else known.lines
    writes: list[Write] = []
    if known is None or _agent_row(agent_row, known.state) != _agent_row(agent_row, state):
        writes.append(Write(_PUT_AGENT, sealed([_agent_row(agent_row, state)])))
    if known is not None and known.strays:
        writes.append(Write(_MOVE_STRAY, [(line_id,) for line_id in known.strays]))
    gone = known_lines.keys() - {line.key for line in state.lines}
    if gone:
        writes.append(Write(_DROP_LINE, [(known_lines[n].line_id,) for n in sorted(gone)]))
    lines: dict[LineKey, CommittedLine] = {}
    for line in state.lines:
        known_line = known_lines.get(line.key)
        committed = _advance(known_line or _nothing(next(ids.lines), line), line)
        writes += _line_writes(agent_row, known_line, committed)
        lines[line.key] = committed
    return CommitPlan(writes, CommittedAgent(agent_row, state, lines))


def common_start(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Return how many leading elements are equal; the same object is equal without a look."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x is not y and x != y), min(len(a), len(b)))


def _check_numbers(state: AgentState) -> None:
    keys = [line.key for line in state.lines]
    if keys != sorted(set(keys)):
        raise InvariantBroken(f"agent {state.agent_id!r} has lines in this order: {keys}")


def _agent_row(agent_row: int, state: AgentState) -> tuple[Any, ...]:
    settings = state.settings
    return (
        agent_row,
        state.agent_id,
        settings.pinned,
        settings.priority,
        settings.quota_bytes,
        settings.policy,
        str(settings.overflow),
        state.model,
        state.has_fixed_main,
        len(state.lines),
    )


def _nothing(line_id: int, line: LineState) -> CommittedLine:
    return CommittedLine(line_id, LineState(line.number, "", Transcript(()), None, (), (), 0))


def _advance(known: CommittedLine, state: LineState) -> CommittedLine:
    """Return the line with its new state; the tree, which it takes over, knows what changed."""
    kept = common_start(known.state.turns, state.turns)
    heads = [_hold_turn(known, i, turn) for i, turn in enumerate(state.turns[kept:], kept)]
    head = known.tree.hold(state.messages)
    for old in (*known.turn_heads[kept:], known.head):
        known.tree.release(old)
    turn_heads = [*known.turn_heads[:kept], *heads]
    return CommittedLine(known.line_id, state, known.tree, head, turn_heads)


def _hold_turn(known: CommittedLine, position: int, turn: Turn) -> Head:
    """Hold a turn's messages; where only its length has changed, without looking them up."""
    if position < len(known.turn_heads):
        head = known.turn_heads[position]
        if known.state.turns[position].messages is turn.messages:
            known.tree.hold_stored(head)
            return head
    return known.tree.hold(turn.messages)


def _line_writes(
    agent_row: int, known: CommittedLine | None, line: CommittedLine
) -> Iterator[Write]:
    before = _nothing(line.line_id, line.state) if known is None else known
    if known is None or known.row != line.row:
        row = (line.line_id, agent_row, line.state.number, *line.row)
        yield Write(_PUT_LINE, sealed([row]))
    yield from _message_writes(line)
    yield from _span_writes(before, line)
    yield from _turn_writes(before, line)
    yield from _block_writes(before, line)


def _message_writes(line: CommittedLine) -> Iterator[Write]:
    added, removed = line.tree.take_changes()
    if removed:
        yield Write(_DROP_MESSAGE, [(line.line_id, node) for node in removed])
    if added:
        rows = [(line.line_id, node, parent, encode_message(m)) for node, parent, m in added]
        yield Write(_PUT_MESSAGE, sealed(rows))


def _span_writes(known: CommittedLine, line: CommittedLine) -> Iterator[Write]:
    old, new = known.state.transcript.spans, line.state.transcript.spans
    kept = common_start(old, new)
    if len(new) < len(old):
        yield Write(_DROP_SPANS, [(line.line_id, len(new))])
    if kept < len(new):
        numbered = enumerate(new[kept:], kept)
        rows = [(line.line_id, i, *span_row(span)) for i, span in numbered]
        yield Write(_PUT_SPAN, sealed(rows))


def _turn_writes(known: CommittedLine, line: CommittedLine) -> Iterator[Write]:
    old = _turn_rows(known.state.turns, known.turn_heads)
    new = _turn_rows(line.state.turns, line.turn_heads)
    kept = common_start(old, new)
    if len(new) < len(old):
        yield Write(_DROP_TURNS, [(line.line_id, len(new))])
    if kept < len(new):
        rows = [
            (line.line_id, position, num_tokens, head, encode_receipt(receipt))
            for position, (num_tokens, head, receipt) in enumerate(new[kept:], kept)
        ]
        yield Write(_PUT_TURN, sealed(rows))


def _turn_rows(
    turns: Sequence[Turn], heads: Sequence[Head]
) -> list[tuple[int, Head, Receipt | None]]:
    pairs = zip(turns, heads, strict=True)
    return [(turn.num_tokens, head, turn.receipt) for turn, head in pairs]


def _block_writes(known: CommittedLine, line: CommittedLine) -> Iterator[Write]:
    old, new = known.state.block_hashes, line.state.block_hashes
    kept = common_start(old, new)
    if len(new) < len(old):
        yield Write(_DROP_BLOCKS, [(line.line_id, len(new))])
    if kept < len(new):
        numbered = enumerate(new[kept:], kept)
        yield Write(_PUT_BLOCK, [(line.line_id, depth, h) for depth, h in numbered])
