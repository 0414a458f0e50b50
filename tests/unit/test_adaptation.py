"""How messages are adapted to a template: openly, and so that a prompt's beginning stays."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from engines import assistant, fake_engine, run, user
from keepwarm.core.errors import InvalidRequest, TemplateRefused
from keepwarm.core.ports import Message, Piece
from keepwarm.engine.prompt.template.adaptation import JOINT, adapt
from keepwarm.engine.prompt.template.chat_renderer import ChatRenderer
from keepwarm.engine.prompt.template.traits import (
    ABSENT,
    AS_SENT,
    Beside,
    CallTraits,
    Traits,
    traits_of,
)
from keepwarm.testing.tokenizer import FakeTokenizer

TOOLS = [
    {"id": f"call_{n}", "type": "function", "function": {"name": f"f{n}", "arguments": arguments}}
    for n, arguments in enumerate(['{"a": 1}', {"a": 1}, "", "no json", "[1]", None, '{"b": {}}'])
]

CALLS = st.builds(
    CallTraits,
    empty_content=st.sampled_from(["", None, ABSENT]),
    takes_text=st.booleans(),
    takes_objects=st.booleans(),
    has_short_ids=st.booleans(),
    beside=st.sampled_from(Beside),
    at_once=st.booleans(),
)
TRAITS = st.builds(
    Traits,
    developers=st.booleans(),
    late_developers=st.booleans(),
    systems=st.booleans(),
    several_systems=st.booleans(),
    lone_systems=st.booleans(),
    late_systems=st.booleans(),
    users_in_a_row=st.booleans(),
    assistants_in_a_row=st.booleans(),
    empty_answers=st.booleans(),
    empty_calls=st.booleans(),
    calls=st.none() | CALLS,
    results=st.booleans(),
    users_behind_results=st.booleans(),
)
MESSAGES = st.one_of(
    st.builds(user, st.sampled_from(["one", "two", ""])),
    st.builds(assistant, st.sampled_from(["three", "four", ""])),
    st.just({"role": "system", "content": "five"}),
    st.just({"role": "developer", "content": "six"}),
    st.builds(
        lambda calls, content: {**assistant(content), "tool_calls": calls},
        st.lists(st.sampled_from(TOOLS), max_size=3),
        st.sampled_from(["seven", ""]),
    ),
    st.builds(
        lambda n: {"role": "tool", "content": "eight", "tool_call_id": f"call_{n}"},
        st.integers(0, 3),
    ),
)
CONVERSATIONS = st.lists(MESSAGES, min_size=1, max_size=8)


def says_something(message: Message) -> bool:
    return message["role"] != "assistant" or bool(message["content"] or message.get("tool_calls"))


@given(messages=CONVERSATIONS, following=CONVERSATIONS, traits=TRAITS)
@example(
    messages=[assistant("")],
    following=[user("two")],
    traits=replace(AS_SENT, empty_answers=False),
)
def test_what_follows_a_reply_changes_nothing_before_it(
    messages: list[Message], following: list[Message], traits: Traits
) -> None:
    before = adapt(messages, traits).messages
    after = adapt([*messages, assistant("said"), *following], traits).messages
    if not traits.empty_answers and not any(map(says_something, messages)):
        assert after[0]["content"] != before[0]["content"] == ""  # a prompt needs a message
    elif before[-1]["role"] != "assistant" or traits.assistants_in_a_row:
        assert list(after[: len(before)]) == list(before)
    else:  # the reply goes on with the last message
        assert list(after[: len(before) - 1]) == list(before[:-1])
        begun, joined = before[-1], after[len(before) - 1]
        assert str(joined.get("content")).startswith(str(begun.get("content")))


@given(messages=CONVERSATIONS, traits=TRAITS)
def test_what_was_sent_is_left_alone(messages: list[Message], traits: Traits) -> None:
    sent = copy.deepcopy(messages)
    adapt(messages, traits)
    assert messages == sent


@given(messages=CONVERSATIONS, traits=TRAITS)
def test_every_change_has_a_note(messages: list[Message], traits: Traits) -> None:
    adapted = adapt(messages, traits)
    assert bool(adapted.notes) == (list(adapted.messages) != messages)
    assert all(note.isascii() and len(note) < 120 for note in adapted.notes)


@given(messages=CONVERSATIONS)
def test_a_template_that_takes_everything_is_given_what_was_sent(messages: list[Message]) -> None:
    assert adapt(messages, AS_SENT).messages == messages


@given(messages=CONVERSATIONS, traits=TRAITS)
def test_no_word_is_lost_without_a_note(messages: list[Message], traits: Traits) -> None:
    adapted = adapt(messages, traits)
    text = str(adapted.messages)
    lost = [m["content"] for m in messages if m["content"] and m["content"] not in text]
    assert not lost or "text that was said with tool calls left out" in adapted.notes
    for message in messages:
        for call in message.get("tool_calls", ()):
            assert call["function"]["name"] in text


@pytest.mark.parametrize(
    ("sent", "meant"),
    [
        ('{"a": 1}', {"a": 1}),
        ({"a": 1}, {"a": 1}),
        ("", {}),
        (" ", {}),
        (None, {}),
        ("no json", {"arguments": "no json"}),
        ("[1]", {"arguments": [1]}),
        ("0", {"arguments": 0}),
        ('{"a": "\\ud800"}', {"arguments": '{"a": "\\ud800"}'}),
        ("[" * 5000 + "]" * 5000, {"arguments": "[" * 5000 + "]" * 5000}),
        ('{"a": ' * 100 + "1" + "}" * 100, {"arguments": '{"a": ' * 100 + "1" + "}" * 100}),
    ],
)
def test_arguments_become_an_object(sent: object, meant: object) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": sent}}
    traits = Traits(calls=CallTraits(takes_text=False))
    adapted = adapt([{**assistant(""), "tool_calls": [call]}], traits)
    assert adapted.messages[0]["tool_calls"][0]["function"]["arguments"] == meant


def test_arguments_become_text() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": {"a": "é"}}}
    traits = Traits(calls=CallTraits(takes_objects=False))
    adapted = adapt([{**assistant(""), "tool_calls": [call]}], traits)
    assert adapted.messages[0]["tool_calls"][0]["function"]["arguments"] == '{"a": "é"}'
    assert adapted.notes == ("arguments of tool calls as text",)


@pytest.mark.parametrize("garbage", [{}, 7, "f", None, {"function": None}, {"function": "f"}])
@pytest.mark.parametrize("calls", [None, CallTraits(takes_text=False, has_short_ids=True)])
def test_calls_that_are_none_do_no_harm(garbage: object, calls: CallTraits | None) -> None:
    adapt([{**assistant(""), "tool_calls": [garbage, garbage]}], Traits(calls=calls))


def test_calls_one_at_a_time_are_followed_by_their_results() -> None:
    first, second = TOOLS[0], TOOLS[6]
    results = [
        {"role": "tool", "content": "b", "tool_call_id": second["id"]},
        {"role": "tool", "content": "a", "tool_call_id": first["id"]},
        {"role": "tool", "content": "c", "tool_call_id": "another"},
    ]
    messages = [user("add"), {**assistant("well"), "tool_calls": [first, second]}, *results]
    adapted = adapt(messages, Traits(calls=CallTraits(at_once=False)))
    assert list(adapted.messages) == [
        user("add"),
        {**assistant("well"), "tool_calls": [first]},
        results[1],
        {**assistant(""), "tool_calls": [second]},
        results[0],
        results[2],
    ]


@dataclass(frozen=True, slots=True)
class Alternating(FakeTokenizer):
    """Takes a user and an assistant in turns, and tells nobody else's words."""

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True
    ) -> tuple[Piece, ...]:
        for index, message in enumerate(messages):
            if message["role"] != ("user", "assistant")[index % 2]:
                raise TemplateRefused("roles must alternate")
        return FakeTokenizer.render(self, messages, add_generation_prompt=add_generation_prompt)


@dataclass(frozen=True, slots=True)
class Capricious(FakeTokenizer):
    """Takes a user's message only once in a conversation, and a system's first."""

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True
    ) -> tuple[Piece, ...]:
        texts = [message["content"] for message in messages if message["role"] == "user"]
        if "capricious" in texts and [m["role"] for m in messages].index("user") < len(texts) - 1:
            raise TemplateRefused("too much is said")
        return FakeTokenizer.render(self, messages, add_generation_prompt=add_generation_prompt)


def text_of(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def test_a_template_is_asked_what_it_takes() -> None:
    plain = traits_of(FakeTokenizer().render)
    assert plain == Traits(
        developers=False,
        late_developers=False,
        several_systems=False,
        late_systems=False,
        calls=None,
    )
    strict = traits_of(Alternating().render)
    assert not (strict.systems or strict.users_in_a_row or strict.results or strict.lone_systems)


def test_a_template_that_says_nothing_is_left_to_say_so() -> None:
    def refuse(*arguments: Any, **more: Any) -> tuple[Piece, ...]:
        raise InvalidRequest("messages", "the model has no chat template")

    assert traits_of(refuse) == AS_SENT


def test_the_reply_goes_on_with_the_last_message() -> None:
    renderer = ChatRenderer(Alternating())
    begun = [user("hi"), assistant("Well")]
    rendered = renderer.render(begun)
    assert text_of(rendered.pieces).endswith(f"assistant\nWell{JOINT}")
    assert rendered.notes == ("the reply goes on with the assistant's last message",)
    whole = text_of(renderer.pieces([*begun, assistant("then"), user("Go on")]))
    assert whole.startswith(text_of(rendered.pieces) + "then")


def test_a_system_message_goes_to_the_front_only_where_nothing_else_helps() -> None:
    system = {"role": "system", "content": "Be brief."}
    renderer = ChatRenderer(Capricious())
    in_place = renderer.render([user("Hello"), assistant("yes"), system, user("more")])
    assert in_place.notes == ("a system message as a user's",)
    moved = renderer.render([user("capricious"), assistant("yes"), system])
    assert text_of(moved.pieces).index("Be brief.") < text_of(moved.pieces).index("capricious")
    assert moved.notes == (
        "a later system message stands at the front, so that the prompt begins otherwise",
    )


def test_what_no_form_can_say_is_refused_in_the_words_of_the_template() -> None:
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        ChatRenderer(Alternating()).render([assistant("first"), user("then")])


def test_an_agent_keeps_what_was_sent() -> None:
    engine = fake_engine(tokenizer=Alternating())
    sent = [{"role": "system", "content": "You help."}, user("hi"), user("again")]
    run(engine, agent_id="ada", messages=sent, max_tokens=3)
    messages = engine.turns("ada")[0].messages
    assert messages is not None
    assert list(messages[:3]) == sent


def test_events_say_what_was_adapted() -> None:
    engine = fake_engine(tokenizer=Alternating())
    done = run(engine, agent_id="ada", messages=[user("hi"), user("again")], max_tokens=3)
    assert done.adapted == ("a user's messages in a row joined",)
    more = run(engine, agent_id="ada", append=[user("more"), user("yet")], max_tokens=3)
    assert more.adapted == done.adapted
    assert more.usage.cached_tokens >= done.usage.prompt_tokens
    assert run(engine, text="bare", max_tokens=3).adapted == ()
    begun = [user("hi"), user("again"), assistant("We")]
    said = run(engine, messages=begun, continue_final_message=True, max_tokens=3)
    assert said.adapted == done.adapted
