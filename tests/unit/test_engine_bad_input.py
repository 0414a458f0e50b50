"""What the engine refuses, with which facts, and that a refusal takes nothing."""

from typing import Any

import pytest

from engines import BLOCK_BYTES, completed, drain, fake_engine, ids, run, step, user
from keepwarm import BlockPoolBatchEngine
from keepwarm.core.errors import (
    AgentBusy,
    AgentExists,
    ContextTooLong,
    InvalidRequest,
    NeverFits,
    QueueFull,
    UnknownAgent,
)
from keepwarm.engine.requests import valid_sampling

HELLO = [user("Hello")]


def state(engine: BlockPoolBatchEngine) -> object:
    return (engine.agents(), engine.tiers.pool.snapshot(), engine.batch.waiting, engine.has_work)


@pytest.fixture
def engine() -> BlockPoolBatchEngine:
    return fake_engine()


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        ({}, "prompt"),
        ({"messages": HELLO, "text": "Hello"}, "prompt"),
        ({"messages": []}, "messages"),
        ({"messages": "Hello"}, "messages"),
        ({"messages": ["Hello"]}, "messages"),
        ({"messages": [{"role": "wizard", "content": "Hello"}]}, "messages"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages"),
        ({"append": [], "agent_id": "ada"}, "messages"),
        ({"append": HELLO}, "append"),
        ({"text": ""}, "text"),
        ({"text": 7}, "text"),
        ({"token_ids": []}, "token_ids"),
        ({"token_ids": [-1]}, "token_ids"),
        ({"token_ids": [271]}, "token_ids"),
        ({"token_ids": [1.0]}, "token_ids"),
        ({"token_ids": [True]}, "token_ids"),
        ({"token_ids": "abc"}, "token_ids"),
        ({"token_ids": 5}, "token_ids"),
        ({"messages": HELLO, "max_tokens": 0}, "max_tokens"),
        ({"messages": HELLO, "max_tokens": -5}, "max_tokens"),
        ({"messages": HELLO, "max_tokens": 1.5}, "max_tokens"),
        ({"messages": HELLO, "max_tokens": True}, "max_tokens"),
        ({"messages": HELLO, "temperature": -0.1}, "temperature"),
        ({"messages": HELLO, "temperature": float("nan")}, "temperature"),
        ({"messages": HELLO, "temperature": float("inf")}, "temperature"),
        ({"messages": HELLO, "temperature": "hot"}, "temperature"),
        ({"messages": HELLO, "top_p": 1.1}, "top_p"),
        ({"messages": HELLO, "top_p": -0.1}, "top_p"),
        ({"messages": HELLO, "min_p": 1.1}, "min_p"),
        ({"messages": HELLO, "top_k": -1}, "top_k"),
        ({"messages": HELLO, "top_k": 1.5}, "top_k"),
        ({"messages": HELLO, "seed": -1}, "seed"),
        ({"messages": HELLO, "seed": 1 << 64}, "seed"),
        ({"messages": HELLO, "seed": 0.5}, "seed"),
        ({"messages": HELLO, "stop": ""}, "stop"),
        ({"messages": HELLO, "stop": ["a", ""]}, "stop"),
        ({"messages": HELLO, "stop": 7}, "stop"),
        ({"messages": HELLO, "priority": 101}, "priority"),
        ({"messages": HELLO, "priority": 0.5}, "priority"),
        ({"messages": HELLO, "agent_id": ""}, "agent_id"),
        ({"messages": HELLO, "agent_id": "../ada"}, "agent_id"),
        ({"messages": HELLO, "agent_id": "ada/../eve"}, "agent_id"),
        ({"messages": HELLO, "agent_id": "a" * 129}, "agent_id"),
        ({"messages": HELLO, "agent_id": "ada\n"}, "agent_id"),
        ({"messages": HELLO, "agent_id": 7}, "agent_id"),
    ],
    ids=repr,
)
def test_a_wrong_value_is_named_and_nothing_is_taken(
    engine: BlockPoolBatchEngine, request_: dict[str, Any], field: str
) -> None:
    run(engine, agent_id="ada", messages=HELLO, max_tokens=2)
    before = state(engine)
    with pytest.raises(InvalidRequest) as caught:
        engine.submit(**request_)
    assert caught.value.field == field
    assert state(engine) == before
    engine.check()


def test_the_bad_id_and_its_place_are_said(engine: BlockPoolBatchEngine) -> None:
    with pytest.raises(InvalidRequest, match=r"999 at position 2 is not an id from 0 to 270"):
        engine.submit(token_ids=[1, 2, 999])


@pytest.mark.parametrize("num_tokens", [500, 501, 900])
def test_a_prompt_that_leaves_no_room_in_the_context_is_refused(num_tokens: int) -> None:
    engine = fake_engine(max_context_tokens=500)
    before = state(engine)
    with pytest.raises(ContextTooLong) as caught:
        engine.submit(agent_id="ada", token_ids=ids(num_tokens))
    assert str(caught.value) == (
        f"prompt is too long: {num_tokens} tokens > 499 maximum; this model's maximum context "
        "length is 500 tokens with the reply; shorten the conversation"
    )
    assert caught.value.num_prompt_tokens == num_tokens
    assert caught.value.max_context_tokens == 500
    assert state(engine) == before


def test_a_reply_ends_where_the_context_does() -> None:
    engine = fake_engine(max_context_tokens=500)
    assert run(engine, token_ids=ids(499), max_tokens=50).usage.completion_tokens == 1
    assert run(engine, token_ids=ids(480)).usage.completion_tokens == 20


def test_a_prompt_that_never_fits_is_refused_with_the_bytes() -> None:
    engine = fake_engine(num_blocks=2)
    before = state(engine)
    with pytest.raises(NeverFits) as caught:
        engine.submit(agent_id="ada", token_ids=ids(512))
    assert str(caught.value).startswith("prompt is too long: 512 tokens > 511 maximum; ")
    assert caught.value.needed_bytes == 3 * BLOCK_BYTES
    assert caught.value.budget_bytes == 2 * BLOCK_BYTES
    assert state(engine) == before


def test_the_longest_prompt_that_fits_gets_an_answer() -> None:
    engine = fake_engine(num_blocks=2)
    assert run(engine, token_ids=ids(511), max_tokens=9).usage.completion_tokens == 1


def test_a_prompt_of_one_token_gets_an_answer(engine: BlockPoolBatchEngine) -> None:
    done = run(engine, token_ids=[5], max_tokens=3)
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (1, 3)


def test_a_full_queue_says_how_many_wait() -> None:
    engine = fake_engine(max_rows=1, max_waiting=2)
    accepted = [engine.submit(messages=HELLO, max_tokens=2) for _ in range(2)]
    before = state(engine)
    with pytest.raises(QueueFull) as caught:
        engine.submit(agent_id="ada", messages=HELLO)
    assert caught.value.num_waiting == 2
    assert state(engine) == before
    events = drain(engine)
    for request_id in accepted:
        completed(events, request_id)
    engine.submit(messages=HELLO, max_tokens=1)


@pytest.mark.parametrize("action", ["append", "fork", "rollback", "demote", "forget", "delete"])
def test_what_needs_the_agent_at_rest_waits_for_its_request(
    engine: BlockPoolBatchEngine, action: str
) -> None:
    actions = {
        "append": lambda: engine.submit(agent_id="ada", append=HELLO, max_tokens=2),
        "fork": lambda: engine.fork("ada", "bob"),
        "rollback": lambda: engine.rollback("ada", turn=0),
        "demote": lambda: engine.demote("ada"),
        "forget": lambda: engine.forget_cache("ada"),
        "delete": lambda: engine.delete("ada"),
    }
    engine.submit(agent_id="ada", messages=HELLO, max_tokens=4)
    step(engine)
    with pytest.raises(AgentBusy) as caught:
        actions[action]()
    assert caught.value.agent_id == "ada"
    drain(engine)
    actions[action]()
    drain(engine)


@pytest.mark.parametrize("action", ["append", "fork", "rollback", "demote", "pin", "delete", "see"])
def test_an_unknown_agent_is_refused(engine: BlockPoolBatchEngine, action: str) -> None:
    actions = {
        "append": lambda: engine.submit(agent_id="ada", append=HELLO, max_tokens=2),
        "fork": lambda: engine.fork("ada", "bob"),
        "rollback": lambda: engine.rollback("ada", turn=0),
        "demote": lambda: engine.demote("ada"),
        "pin": lambda: engine.pin("ada"),
        "delete": lambda: engine.delete("ada"),
        "see": lambda: engine.agent("ada"),
    }
    with pytest.raises(UnknownAgent) as caught:
        actions[action]()
    assert caught.value.agent_id == "ada"
    assert engine.agents() == ()


def test_a_fork_overwrites_no_agent(engine: BlockPoolBatchEngine) -> None:
    run(engine, agent_id="ada", messages=HELLO, max_tokens=2)
    run(engine, agent_id="bob", messages=HELLO, max_tokens=2)
    for new_id in ("ada", "bob"):
        with pytest.raises(AgentExists) as caught:
            engine.fork("ada", new_id)
        assert caught.value.agent_id == new_id


@pytest.mark.parametrize("turn", [-1, 2])
def test_a_turn_that_never_was_is_refused(engine: BlockPoolBatchEngine, turn: int) -> None:
    run(engine, agent_id="ada", messages=HELLO, max_tokens=2)
    with pytest.raises(InvalidRequest, match="from 0 to 1"):
        engine.rollback("ada", turn=turn)
    with pytest.raises(InvalidRequest, match="from 0 to 1"):
        engine.fork("ada", "bob", at_turn=turn)
    assert len(engine.agents()) == 1


@pytest.mark.parametrize("new_id", [None, "", "a b", "-ada"])
def test_a_fork_needs_a_name(engine: BlockPoolBatchEngine, new_id: Any) -> None:
    run(engine, agent_id="ada", messages=HELLO, max_tokens=2)
    with pytest.raises(InvalidRequest):
        engine.fork("ada", new_id)


def test_append_needs_a_history_of_messages(engine: BlockPoolBatchEngine) -> None:
    run(engine, agent_id="ada", text="Hello", max_tokens=2)
    with pytest.raises(InvalidRequest) as caught:
        engine.submit(agent_id="ada", append=HELLO)
    assert caught.value.field == "append"


@pytest.mark.parametrize("temperature", [0, 1e-300, 9.9e-5])
def test_a_temperature_that_only_overflows_is_greedy(temperature: float) -> None:
    sampling = {"top_p": 0.0, "top_k": 0, "min_p": 0.0, "seed": 1}
    assert valid_sampling(temperature=temperature, **sampling).temperature == 0.0
    assert valid_sampling(temperature=1e-4, **sampling).temperature == 1e-4
