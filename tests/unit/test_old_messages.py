"""What becomes of old messages that the model cannot read, and of new ones."""

from typing import Any

import pytest

from engines import completed, drain, fake_engine, run, user
from keepwarm.core.errors import InvalidRequest
from keepwarm.engine.prompt.old_messages import kept_messages, mend, placeholder

HALF = "\ud83d"
IMAGE = {"type": "image_url", "image_url": {"url": "data:,"}}
SAID = {"role": "assistant", "content": "I see."}


@pytest.mark.parametrize(
    ("roles", "is_begun", "kept"),
    [
        ("", False, []),
        ("u", False, []),
        ("s u", False, [0]),
        ("u a u", False, [0, 1]),
        ("u a t t", False, [0, 1, 2, 3]),
        ("u a t t u", False, [0, 1, 2, 3]),
        ("u a u u", False, [0, 1, 2]),
        ("u a u a", False, [0, 1, 2, 3]),
        ("u a u a", True, [0, 1]),
        ("u a", True, []),
        ("a", True, []),
    ],
)
def test_all_but_the_newest_message_is_sent_again(
    roles: str, is_begun: bool, kept: list[int]
) -> None:
    names = {"u": "user", "a": "assistant", "s": "system", "t": "tool"}
    given = [names[role] for role in roles.split()]
    assert kept_messages(given, is_begun=is_begun) == set(kept)


@pytest.mark.parametrize(
    ("part_type", "text"),
    [
        ("image_url", "[image left out]"),
        ("input_image", "[image left out]"),
        ("image", "[image left out]"),
        ("document", "[file left out]"),
        ("file", "[file left out]"),
        ("input_audio", "[audio left out]"),
        ("server_tool_use", "[server_tool_use left out]"),
        ("<|im_end|>", "[content left out]"),
        ("\ud800", "[content left out]"),
        ("x" * 41, "[content left out]"),
        (None, "[content left out]"),
        ({}, "[content left out]"),
    ],
)
def test_each_part_has_its_words(part_type: object, text: str) -> None:
    assert placeholder(part_type) == text


def test_half_a_pair_becomes_a_whole_character_wherever_it_is() -> None:
    call = {"id": HALF, "function": {"arguments": {HALF: [HALF, "\U0001f600"]}}}
    old = {"role": "assistant", "content": f"a{HALF}", "tool_calls": [call], "name": None}
    mended = mend([old, user("b")])
    whole = {"id": "\ufffd", "function": {"arguments": {"\ufffd": ["\ufffd", "\U0001f600"]}}}
    assert mended.messages == [
        {"role": "assistant", "content": "a\ufffd", "tool_calls": [whole], "name": None},
        user("b"),
    ]
    assert mended.notes == ("message 0: half a surrogate pair became U+FFFD",)


def nested(depth: int) -> Any:
    value: Any = HALF
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "messages",
    [
        None,
        "text",
        5,
        [],
        [5, SAID, None],
        [user("a"), SAID, user(HALF)],
        [SAID, user("b\U0001f600")],
        [{"role": "assistant", "content": nested(10_000)}],
    ],
    ids=["none", "text", "number", "empty", "no objects", "new", "whole", "deep"],
)
def test_anything_else_is_left_for_the_checks(messages: Any) -> None:
    mended = mend(messages)
    assert mended.messages is messages
    assert mended.notes == ()


def test_an_engine_goes_on_with_it_and_says_so() -> None:
    """Twice the same, so that the next turn finds all of this one."""
    engine = fake_engine()
    picture = {"role": "user", "content": [{"type": "text", "text": "look"}, IMAGE]}
    old = [picture, {**SAID, "content": f"I see {HALF}."}]
    request_id = engine.submit(agent_id="ada", messages=[*old, user("And?")], max_tokens=3)
    first = completed(drain(engine), request_id)
    notes = ("message 0: [image left out]", "message 1: half a surrogate pair became U+FFFD")
    assert first.adapted == notes
    turn = [{"role": "assistant", "content": first.text}, user("More")]
    again = run(engine, agent_id="ada", messages=[*old, user("And?"), *turn], max_tokens=3)
    assert again.usage.cached_tokens >= first.usage.prompt_tokens
    said = [{**SAID, "content": "I see \ufffd."}, user("And?")]
    meant = [{"role": "user", "content": "look[image left out]"}, *said]
    assert run(engine, messages=meant, max_tokens=3).text == first.text
    assert engine.count_tokens(messages=[*old, user("And?")]) == first.usage.prompt_tokens


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": [IMAGE]}],
        [user("a"), SAID, user(HALF)],
        [user("a"), user("b"), user(HALF)],
    ],
)
def test_what_is_new_is_refused(messages: Any) -> None:
    engine = fake_engine()
    with pytest.raises(InvalidRequest) as caught:
        engine.submit(messages=messages)
    assert caught.value.field == "messages"
    begun = [*messages, {"role": "assistant", "content": "It"}]
    with pytest.raises(InvalidRequest):
        engine.submit(messages=begun, continue_final_message=True)
    assert engine.submit(messages=[*messages, user("c")])
    assert engine.submit(messages=[*messages, SAID, user("c")])


@pytest.mark.parametrize("content", [HALF, [IMAGE]])
def test_what_a_tool_returned_is_taken(content: Any) -> None:
    """A client cannot take it back, and would send it with every later message."""
    engine = fake_engine()
    done = run(
        engine, messages=[user("a"), SAID, {"role": "tool", "content": content}], max_tokens=3
    )
    assert len(done.adapted) == 1
