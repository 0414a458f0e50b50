"""Adapts a conversation to what this model's chat template takes, and notes each change.

An agent keeps what its client sent; only what is rendered changes. Each step takes messages and
gives messages. What it does to a message follows from the template's traits and from the messages
before it alone, so that the next turn's prompt begins as this one's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from keepwarm.core.ports import Message
from keepwarm.engine.prompt.template.call_forms import CALL_STEPS, Messages, Note, Step
from keepwarm.engine.prompt.template.traits import Traits

JOINT = "\n\n"
"""Separates the contents of messages that become one."""

_RULING = ("system", "developer")


@dataclass(frozen=True, slots=True)
class Adapted:
    """Messages that the template takes, and a short sentence for each change, in their order."""

    messages: Sequence[Message]
    notes: tuple[str, ...]


def adapt(messages: Sequence[Message], traits: Traits, *, moves_systems: bool = False) -> Adapted:
    """Bring the messages into a form that a template with these traits takes.

    `moves_systems`: later system messages go to the front, which changes how the prompt begins.
    """
    notes: dict[str, None] = {}
    adapted: Messages = [dict(message) for message in messages]
    steps = (_move_systems, *_STEPS) if moves_systems else _STEPS
    for step in steps:
        adapted = step(adapted, traits, notes.setdefault)
    return Adapted(adapted, tuple(notes))


# -- steps, in their order -------------------------------------------------------------------------


def _move_systems(messages: Messages, traits: Traits, note: Note) -> Messages:
    """Put later system messages behind those at the front."""
    num_leading = len(_leading(messages))
    late = [message for message in messages[num_leading:] if message["role"] in _RULING]
    if not late:
        return messages
    note("a later system message stands at the front, so that the prompt begins otherwise")
    rest = [message for message in messages[num_leading:] if message["role"] not in _RULING]
    return [*messages[:num_leading], *late, *rest]


def _name_developers(messages: Messages, traits: Traits, note: Note) -> Messages:
    """Call a developer a system where the template does not know the role, or not in this place."""
    num_leading = len(_leading(messages))

    def named(index: int, message: dict[str, Any]) -> dict[str, Any]:
        is_known = traits.developers if index < num_leading else traits.late_developers
        if message["role"] != "developer" or is_known:
            return message
        note("a developer message as a system message")
        return {**message, "role": "system"}

    return [named(index, message) for index, message in enumerate(messages)]


def _place_systems(messages: Messages, traits: Traits, note: Note) -> Messages:
    """Join system messages, or make them a user's, where the template takes them only so."""
    leading = _leading(messages)
    rest = messages[len(leading) :]
    if len(leading) > 1 and not traits.several_systems:
        note("system messages at the beginning joined")
        leading = [_joined(leading)]
    is_lone = bool(leading) and (not rest or rest[0]["role"] != "user")
    if leading and (not traits.systems or (is_lone and not traits.lone_systems)):
        leading = [_as_user(message, note) for message in leading]
    if traits.late_systems:
        return [*leading, *rest]
    return [*leading, *(_as_user(m, note) if m["role"] == "system" else m for m in rest)]


def _as_user(message: dict[str, Any], note: Note) -> dict[str, Any]:
    note("a system message as a user's")
    return {**message, "role": "user"}


def _leave_out_empty_answers(messages: Messages, traits: Traits, note: Note) -> Messages:
    """Drop an assistant's messages that say nothing and call nothing, unless there are no others.

    A template gets at least one message; such a prompt begins otherwise once something is said.
    """

    def is_said(message: dict[str, Any]) -> bool:
        is_answer = message["role"] == "assistant" and not message.get("tool_calls")
        return not is_answer or message["content"] != ""

    said = messages if traits.empty_answers else [m for m in messages if is_said(m)]
    if not said or len(said) == len(messages):
        return messages
    note("an empty answer left out")
    return said


def _join_neighbours(messages: Messages, traits: Traits, note: Note) -> Messages:
    """Join messages in a row whose roles the template does not take in a row."""
    joined: Messages = []
    for message in messages:
        what = _joint_of(joined[-1], message, traits) if joined else None
        if what is None:
            joined.append(message)
        else:
            note(what)
            joined[-1] = _joined([joined[-1], message])
    return joined


def _joint_of(before: dict[str, Any], message: dict[str, Any], traits: Traits) -> str | None:
    """Return why the two have to become one message; None where they may stand apart."""
    roles = (before["role"], message["role"])
    if roles == ("user", "user") and not traits.users_in_a_row:
        return "a user's messages in a row joined"
    if roles == ("assistant", "assistant") and not traits.assistants_in_a_row:
        has_calls = bool(before.get("tool_calls") or message.get("tool_calls"))
        return None if has_calls else "an assistant's messages in a row joined"
    if roles == ("tool", "user") and not traits.users_behind_results:
        return "a user's message joined to the tool's result before it"
    return None


_STEPS: tuple[Step, ...] = (
    _name_developers,
    _place_systems,
    *CALL_STEPS,
    _leave_out_empty_answers,
    _join_neighbours,
)


# -- messages --------------------------------------------------------------------------------------


def _leading(messages: Messages) -> Messages:
    return list(takewhile(lambda message: message["role"] in _RULING, messages))


def _joined(messages: Sequence[dict[str, Any]]) -> dict[str, Any]:
    contents = [message["content"] for message in messages]
    return {**messages[0], "content": JOINT.join(filter(None, contents))}
