"""Hanging up in every phase: it ends within a step, frees its row, and keeps what was computed."""

import pytest

from engines import (
    TOKENIZER,
    completed,
    deltas_of,
    drain,
    fake_engine,
    ids,
    main_blocks,
    phase_of,
    prompt_of,
    run,
    scripted,
    step,
    text_of,
    user,
)
from keepwarm import BlockPoolBatchEngine
from keepwarm.core.events import Event, FinishReason
from keepwarm.core.sequence import Phase


def cancelled(engine: BlockPoolBatchEngine, request_id: str, before: list[Event]) -> None:
    """Cancel it, and see that it ended rightly."""
    assert engine.cancel(request_id)
    engine.check()
    assert request_id not in engine._turns.active
    events = before + step(engine)
    done = completed(events, request_id)
    assert done.finish_reason is FinishReason.CANCELLED
    assert done.text == text_of(events, request_id)
    assert not engine.cancel(request_id)


def test_while_it_waits() -> None:
    engine = fake_engine(max_rows=1)
    first = engine.submit(token_ids=ids(9), max_tokens=3)
    waiting = engine.submit(agent_id="ada", token_ids=ids(9, 1), max_tokens=3)
    events = step(engine)
    assert phase_of(engine, waiting) == Phase.WAITING
    cancelled(engine, waiting, [])
    assert completed(events + drain(engine), first).usage.completion_tokens == 3
    assert engine.agent("ada").num_turns == 0


def test_before_any_step() -> None:
    engine = fake_engine()
    request_id = engine.submit(agent_id="ada", messages=[user("Hello")])
    cancelled(engine, request_id, [])
    assert not engine.has_work
    assert not engine.agent("ada").in_use


def test_while_it_restores() -> None:
    engine = fake_engine(restore_bytes_per_step=1)
    run(engine, agent_id="ada", token_ids=ids(800), max_tokens=1)
    engine.demote("ada")
    beside = engine.submit(token_ids=ids(9, 5), max_tokens=30)
    step(engine, 3)
    request_id = engine.submit(agent_id="ada", token_ids=[*ids(800), 1, 2, 3], max_tokens=4)
    events = step(engine, 2)
    assert phase_of(engine, request_id) == Phase.RESTORING
    cancelled(engine, request_id, events)
    assert main_blocks(engine, "ada").num_tokens >= 768
    completed(drain(engine), beside)


def test_while_it_prefills() -> None:
    engine = fake_engine(idle_prefill_tokens=256)
    request_id = engine.submit(agent_id="ada", token_ids=ids(2000), max_tokens=4)
    events = step(engine, 3)
    assert phase_of(engine, request_id) == Phase.PREFILLING
    cancelled(engine, request_id, events)
    assert engine.agent("ada").held_tokens == 768
    again = run(engine, agent_id="ada", token_ids=ids(2000), max_tokens=4)
    assert again.usage.cached_tokens == 768


def test_while_it_decodes() -> None:
    engine = fake_engine()
    request_id = engine.submit(agent_id="ada", token_ids=ids(20), max_tokens=50)
    events = step(engine, 8)
    assert phase_of(engine, request_id) == Phase.DECODING
    cancelled(engine, request_id, events)
    kept = sum(len(delta.token_ids) for delta in deltas_of(events, request_id))
    assert engine.agent("ada").num_tokens == 20 + kept
    assert engine.agent("ada").num_turns == 1


def test_after_its_last_token() -> None:
    engine = fake_engine()
    request_id = engine.submit(token_ids=ids(20), max_tokens=2)
    done = completed(drain(engine), request_id)
    assert done.finish_reason is FinishReason.LENGTH
    assert not engine.cancel(request_id)
    assert not engine.has_work


def test_in_the_step_before_its_last_token() -> None:
    engine = fake_engine()
    request_id = engine.submit(token_ids=ids(20), max_tokens=2)
    events = step(engine, 2)
    assert engine._turns.active[request_id].sequence.num_reply_tokens == 1
    cancelled(engine, request_id, events)


def test_the_row_of_a_cancelled_request_is_free_in_the_next_step() -> None:
    engine = fake_engine(max_rows=1)
    first = engine.submit(token_ids=ids(9), max_tokens=100)
    second = engine.submit(token_ids=ids(9, 1), max_tokens=1)
    step(engine, 3)
    engine.cancel(first)
    step(engine)
    assert phase_of(engine, second) != Phase.WAITING


def test_while_half_a_character_is_held_back() -> None:
    smile = list("😀".encode())
    engine = scripted(*b"ab", *smile)
    request_id = engine.submit(agent_id="ada", messages=[user("Hello")], max_tokens=20)
    events = step(engine, 5)
    assert engine._turns.active[request_id].sequence.num_reply_tokens == 4
    cancelled(engine, request_id, events)
    assert text_of(events, request_id) == "ab"
    run(engine, agent_id="ada", append=[user("Go on")], max_tokens=6)


def test_others_are_not_disturbed() -> None:
    engine = fake_engine()
    requests = [engine.submit(token_ids=ids(40, salt), max_tokens=20) for salt in range(3)]
    events = step(engine, 6)
    engine.cancel(requests[1])
    events += drain(engine)
    for salt in (0, 2):
        alone = run(fake_engine(), token_ids=ids(40, salt), max_tokens=20)
        assert completed(events, requests[salt]).token_ids == alone.token_ids


def test_an_unknown_request_is_not_cancelled() -> None:
    assert not fake_engine().cancel("req-9")


@pytest.mark.parametrize("num_steps", range(14))
def test_a_preempted_request_in_any_phase(num_steps: int) -> None:
    """Cancelled at each step after its preemption, with text held back for a stop string."""
    engine = fake_engine(num_blocks=5, reserve_reply_tokens=0, restore_bytes_per_step=1)
    oldest = engine.submit(agent_id="ada", token_ids=ids(500), max_tokens=300)
    young = engine.submit(agent_id="bob", token_ids=ids(500, 1), max_tokens=300)
    events: list[Event] = []
    while not engine.batch.counters.preemptions:
        events += step(engine)
    sequence = engine._turns.active[young].sequence
    events += step(engine, num_steps)
    assert sequence.num_preemptions
    if young in engine._turns.active:
        cancelled(engine, young, events)
    completed(events + drain(engine), oldest)


def test_before_its_first_token_the_conversation_stays_as_it_was() -> None:
    engine = fake_engine(idle_prefill_tokens=100)
    run(engine, agent_id="ada", messages=[user("Hello")], max_tokens=5)
    before = engine.agent("ada")
    request_id = engine.submit(agent_id="ada", append=[user("x" * 400)], max_tokens=5)
    events = step(engine, 2)
    assert phase_of(engine, request_id) == Phase.PREFILLING
    cancelled(engine, request_id, events)
    after = engine.agent("ada")
    assert (after.num_tokens, after.num_turns) == (before.num_tokens, 1)
    again = engine.submit(agent_id="ada", append=[user("And?")], max_tokens=1)
    assert len(prompt_of(engine, again)) < before.num_tokens + 30
    drain(engine)


@pytest.mark.parametrize("action", ["fork", "rollback"])
def test_what_another_continuation_left_behind_is_not_the_conversations(action: str) -> None:
    engine = fake_engine(idle_prefill_tokens=100)
    run(engine, agent_id="ada", messages=[user("x" * 300 + "y" * 100)], max_tokens=5)
    request_id = engine.submit(agent_id="ada", messages=[user("x" * 300 + "z" * 400)])
    events = step(engine, 3)
    cancelled(engine, request_id, events)
    if action == "fork":
        engine.fork("ada", "bob")
    else:
        engine.rollback("ada", turn=1)
    engine.check()
    view = engine.agent("bob" if action == "fork" else "ada")
    num_shared = len(TOKENIZER.encode("user\n")) + 2 + 300
    assert view.num_tokens > num_shared + 100
    assert view.held_tokens <= num_shared
