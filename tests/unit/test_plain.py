"""What a message may be made of, at every door: what is taken can be kept, shown and carried."""

import json
import math
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines import fake_engine, user
from keepwarm.core.errors import InvalidRequest
from keepwarm.core.plain import MAX_DEPTH, MAX_INT, MIN_INT, NotPlain, plain
from keepwarm.core.stored import DEFAULT_SETTINGS, AgentState, LineState
from keepwarm.core.transcript import EMPTY
from keepwarm.engine.prompt.messages import validate_messages
from keepwarm.store.bundle.agent_json import Unsound, decode_agent, encode_agent
from keepwarm.store.catalog.rows import decode_message, encode_message

BAD_VALUES = [
    math.nan,
    math.inf,
    -math.inf,
    float("1e999"),
    MAX_INT + 1,
    MIN_INT - 1,
    10**5000,
    "\ud800",
    {"\ud800": 1},
    {1: "a key that is no text"},
    b"bytes",
    {1, 2},
    object(),
]


def label(value: object) -> str:
    return "huge" if isinstance(value, int) else f"{value!r:.20}"


def nested(depth: int) -> Any:
    """Lists within one another, with a number inside the innermost."""
    value: Any = 7
    for _ in range(depth):
        value = [value]
    return value


def call(value: Any) -> dict[str, Any]:
    """A message with a tool call that carries the value."""
    function = {"name": "look", "arguments": {"deep": [value]}}
    return {"role": "assistant", "content": "", "tool_calls": [{"function": function}]}


@pytest.mark.parametrize("value", BAD_VALUES, ids=label)
def test_a_request_that_carries_it_is_refused(value: Any) -> None:
    for message in (call(value), {**user("Hello"), "more": value}):
        with pytest.raises(InvalidRequest) as caught:
            validate_messages([user("First"), message])
        assert caught.value.field == "messages"
        assert "message 1" in caught.value.problem


@pytest.mark.parametrize("value", BAD_VALUES, ids=label)
def test_every_way_into_the_engine_refuses_it(value: Any) -> None:
    """In a new message, that is; half characters in old ones are mended."""
    engine = fake_engine()
    engine.create("ada")
    new = [{**user("Hi"), "more": [value]}]
    ways: list[Any] = [
        lambda: engine.submit(messages=new),
        lambda: engine.submit(agent_id="ada", append=new),
        lambda: engine.count_tokens(messages=new),
    ]
    for way in ways:
        with pytest.raises(InvalidRequest):
            way()
    assert not engine._turns.active
    assert engine.turns("ada") == ()


def test_the_edges_are_taken() -> None:
    numbers = (MAX_INT, MIN_INT, 1.7976931348623157e308, -0.0, 5e-324)
    edges: tuple[Any, ...] = (*numbers, "👋", None, True, [])
    assert [plain(value) for value in edges] == list(edges)
    assert plain(nested(MAX_DEPTH)) == nested(MAX_DEPTH)
    with pytest.raises(NotPlain, match="deeper"):
        plain(nested(MAX_DEPTH + 1))


def test_a_message_is_a_copy_as_json_gives_it_back() -> None:
    arguments: dict[str, Any] = {"pair": (1, 2)}
    given_message = {**user("Hello"), "more": arguments}
    (message,) = validate_messages([given_message])
    arguments["pair"] = "changed afterwards"
    assert message["more"] == {"pair": [1, 2]}


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(MIN_INT - 1, MAX_INT + 1)
    | st.floats()
    | st.text(st.characters()),  # lone surrogates included
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(st.characters(), max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)
depths = st.sampled_from([0, 1, 58, 59, 60, 61, 62, 63, 64, 65])


@given(values, depths)
def test_what_one_door_takes_everything_can_hold(value: Any, depth: int) -> None:
    """The catalogue, a bundle and the API's own JSON give back what a request brought."""
    for _ in range(depth):
        value = [value]
    try:
        messages = validate_messages([call(value), {**user("Hello"), "more": value}])
    except InvalidRequest:
        return
    for message in messages:
        assert decode_message(encode_message(message)) == message
        assert json.loads(msgspec.json.encode(message)) == message
    line = LineState(0, "words", EMPTY, messages, (), (), 0)
    state = AgentState("ada", DEFAULT_SETTINGS, (line,))
    assert decode_agent(encode_agent(state)) == state


@given(values)
def test_a_bundle_is_as_strict_as_a_request(value: Any) -> None:
    """JSON can say what no request may bring: numbers without end, and halves of characters."""
    state = AgentState("ada", DEFAULT_SETTINGS, (LineState(0, "words", EMPTY, (), (), (), 0),))
    document = json.loads(encode_agent(state))
    document["lines"][0]["messages"] = [[0, call(value)]]
    document["lines"][0]["head"] = 1
    try:
        messages: Any = validate_messages([call(value)])
    except InvalidRequest:
        messages = None
    try:
        read = decode_agent(json.dumps(document).encode())
    except Unsound:
        assert messages is None
        return
    assert read.lines[0].messages == messages
