"""What a chat template takes, found out by rendering small conversations with it.

Templates refuse what their authors did not think of, drop it without a word, or write it wrongly. A
template is probed once and not with each conversation: how a conversation's beginning is written
must not depend on what follows, or the prompt's beginning would change with every turn.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Protocol

from keepwarm.core.errors import InvalidRequest
from keepwarm.core.ports import Message, Piece

ABSENT = object()
"""Stands for a message without a `content`: some templates ask for that, and some for None."""

EMPTY_CONTENTS = ("", None, ABSENT)
"""The contents that a message with tool calls and no text may have, in the order of trial."""

USER, ANSWER, MORE, AGAIN, SYSTEM = "asked0", "answered1", "asked2", "answered3", "ruled4"
TOOL, KEY, VALUE, RESULT = "called5", "named6", "valued7", "returned8"
OTHER_TOOL = "called9"
LONG_ID, SHORT_ID, OTHER_ID = "call_0123456789abcdef", "a1b2c3d4e", "b1c2d3e4f"

LATE = "user assistant {0} user, user assistant {0}, user {0} assistant user"


class Render(Protocol):
    """Renders messages with a template as they are. Raises InvalidRequest where it refuses."""

    def __call__(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True
    ) -> Sequence[Piece]: ...


class Beside(StrEnum):
    """Where a template writes the text that an assistant says with its tool calls."""

    TOGETHER = "together"
    APART = "apart"
    """Only in a message of its own."""
    NOWHERE = "nowhere"


@dataclass(frozen=True, slots=True)
class CallTraits:
    """How a template takes tool calls.

    `empty_content`: the content of a message that only calls. `takes_text`, `takes_objects`: what
    arguments may be. `at_once`: whether a message may have several calls, with their results
    behind it.
    """

    empty_content: object = ""
    takes_text: bool = True
    takes_objects: bool = True
    has_short_ids: bool = False
    beside: Beside = Beside.TOGETHER
    at_once: bool = True


@dataclass(frozen=True, slots=True)
class Traits:
    """What a template writes as it was sent, in its place.

    `developers`: whether it knows that role. `late_...`: messages after the conversation's
    beginning. `lone_systems`: system messages that no user's message follows. `calls` None: the
    template writes tool calls in no form.
    """

    developers: bool = True
    late_developers: bool = True
    systems: bool = True
    several_systems: bool = True
    lone_systems: bool = True
    late_systems: bool = True
    users_in_a_row: bool = True
    assistants_in_a_row: bool = True
    empty_answers: bool = True
    empty_calls: bool = True
    calls: CallTraits | None = CallTraits()
    results: bool = True
    users_behind_results: bool = True


AS_SENT = Traits()


def traits_of(render: Render) -> Traits:
    """Probe a template with some thirty conversations of a few words each."""
    probe = _Probe(render)
    if not probe.says([_said("user", USER)], USER):
        return AS_SENT  # no template, or a broken one: rendering the messages will say so
    calls, developers = probe.calls(), probe.knows_developers()
    return Traits(
        developers=developers,
        late_developers=developers and probe.says_in_order(*LATE.format("developer").split(", ")),
        systems=probe.says_in_order("system user", "system user assistant user"),
        several_systems=probe.says_in_order("system system user"),
        lone_systems=probe.says_in_order("system", "system assistant user"),
        late_systems=probe.says_in_order(*LATE.format("system").split(", ")),
        users_in_a_row=probe.says_in_order("user user", "user assistant user user"),
        assistants_in_a_row=probe.says_in_order("user assistant assistant user"),
        empty_answers=probe.says_empty_answers(),
        empty_calls=probe.ignores_empty_calls(),
        calls=calls,
        results=probe.says_results(calls),
        users_behind_results=probe.says_results(calls, _more()),
    )


class _Probe:
    """Asks one template whether it writes what it is given."""

    def __init__(self, render: Render) -> None:
        self._render = render

    def text(self, messages: Sequence[Message]) -> str | None:
        """Return the rendered text; None where the template refuses the messages."""
        try:
            return "".join(piece.text for piece in self._render(messages))
        except InvalidRequest:
            return None

    def says(self, messages: Sequence[Message], *words: str) -> bool:
        """Whether the rendered text has these words, in this order."""
        text, end = self.text(messages), 0
        if text is None:
            return False
        for word in words:
            start = text.find(word, end)
            if start < 0:
                return False
            end = start + len(word)
        return True

    def says_in_order(self, *shapes: str) -> bool:
        """Whether every conversation with these roles is written whole and in order.

        A shape names the roles that speak in turn, like "system user assistant".
        """
        return all(self._says_shape(shape.split()) for shape in shapes)

    def _says_shape(self, roles: Sequence[str]) -> bool:
        messages = [_said(role, f"uttered{number}") for number, role in enumerate(roles)]
        return self.says(messages, *(message["content"] for message in messages))

    def knows_developers(self) -> bool:
        """Whether it treats a developer otherwise than a role with a nonsensical name."""
        known, nonsense = "developer", "nonsensical"
        messages = [_said(known, SYSTEM), _said("user", USER)]
        if not self.says(messages, SYSTEM, USER):
            return False
        other = self.text([_said(nonsense, SYSTEM), _said("user", USER)])
        return other is None or other.replace(nonsense, known) != self.text(messages)

    def says_empty_answers(self) -> bool:
        """Whether it takes an assistant's message without text."""
        return self.says([_said("user", USER), _said("assistant", ""), _more()], USER, MORE)

    def ignores_empty_calls(self) -> bool:
        """Whether an empty list of tool calls changes nothing."""
        answer = _said("assistant", ANSWER)
        plain = self.text([_said("user", USER), answer, _more()])
        return plain == self.text([_said("user", USER), {**answer, "tool_calls": []}, _more()])

    def calls(self) -> CallTraits | None:
        """Return the first form in which it writes tool calls; None where there is none."""
        for call_id in (LONG_ID, SHORT_ID):
            for content in EMPTY_CONTENTS:
                takes_text = self._takes_arguments(f'{{"{KEY}": "{VALUE}"}}', call_id, content)
                takes_objects = self._takes_arguments({KEY: VALUE}, call_id, content)
                if takes_text or takes_objects:
                    found = CallTraits(content, takes_text, takes_objects, call_id == SHORT_ID)
                    return replace(
                        found, beside=self._beside(found), at_once=self._says_at_once(found)
                    )
        return None

    def _takes_arguments(self, arguments: object, call_id: str, content: object) -> bool:
        """Whether the arguments come out as JSON: not spelled out, escaped, or as Python writes."""
        asked, call = _said("user", USER), _call(arguments, call_id, content)
        for following in (_result(call_id), _more()):
            text = self.text([asked, call, following]) or ""
            is_said = all(word in text for word in (TOOL, KEY, VALUE))
            if is_said and f'\\"{KEY}' not in text and f"'{KEY}'" not in text:
                return True
        return False

    def _beside(self, calls: CallTraits) -> Beside:
        asked, call = _said("user", USER), call_in_form(calls)
        rest = [_result_for(calls), _said("assistant", AGAIN), _more()]
        together = [asked, {**call, "content": ANSWER}, *rest]
        if self.says(together, USER, ANSWER, TOOL, AGAIN, MORE):
            return Beside.TOGETHER
        apart = [asked, _said("assistant", ANSWER), call, *rest]
        if self.says(apart, USER, ANSWER, TOOL, AGAIN, MORE):
            return Beside.APART
        return Beside.NOWHERE

    def _says_at_once(self, calls: CallTraits) -> bool:
        call = call_in_form(calls)
        (first,) = call["tool_calls"]
        second = {**first, "id": OTHER_ID, "function": {**first["function"], "name": OTHER_TOOL}}
        both = {**call, "tool_calls": [first, second]}
        results = [_result_for(calls), {**_result(OTHER_ID), "content": MORE}]
        return self.says([_said("user", USER), both, *results], TOOL, OTHER_TOOL, RESULT, MORE)

    def says_results(self, calls: CallTraits | None, *following: Message) -> bool:
        """Whether it writes a tool's result, and the messages that follow it."""
        call = _said("assistant", TOOL) if calls is None else call_in_form(calls)
        result = _result(LONG_ID) if calls is None else _result_for(calls)
        words = [str(message["content"]) for message in following]
        return self.says([_said("user", USER), call, result, *following], USER, RESULT, *words)


def call_in_form(calls: CallTraits) -> dict[str, Any]:
    """Return the probe's tool call, in the form that the template takes."""
    arguments = f'{{"{KEY}": "{VALUE}"}}' if calls.takes_text else {KEY: VALUE}
    return _call(arguments, _id_for(calls), calls.empty_content)


def with_content(message: Mapping[str, Any], content: object) -> dict[str, Any]:
    """Return the message with this content, or without any."""
    if content is ABSENT:
        return {name: value for name, value in message.items() if name != "content"}
    return {**message, "content": content}


def _call(arguments: object, call_id: str, content: object) -> dict[str, Any]:
    function = {"name": TOOL, "arguments": arguments}
    calls = [{"id": call_id, "type": "function", "function": function}]
    return with_content({"role": "assistant", "content": "", "tool_calls": calls}, content)


def _result(call_id: str) -> Message:
    return {"role": "tool", "content": RESULT, "tool_call_id": call_id, "name": TOOL}


def _result_for(calls: CallTraits) -> Message:
    return _result(_id_for(calls))


def _id_for(calls: CallTraits) -> str:
    return SHORT_ID if calls.has_short_ids else LONG_ID


def _said(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _more() -> Message:
    return _said("user", MORE)
