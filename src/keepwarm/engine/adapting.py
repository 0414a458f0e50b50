"""A conversation as this model's chat template can take it, and what was changed for that.

An agent keeps what its client sent; this is only how it is written. Each step takes messages and
gives messages. What it does to a message follows from the template's traits and from the messages
before it, so that the next turn's prompt begins as this one's.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice, takewhile
from typing import Any

from keepwarm.core.errors import TemplateRefused
from keepwarm.core.plain import NotPlain, plain
from keepwarm.core.ports import Message, Piece, Tokenizer
from keepwarm.engine.traits import Beside, CallTraits, Traits, traits_of, with_content

JOINT = "\n\n"
"""Between messages that become one."""

Messages = list[dict[str, Any]]
Note = Callable[[str], None]
Step = Callable[[Messages, Traits, Note], Messages]

_MARK = "8c1e5a07f3b24d69"
"""Stands where the reply will; the last one in a prompt is ours, whatever was said before."""
_RULING = ("system", "developer")
_SHORT_ID = re.compile("[A-Za-z0-9]{9}")


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


def _leave_out_empty_calls(messages: Messages, traits: Traits, note: Note) -> Messages:
    def without(message: dict[str, Any]) -> dict[str, Any]:
        if traits.empty_calls or "tool_calls" not in message or message["tool_calls"]:
            return message
        note("an empty list of tool calls left out")
        return {name: value for name, value in message.items() if name != "tool_calls"}

    return [without(message) for message in messages]


def _write_calls(messages: Messages, traits: Traits, note: Note) -> Messages:
    calls = traits.calls

    def written(message: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if message["role"] != "assistant" or not message.get("tool_calls"):
            yield message
        elif calls is None:
            yield _calls_as_text(message, note)
        else:
            yield from _separated(_with_arguments(message, calls, note), calls, note)

    return [new for message in messages for new in written(message)]


def _space_calls(messages: Messages, traits: Traits, note: Note) -> Messages:
    """One call in a message, and its results behind it, where a template says no more."""
    if traits.calls is None or traits.calls.at_once:
        return messages
    spaced: Messages = []
    index = 0
    while index < len(messages):
        message = messages[index]
        index += 1
        if message["role"] != "assistant" or len(message.get("tool_calls") or ()) < 2:
            spaced.append(message)
            continue
        note("one tool call at a time")
        following = islice(messages, index, None)
        results = list(takewhile(lambda said: said["role"] == "tool", following))
        spaced += _one_at_a_time(message, results)
        index += len(results)
    return spaced


def _one_at_a_time(message: dict[str, Any], results: Messages) -> Iterator[dict[str, Any]]:
    for number, call in enumerate(message["tool_calls"]):
        call_id = call.get("id") if isinstance(call, dict) else None
        content = "" if number else message["content"]
        yield {**message, "content": content, "tool_calls": [call]}
        yield from (result for result in results if result.get("tool_call_id") == call_id)
        results = [result for result in results if result.get("tool_call_id") != call_id]
    yield from results


def _calls_as_text(message: dict[str, Any], note: Note) -> dict[str, Any]:
    note("tool calls as text")
    lines = [_call_as_text(call) for call in message["tool_calls"]]
    content = "\n".join(filter(None, (message["content"], *lines)))
    return {**_without(message, "tool_calls"), "content": content}


def _call_as_text(call: Any) -> str:
    function = _function_of(call)
    said = {"name": function.get("name"), "arguments": _as_object(function.get("arguments"))}
    return json.dumps(said if function else call, ensure_ascii=False)


def _with_arguments(message: dict[str, Any], calls: CallTraits, note: Note) -> dict[str, Any]:
    """In the form that the template takes; as they were sent, where it takes both."""

    def written(call: Any) -> Any:
        function = _function_of(call)
        arguments = function.get("arguments")
        if function and not calls.takes_text and not isinstance(arguments, dict):
            note("arguments of tool calls as objects")
            return {**call, "function": {**function, "arguments": _as_object(arguments)}}
        if function and not calls.takes_objects and not isinstance(arguments, str):
            note("arguments of tool calls as text")
            text = json.dumps(arguments or {}, ensure_ascii=False)
            return {**call, "function": {**function, "arguments": text}}
        return call

    return {**message, "tool_calls": [written(call) for call in message["tool_calls"]]}


def _separated(message: dict[str, Any], calls: CallTraits, note: Note) -> Iterator[dict[str, Any]]:
    """The calls, and where the text goes that was said with them."""
    if message["content"] and calls.beside is Beside.TOGETHER:
        yield message
        return
    if message["content"] and calls.beside is Beside.APART:
        note("tool calls apart from the text that was said with them")
        yield _without(message, "tool_calls")
    elif message["content"]:
        note("text that was said with tool calls left out")
    if calls.empty_content != "":
        note("empty content beside tool calls left out")
    yield with_content(message, calls.empty_content)


def _shorten_ids(messages: Messages, traits: Traits, note: Note) -> Messages:
    if traits.calls is None or not traits.calls.has_short_ids:
        return messages

    def short(value: Any) -> Any:
        if not isinstance(value, str) or _SHORT_ID.fullmatch(value):
            return value
        note("ids of tool calls shortened")
        return hashlib.sha256(value.encode()).hexdigest()[:9]

    def shortened(message: dict[str, Any]) -> dict[str, Any]:
        if message.get("tool_call_id"):
            return {**message, "tool_call_id": short(message["tool_call_id"])}
        if not message.get("tool_calls"):
            return message
        calls = [
            {**call, "id": short(call.get("id"))} if isinstance(call, dict) else call
            for call in message["tool_calls"]
        ]
        return {**message, "tool_calls": calls}

    return [shortened(message) for message in messages]


def _write_results(messages: Messages, traits: Traits, note: Note) -> Messages:
    def written(message: dict[str, Any]) -> dict[str, Any]:
        if traits.results or message["role"] != "tool":
            return message
        note("a tool's result as a user's message")
        return {"role": "user", "content": message["content"]}

    return [written(message) for message in messages]


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
    _leave_out_empty_calls,
    _space_calls,
    _write_calls,
    _shorten_ids,
    _write_results,
    _leave_out_empty_answers,
    _join_neighbours,
)


# -- messages --------------------------------------------------------------------------------------


def _leading(messages: Messages) -> Messages:
    return list(takewhile(lambda message: message["role"] in _RULING, messages))


def _joined(messages: Sequence[dict[str, Any]]) -> dict[str, Any]:
    contents = [message["content"] for message in messages]
    return {**messages[0], "content": JOINT.join(filter(None, contents))}


def _without(message: dict[str, Any], field: str) -> dict[str, Any]:
    return {name: value for name, value in message.items() if name != field}


def _function_of(call: Any) -> dict[str, Any]:
    """Empty where a client sent something else."""
    function = call.get("function") if isinstance(call, dict) else None
    return function if isinstance(function, dict) else {}


def _as_object(arguments: Any) -> dict[str, Any]:
    """What is no object, and no text of one, is one argument."""
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        return {}
    value = _parsed(arguments) if isinstance(arguments, str) else arguments
    return value if isinstance(value, dict) else {"arguments": value}


def _parsed(text: str) -> Any:
    """The text itself where it is no JSON, or what nobody should have to read."""
    try:
        return plain(json.loads(text))
    except (ValueError, RecursionError, NotPlain):
        return text
