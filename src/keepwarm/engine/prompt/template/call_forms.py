"""Writes tool calls and tool results in the form that a chat template takes."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from itertools import islice, takewhile
from typing import Any

from keepwarm.core.plain import NotPlain, plain
from keepwarm.engine.prompt.template.traits import Beside, CallTraits, Traits, with_content

Messages = list[dict[str, Any]]
Note = Callable[[str], None]
Step = Callable[[Messages, Traits, Note], Messages]
"""Gives new messages for old ones, and a note for what it changes."""

_SHORT_ID = re.compile("[A-Za-z0-9]{9}")


def _leave_out_empty_calls(messages: Messages, traits: Traits, note: Note) -> Messages:
    """Drop `tool_calls` fields that are empty, where the template would write something there."""

    def without(message: dict[str, Any]) -> dict[str, Any]:
        if traits.empty_calls or "tool_calls" not in message or message["tool_calls"]:
            return message
        note("an empty list of tool calls left out")
        return {name: value for name, value in message.items() if name != "tool_calls"}

    return [without(message) for message in messages]


def _write_calls(messages: Messages, traits: Traits, note: Note) -> Messages:
    """Write each message's calls in the template's form, or as text where it has none."""
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
    """Give each call a message of its own, and its results behind it, where templates want so."""
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
    """Yield the message's calls one by one, each before its results, then results of no call."""
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
    """Convert arguments to text or objects, whichever the template takes; else leave them."""

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
    """Yield the message's text and its calls as one message or two, as the template takes them."""
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
    """Hash ids of calls to 9 letters and digits, which some templates insist on."""
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
    """Make a tool's result a user's message where the template does not know the tool role."""

    def written(message: dict[str, Any]) -> dict[str, Any]:
        if traits.results or message["role"] != "tool":
            return message
        note("a tool's result as a user's message")
        return {"role": "user", "content": message["content"]}

    return [written(message) for message in messages]


CALL_STEPS: tuple[Step, ...] = (
    _leave_out_empty_calls,
    _space_calls,
    _write_calls,
    _shorten_ids,
    _write_results,
)


# -- messages and calls ----------------------------------------------------------------------------


def _without(message: dict[str, Any], field: str) -> dict[str, Any]:
    return {name: value for name, value in message.items() if name != field}


def _function_of(call: Any) -> dict[str, Any]:
    """Return the call's function; empty where a client sent something else."""
    function = call.get("function") if isinstance(call, dict) else None
    return function if isinstance(function, dict) else {}


def _as_object(arguments: Any) -> dict[str, Any]:
    """Return the arguments as an object; any other value becomes the one argument named
    `arguments`.
    """
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        return {}
    value = _parsed(arguments) if isinstance(arguments, str) else arguments
    return value if isinstance(value, dict) else {"arguments": value}


def _parsed(text: str) -> Any:
    """Return the JSON value of the text; the text itself where it is not JSON that may be kept."""
    try:
        return plain(json.loads(text))
    except (ValueError, RecursionError, NotPlain):
        return text
