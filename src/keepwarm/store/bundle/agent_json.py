"""An agent as JSON, and back from JSON that may be hostile.

Messages lie in a table of nodes, each with the one before it, because every turn repeats those of
the turns before. What decoding needs beyond the text's own size is bounded before it is parsed.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields
from itertools import pairwise
from typing import Any, NoReturn, TypeGuard

from keepwarm.core.block import EXACT
from keepwarm.core.events import FinishReason
from keepwarm.core.plain import NotPlain, check_text, plain_object
from keepwarm.core.ports import ROLES, Message
from keepwarm.core.stored import (
    MAX_QUOTA_BYTES,
    AgentSettings,
    AgentState,
    LineState,
    Overflow,
)
from keepwarm.core.transcript import (
    MAX_DIGEST_CHARS,
    Receipt,
    Span,
    Transcript,
    Turn,
    is_receipt_key,
)
from keepwarm.store.catalog.plan import MessageTree

MAX_AGENT_BYTES = 32 << 20
MAX_AGENT_VALUES = 4 << 20
"""Commas and brackets: more than there are values; an agent of a million tokens has as many."""
MAX_LINES = 1024
MAX_SPOKEN = 16 << 20
"""Messages of all turns together, those of earlier turns counted again: 4,000 turns of a chat."""
MAX_SIBLINGS = 32
"""Messages that continue the same conversation in other ways; each is compared with the others."""
MAX_NAME_CHARS = 512
MAX_TOKEN_ID = 2**32 - 1
NAMESPACE = re.compile(r"[A-Za-z0-9:._-]{0,64}", re.ASCII)

_STRUCTURE = (b",", b"[", b"{")
_SETTINGS_FIELDS = tuple(field.name for field in fields(AgentSettings))
_RECEIPT_FIELDS = tuple(field.name for field in fields(Receipt))
_RECEIPT_COUNTS = ("prompt_tokens", "cached_tokens", "completion_tokens")
_FINISHED = (FinishReason.STOP, FinishReason.LENGTH)
"""How a reply ended that has a receipt: one that was cancelled has to run again."""

Conversation = tuple[Message, ...] | None


class Unsound(Exception):
    """A bundle's content is unsound; becomes a BadBundle where its path is known."""


def require(condition: bool, problem: str) -> None:
    if not condition:
        raise Unsound(problem)


# -- writing ---------------------------------------------------------------------------------------


def encode_agent(state: AgentState) -> bytes:
    """Encode an agent. Raises TypeError, ValueError or RecursionError for what is no JSON."""
    document = {
        "agent_id": state.agent_id,
        "settings": asdict(state.settings),
        "lines": [_line_document(line) for line in state.lines],
    }
    text = json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode()


def _line_document(line: LineState) -> dict[str, Any]:
    tree = MessageTree()
    turns = [_turn_row(turn, tree.hold(turn.messages)) for turn in line.turns]
    head = tree.hold(line.messages)
    nodes, _ = tree.take_changes()
    return {
        "number": line.number,
        "tokenizer": line.tokenizer,
        "namespace": line.namespace,
        "spans": [
            [span.text, list(span.token_ids), span.is_whole, span.is_special]
            for span in line.transcript.spans
        ],
        "messages": [[parent, dict(message)] for _, parent, message in nodes],
        "head": head,
        "turns": turns,
    }


def _turn_row(turn: Turn, head: int | None) -> list[Any]:
    return [turn.num_tokens, head, None if turn.receipt is None else asdict(turn.receipt)]


# -- reading ---------------------------------------------------------------------------------------


def decode_agent(data: bytes) -> AgentState:
    """Decode and check an agent, but for the range of token ids: that is the tokenizer's.

    Block hashes and times of use are left out. Raises Unsound.
    """
    require(len(data) <= MAX_AGENT_BYTES, f"its agent has {len(data):,} bytes")
    num_values = sum(data.count(mark) for mark in _STRUCTURE)
    require(num_values <= MAX_AGENT_VALUES, f"its agent has {num_values:,} values")
    document = _fields(parse_json(data, "its agent"), ("agent_id", "settings", "lines"))
    agent_id = _name(document["agent_id"], "the agent's name")
    rows = _list(document["lines"], "the agent's lines")
    require(len(rows) <= MAX_LINES, f"it has {len(rows):,} lines")
    budget = _Budget(MAX_SPOKEN)
    lines = tuple(_line(row, budget) for row in rows)
    keys = [line.key for line in lines]
    require(keys == sorted(set(keys)), "its lines are not in their order")
    require(any(line.number == 0 for line in lines), "it has no main line")
    return AgentState(agent_id, _settings(document["settings"]), lines)


def parse_json(data: bytes, what: str) -> object:
    """Parse JSON. Raises Unsound for what is no JSON, or too deep."""
    try:
        text = data.decode()
        document: object = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise Unsound(f"{what} is not JSON: {error}") from error
    return document


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


class _Budget:
    """Counts down how much more of something may come."""

    def __init__(self, num_left: int) -> None:
        self._num_left = num_left

    def spend(self, number: int, what: str) -> None:
        self._num_left -= number
        require(self._num_left >= 0, f"it has too many {what}")


def _settings(value: object) -> AgentSettings:
    values = _fields(value, _SETTINGS_FIELDS)
    pinned, quota_bytes = values["pinned"], values["quota_bytes"]
    priority = _number(values["priority"], "the priority", -100, 100)
    if quota_bytes is not None:
        quota_bytes = _number(quota_bytes, "the quota", 0, MAX_QUOTA_BYTES)
    require(values["policy"] == EXACT, f"its policy is not {EXACT!r}")
    require(values["overflow"] in list(Overflow), "its overflow policy is none")
    overflow = Overflow(values["overflow"])
    return AgentSettings(_flag(pinned, "pinned"), priority, quota_bytes, overflow=overflow)


def _line(value: object, budget: _Budget) -> LineState:
    names = ("number", "tokenizer", "namespace", "spans", "messages", "head", "turns")
    values = _fields(value, names)
    namespace = _name(values["namespace"], "a namespace")
    require(NAMESPACE.fullmatch(namespace) is not None, "a namespace is none")
    transcript = _transcript(values["spans"])
    lengths, conversation = _conversations(values["messages"])

    def spoken(head: object) -> Conversation:
        if head is None:
            return None
        node = _number(head, "a conversation's end", 0, len(lengths) - 1)
        budget.spend(lengths[node], "messages")
        return conversation(node)

    return LineState(
        number=_number(values["number"], "a line's number", 0, 2**31 - 1),
        tokenizer=_name(values["tokenizer"], "a tokenizer"),
        transcript=transcript,
        turns=tuple(_turns(values["turns"], transcript.num_tokens, spoken)),
        messages=spoken(values["head"]),
        block_hashes=(),
        last_used=0,
        namespace=namespace,
    )


def _transcript(value: object) -> Transcript:
    spans = tuple(_span(row) for row in _list(value, "spans"))
    require(len(spans) % 2 == 1, "a transcript has no open text")
    for position, span in enumerate(spans):
        require(span.is_special == bool(position % 2), "texts and special tokens take no turns")
    return Transcript(spans)


def _span(value: object) -> Span:
    text, ids, is_whole, is_special = _row(value, 4, "a span")
    if text is not None:
        text = _text(text, "a span's text", MAX_AGENT_BYTES)
    token_ids = tuple(_list(ids, "token ids"))
    require(are_token_ids(token_ids, MAX_TOKEN_ID), "a token id is none")
    span = Span(text, token_ids, _flag(is_whole, "is_whole"), _flag(is_special, "is_special"))
    if span.is_special:
        require(len(token_ids) == 1 and text is not None, "a special token is not one token")
    return span


def are_token_ids(values: Sequence[object], largest: int) -> TypeGuard[Sequence[int]]:
    return all(type(value) is int and 0 <= value <= largest for value in values)


def _conversations(value: object) -> tuple[list[int], Callable[[int], Conversation]]:
    """Return the length of the conversation that each node ends, and a function to these."""
    tree, lengths, num_children = MessageTree(), [0], Counter[int]()
    for node, row in enumerate(_list(value, "messages"), 1):
        before, message = _row(row, 2, "a message's row")
        parent = _number(before, "the message before", 0, node - 1)
        num_children[parent] += 1
        require(num_children[parent] <= MAX_SIBLINGS, "too many messages follow the same one")
        tree.load(node, parent, _message(message))
        lengths.append(lengths[parent] + 1)
    return lengths, tree.conversations()


def _message(value: object) -> Message:
    require(isinstance(value, dict), "a message is no object")
    message: dict[str, Any] = value  # type: ignore[assignment]
    role, content = message.get("role"), message.get("content")
    require(isinstance(role, str) and role in ROLES, "a message has no role")
    require(isinstance(content, str), "a message has no text")
    try:
        return plain_object(message)
    except NotPlain as error:
        raise Unsound(f"a message {error}") from error


def _turns(
    value: object, num_tokens: int, spoken: Callable[[object], Conversation]
) -> Iterator[Turn]:
    rows = [_whole_row(row) for row in _list(value, "turns")]
    ends = [_number(end, "a turn's end", 0, num_tokens) for end, _, _ in rows]
    # A turn of another tokenizer's ends nowhere in this one's.
    known = [end for end in ends if end]
    require(all(a <= b for a, b in pairwise(known)), "its turns are not in their order")
    for end, (_, head, receipt) in zip(ends, rows, strict=True):
        yield Turn(end, spoken(head), _receipt(receipt))


def _whole_row(value: object) -> list[Any]:
    """Return a turn's row, which had no receipt in bundles of version 1."""
    row = _list(value, "a turn")
    return _row([*row, None] if len(row) == 2 else row, 3, "a turn")


def _receipt(value: object) -> Receipt | None:
    if value is None:
        return None
    values = _fields(value, _RECEIPT_FIELDS)
    key, reason = values["key"], values["finish_reason"]
    require(isinstance(key, str) and is_receipt_key(key), "a receipt's key is none")
    require(reason in _FINISHED, "a receipt's reply has no end")
    counts = {name: _number(values[name], name, 0, MAX_TOKEN_ID) for name in _RECEIPT_COUNTS}
    digest = _text(values["digest"], "a receipt's digest", MAX_DIGEST_CHARS)
    return Receipt(key, digest, FinishReason(reason), **counts)


# -- types -----------------------------------------------------------------------------------------


def _fields(value: object, names: Sequence[str]) -> dict[str, Any]:
    require(isinstance(value, dict) and set(value) == set(names), f"{names[0]} ... is no object")
    values: dict[str, Any] = value  # type: ignore[assignment]
    return values


def _list(value: object, what: str) -> list[Any]:
    require(isinstance(value, list), f"{what}: no list")
    items: list[Any] = value  # type: ignore[assignment]
    return items


def _row(value: object, length: int, what: str) -> list[Any]:
    row = _list(value, what)
    require(len(row) == length, f"{what} has {len(row)} parts")
    return row


def _text(value: object, what: str, max_chars: int) -> str:
    require(isinstance(value, str) and len(value) <= max_chars, f"{what} is no text, or too long")
    text = str(value)
    try:
        check_text(text)
    except NotPlain as error:
        raise Unsound(f"{what} {error}") from error
    return text


def _name(value: object, what: str) -> str:
    name = _text(value, what, MAX_NAME_CHARS)
    require(name.isascii() and name.isprintable(), f"{what} is no name")
    return name


def _flag(value: object, what: str) -> bool:
    require(isinstance(value, bool), f"{what} is neither true nor false")
    return bool(value)


def _number(value: object, what: str, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise Unsound(f"{what} is not a whole number from {low} to {high}")
    return value
