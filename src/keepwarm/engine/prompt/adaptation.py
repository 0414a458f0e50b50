"""A conversation as this model's chat template can take it, and what was changed for that.

An agent keeps what its client sent; this is only how it is written. Each step takes messages and
gives messages. What it does to a message follows from the template's traits and from the messages
before it, so that the next turn's prompt begins as this one's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import Any

from keepwarm.core.errors import TemplateRefused
from keepwarm.core.ports import Message, Piece, Tokenizer
from keepwarm.engine.prompt.call_forms import CALL_STEPS, Messages, Note, Step
from keepwarm.engine.prompt.template_traits import Traits, traits_of

JOINT = "\n\n"
"""Between messages that become one."""

_MARK = "8c1e5a07f3b24d69"
"""Stands where the reply will; the last one in a prompt is ours, whatever was said before."""
_RULING = ("system", "developer")


@dataclass(frozen=True, slots=True)
class Adapted:
    """`notes`: what was changed, a short sentence each, in the order in which it was done."""

    messages: Sequence[Message]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Rendered:
    """A prompt's text, and what was changed in its messages; see `Adapted`."""

    pieces: tuple[Piece, ...]
    notes: tuple[str, ...] = ()


class ChatRenderer:
    """Renders conversations by the tokenizer's template. Can be called from any thread."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    @cached_property
    def traits(self) -> Traits:
        return traits_of(self._tokenizer.render)

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True
    ) -> Rendered:
        """Raises InvalidRequest where the template refuses the messages in every form."""
        adapted = adapt(messages, self.traits)
        try:
            return self._rendered(adapted, add_generation_prompt)
        except TemplateRefused:
            moved = adapt(messages, self.traits, moves_systems=True)
            if moved == adapted:
                raise
            return self._rendered(moved, add_generation_prompt)

    def pieces(self, messages: Sequence[Message]) -> tuple[Piece, ...]:
        """Without a generation prompt."""
        return self.render(messages, add_generation_prompt=False).pieces

    def _rendered(self, adapted: Adapted, add_generation_prompt: bool) -> Rendered:
        messages = adapted.messages
        if add_generation_prompt and _would_join_reply(messages, self.traits):
            note = "the reply goes on with the assistant's last message"
            return Rendered(self._begun(messages), (*adapted.notes, note))
        pieces = self._tokenizer.render(messages, add_generation_prompt=add_generation_prompt)
        return Rendered(pieces, adapted.notes)

    def _begun(self, messages: Sequence[Message]) -> tuple[Piece, ...]:
        """The last message as the template writes it, up to where another would be joined to it."""
        *said, last = messages
        content = f"{last['content']}{JOINT if last['content'] else ''}"
        marked = [*said, {**last, "content": content + _MARK}]
        pieces = self._tokenizer.render(marked, add_generation_prompt=False)
        for number in reversed(range(len(pieces))):
            text = pieces[number].text
            if _MARK in text:
                return (*pieces[:number], Piece(text[: text.rindex(_MARK)]))
        return (*self._tokenizer.render(said), Piece(content))


def adapt(messages: Sequence[Message], traits: Traits, *, moves_systems: bool = False) -> Adapted:
    """The messages as a template with these traits takes them.

    `moves_systems`: later system messages go to the front, which changes how the prompt begins.
    """
    notes: dict[str, None] = {}
    adapted: Messages = [dict(message) for message in messages]
    steps = (_move_systems, *_STEPS) if moves_systems else _STEPS
    for step in steps:
        adapted = step(adapted, traits, notes.setdefault)
    return Adapted(adapted, tuple(notes))


def _would_join_reply(messages: Sequence[Message], traits: Traits) -> bool:
    """Whether the reply could not come back as a message of its own."""
    last = messages[-1]
    is_text = last["role"] == "assistant" and not last.get("tool_calls")
    return is_text and len(messages) > 1 and not traits.assistants_in_a_row


# -- steps, in their order -------------------------------------------------------------------------


def _move_systems(messages: Messages, traits: Traits, note: Note) -> Messages:
    num_leading = len(_leading(messages))
    late = [message for message in messages[num_leading:] if message["role"] in _RULING]
    if not late:
        return messages
    note("a later system message stands at the front, so that the prompt begins otherwise")
    rest = [message for message in messages[num_leading:] if message["role"] not in _RULING]
    return [*messages[:num_leading], *late, *rest]


def _name_developers(messages: Messages, traits: Traits, note: Note) -> Messages:
    """As a system's, where the template does not know the role, or not in this place."""
    num_leading = len(_leading(messages))

    def named(index: int, message: dict[str, Any]) -> dict[str, Any]:
        is_known = traits.developers if index < num_leading else traits.late_developers
        if message["role"] != "developer" or is_known:
            return message
        note("a developer message as a system message")
        return {**message, "role": "system"}

    return [named(index, message) for index, message in enumerate(messages)]


def _place_systems(messages: Messages, traits: Traits, note: Note) -> Messages:
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
    def is_said(message: dict[str, Any]) -> bool:
        is_answer = message["role"] == "assistant" and not message.get("tool_calls")
        return not is_answer or message["content"] != ""

    said = messages if traits.empty_answers else [m for m in messages if is_said(m)]
    if not said or len(said) == len(messages):
        return messages
    note("an empty answer left out")
    return said


def _join_neighbours(messages: Messages, traits: Traits, note: Note) -> Messages:
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
    """Why the two have to be one message; None: they have not."""
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
