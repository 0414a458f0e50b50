"""Puts placeholders into old messages that this model cannot read.

Clients send the whole conversation again and again. A refused newest message can be taken back by
the client; refusing an earlier one, or what a tool returned, would end the conversation for good.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from keepwarm.core.plain import MAX_DEPTH

_HALF_PAIR = re.compile("[\ud800-\udfff]")
_REPLACEMENT = "\ufffd"
_KINDS = {
    "image": "image",
    "image_url": "image",
    "input_image": "image",
    "document": "file",
    "file": "file",
    "input_file": "file",
    "audio": "audio",
    "input_audio": "audio",
    "video_url": "video",
}
_TYPE = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,39}")


@dataclass(frozen=True, slots=True)
class Mended:
    """Messages that this model can read, and a short sentence for each change."""

    messages: Any
    notes: tuple[str, ...] = ()


def mend(messages: Any, *, is_begun: bool = False) -> Mended:
    """Put placeholders into the messages that the client cannot take back.

    Everything else that is wrong is left for validation to refuse. `is_begun`: as for
    `kept_messages`.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        return Mended(messages)
    roles = [m.get("role") if isinstance(m, Mapping) else None for m in messages]
    kept = kept_messages(roles, is_begun=is_begun)
    notes: list[str] = []
    mended = [
        _mended(n, message, notes) if n in kept else message for n, message in enumerate(messages)
    ]
    return Mended(mended, tuple(notes)) if notes else Mended(messages)


def kept_messages(roles: Sequence[object], *, is_begun: bool = False) -> frozenset[int]:
    """Return the indices of the messages that a client will send again even if they are refused.

    All but the newest, and that one too if it is an assistant's or a tool's. `is_begun`: the last
    message is the beginning of the reply, so the newest one stands before it.
    """
    newest = len(roles) - (2 if is_begun else 1)
    return frozenset(
        number
        for number, role in enumerate(roles)
        if number < newest or (number == newest and role in ("assistant", "tool"))
    )


def placeholder(part_type: object) -> str:
    """Return the text that replaces a part of this type: always the same, so that prompts stay
    equal.
    """
    name = part_type if isinstance(part_type, str) else ""
    kind = _KINDS.get(name) or (name if _TYPE.fullmatch(name) else "content")
    return f"[{kind} left out]"


def _mended(index: int, message: object, notes: list[str]) -> object:
    if not isinstance(message, Mapping):
        return message
    whole = _with_text_only(index, message, notes)
    if not _has_half(whole):
        return whole
    notes.append(f"message {index}: half a surrogate pair became U+FFFD")
    return _without_halves(whole)


def _with_text_only(index: int, message: Mapping[str, Any], notes: list[str]) -> Mapping[str, Any]:
    parts = message.get("content")
    if not isinstance(parts, list | tuple):
        return message
    types = [part.get("type") if isinstance(part, Mapping) else "text" for part in parts]
    strange = [n for n, part_type in enumerate(types) if part_type != "text"]
    if not strange:
        return message
    placed = list(parts)
    for n in strange:
        placed[n] = {"type": "text", "text": placeholder(types[n])}
    notes.append(f"message {index}: {', '.join(placed[n]['text'] for n in strange)}")
    return {**message, "content": placed}


def _has_half(value: object, depth: int = 0) -> bool:
    """Whether a text in the value has half of a surrogate pair.

    False for values nested deeper than `MAX_DEPTH`, which validation refuses for that.
    """
    if isinstance(value, str):
        return not value.isascii() and _HALF_PAIR.search(value) is not None
    if depth > MAX_DEPTH:
        return False
    if isinstance(value, Mapping):
        value = (*value.keys(), *value.values())
    return isinstance(value, list | tuple) and any(_has_half(v, depth + 1) for v in value)


def _without_halves(value: Any, depth: int = 0) -> Any:
    if isinstance(value, str):
        return _HALF_PAIR.sub(_REPLACEMENT, value)
    if depth > MAX_DEPTH or not isinstance(value, Mapping | list | tuple):
        return value
    if isinstance(value, Mapping):
        items = value.items()
        return {_without_halves(k): _without_halves(item, depth + 1) for k, item in items}
    return [_without_halves(item, depth + 1) for item in value]
