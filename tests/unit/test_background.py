"""What no request waits for gives way to requests, and what it has done by then stays."""

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from engines import (
    FakeFactory,
    check_values,
    completed,
    drain,
    fake_engine,
    fresh_reply,
    generator_of,
    ids,
    main_blocks,
    run,
    settle,
    step,
    user,
)
from fleets import Setup, opened
from keepwarm import BlockPoolBatchEngine
from keepwarm.core.agent import Tier
from keepwarm.core.errors import AgentBusy, GeneratorFailed, PoolExhausted, VerifyInterrupted
from keepwarm.kv.verifier import SCRATCH_ROW, VerifyReport
from keepwarm.testing.agent_store import MemoryAgentStore
from keepwarm.testing.generator import FakePayload, FakeSlab

NUM_BLOCKS = 12
LONG = ids(NUM_BLOCKS * 256 + 40)

Act = Callable[[BlockPoolBatchEngine], object]


def cold(**options: Any) -> BlockPoolBatchEngine:
    """An engine on a store that has all of ada, and nothing in memory."""
    store = MemoryAgentStore()
    engine = fake_engine(store=store)
    messages = [user("y" * 3_000), {"role": "assistant", "content": "Yes"}, user("More")]
    run(engine, agent_id="ada", messages=messages, max_tokens=3)
    assert engine.close()
    return fake_engine(store=store, **options)


def prefetching(**options: Any) -> BlockPoolBatchEngine:
    """Ada is being read, and a part of her has come."""
    engine = cold(**options)
    engine.prefetch("ada")
    for _ in range(3):
        step(engine)
    assert engine._prefetches
    assert 0 < main_blocks(engine, "ada").num_tokens < engine.agent("ada").num_tokens - 1
    return engine


class TestPrefetch:
    def test_the_next_message_finds_what_was_read(self) -> None:
        engine = prefetching()
        num_read = main_blocks(engine, "ada").num_tokens
        turn = run(engine, agent_id="ada", append=[user("Next")], max_tokens=3)
        assert turn.turn == 2
        assert not engine.book.get("ada").sides
        assert turn.usage.cached_tokens >= engine.turns("ada")[0].num_tokens - 1 > num_read

    def test_a_whole_conversation_goes_on_with_the_main_line(self) -> None:
        engine = prefetching()
        said = list(engine.book.get("ada").main.messages or ())
        turn = run(engine, agent_id="ada", messages=[*said, user("Next")], max_tokens=3)
        assert not engine.book.get("ada").sides
        assert turn.turn == 2
        assert turn.usage.cached_tokens > 1_000

    @pytest.mark.parametrize("again", [1, 3])
    def test_what_was_read_is_not_read_again(self, again: int) -> None:
        engine = prefetching()
        before = engine.tiers.counters.fetched_tokens
        for _ in range(again):
            engine.prefetch("ada")
        drain(engine)
        total = engine.tiers.counters.fetched_tokens
        assert engine.agent("ada").tier is Tier.HOT
        assert total == engine.agent("ada").num_tokens - 1
        assert before > 0

    @pytest.mark.parametrize(
        "act",
        [
            lambda engine: engine.park("ada"),
            lambda engine: engine.demote("ada"),
            lambda engine: engine.fork("ada", "eve"),
            lambda engine: engine.rollback("ada", turn=0),
            lambda engine: engine.forget_cache("ada"),
            lambda engine: engine.verify("ada"),
            lambda engine: engine.delete("ada"),
            lambda engine: engine.suspend(),
        ],
        ids=["park", "demote", "fork", "rollback", "forget", "verify", "delete", "suspend"],
    )
    def test_whatever_is_asked_of_the_agent_comes_first(self, act: Act) -> None:
        engine = prefetching()
        act(engine)
        assert not engine._prefetches
        assert not engine.batch.running
        engine.check()
        check_values(engine.tiers)

    def test_it_is_not_busy_to_look_at(self) -> None:
        engine = prefetching()
        assert not engine.agent("ada").in_use
        assert not engine.book.get("ada").in_use

    def test_a_row_that_a_request_needs(self) -> None:
        engine = prefetching(max_rows=1)
        request = engine.submit(agent_id="bob", token_ids=ids(30), max_tokens=3)
        step(engine, 2)
        assert not engine._prefetches
        assert [sequence.agent_id for sequence in engine.batch.running] == ["bob"]
        assert completed(drain(engine), request).token_ids == fresh_reply(ids(30), max_tokens=3)

    def test_beside_it_where_there_are_rows(self) -> None:
        engine = prefetching(max_rows=2)
        request = engine.submit(agent_id="bob", token_ids=ids(30), max_tokens=3)
        step(engine)
        assert engine._prefetches
        assert completed(drain(engine), request).token_ids == fresh_reply(ids(30), max_tokens=3)
        assert engine.agent("ada").tier is Tier.HOT

    def test_memory_that_a_request_needs(self) -> None:
        engine = prefetching(num_blocks=18)
        request = engine.submit(agent_id="bob", token_ids=ids(256 * 8), max_tokens=3)
        step(engine)
        assert not engine._prefetches
        turn = completed(drain(engine), request)
        assert turn.token_ids == fresh_reply(ids(256 * 8), max_tokens=3)


def wrong(payload: Any) -> FakePayload:
    values = list(payload.values)
    values[7] += 1
    return FakePayload(tuple(values), payload.token_bytes)


def begin(engine: BlockPoolBatchEngine, agent_id: str = "ada") -> "Future[VerifyReport]":
    result: Future[VerifyReport] = Future()
    engine.begin_verify(agent_id, result)
    return result


def half_verified(**options: Any) -> tuple[BlockPoolBatchEngine, "Future[VerifyReport]"]:
    """Ada has said something, and half of it has been computed again."""
    engine = fake_engine(store=MemoryAgentStore(), **options)
    run(engine, agent_id="ada", token_ids=LONG, max_tokens=3)
    settle(engine)
    result = begin(engine)
    while scratch_tokens(engine) < len(LONG) / 2:
        step(engine)
    assert not result.done()
    return engine, result


def scratch_tokens(engine: BlockPoolBatchEngine) -> int:
    slab = generator_of(engine)._rows.get(SCRATCH_ROW)
    return slab.num_tokens if slab is not None else 0


def check_is_left_clean(engine: BlockPoolBatchEngine) -> None:
    """Nothing of a verification is left."""
    engine.check()
    check_values(engine.tiers)
    assert not engine._verifies
    assert SCRATCH_ROW not in generator_of(engine)._rows
    known = {line.blocks.line for agent in engine.book for line in agent.lines}
    assert set(engine.tiers._lines) == known | {
        line.blocks.line for line in engine._lines.anonymous
    }


class TestVerify:
    @pytest.mark.parametrize("where", ["memory", "disk"])
    def test_beside_requests(self, where: str) -> None:
        engine = fake_engine(store=MemoryAgentStore())
        run(engine, agent_id="ada", token_ids=LONG, max_tokens=3)
        if where == "disk":
            engine.park("ada")
            settle(engine)
            step(engine)
        result = begin(engine)
        request = engine.submit(agent_id="bob", token_ids=ids(300, 1), max_tokens=900)
        sizes = []
        while not result.done():
            before = scratch_tokens(engine)
            step(engine)
            sizes.append(scratch_tokens(engine) - before)
        assert engine._turns.active, "the request has ended before the verification"
        assert max(sizes) <= 256
        report = result.result()
        assert report.passed
        assert report.num_compared == len(LONG) + 2
        assert completed(drain(engine), request).token_ids == fresh_reply(
            ids(300, 1), max_tokens=900
        )
        check_is_left_clean(engine)

    def test_a_prefill_comes_first(self) -> None:
        engine, _ = half_verified()
        engine.submit(agent_id="bob", token_ids=ids(9_000, 1), max_tokens=3)
        step(engine)
        before = scratch_tokens(engine)
        step(engine, 3)
        assert engine.batch.running[0].num_missing
        assert scratch_tokens(engine) == before
        drain(engine)
        check_is_left_clean(engine)

    @pytest.mark.parametrize("prompt", [[*LONG, 7], LONG[:300], ids(50, 3)])
    def test_a_message_calls_it_off(self, prompt: list[int]) -> None:
        engine, result = half_verified()
        turn = run(engine, agent_id="ada", token_ids=prompt, max_tokens=9)
        with pytest.raises(VerifyInterrupted, match="ada"):
            result.result()
        assert turn.token_ids == fresh_reply(prompt, max_tokens=9)
        check_is_left_clean(engine)
        assert engine.verify("ada").passed

    @pytest.mark.parametrize(
        "act",
        [
            lambda engine: engine.park("ada"),
            lambda engine: engine.fork("ada", "eve"),
            lambda engine: engine.rollback("ada", turn=0),
            lambda engine: engine.delete("ada"),
            lambda engine: engine.prefetch("ada"),
            lambda engine: engine.suspend(),
            lambda engine: engine.close(),
        ],
        ids=["park", "fork", "rollback", "delete", "prefetch", "suspend", "close"],
    )
    def test_and_so_does_whatever_is_asked_of_the_agent(self, act: Act) -> None:
        engine, result = half_verified()
        act(engine)
        with pytest.raises(VerifyInterrupted):
            result.result()
        assert scratch_tokens(engine) == 0
        engine.check()

    def test_what_had_differed_by_then_is_dropped(self) -> None:
        engine = fake_engine(store=MemoryAgentStore())
        run(engine, agent_id="ada", token_ids=LONG, max_tokens=3)
        settle(engine)
        slab = main_blocks(engine, "ada").slab
        assert isinstance(slab, FakeSlab)
        slab.values[300] += 1
        result = begin(engine)
        while scratch_tokens(engine) < 600:
            engine.step()
        turn = run(engine, agent_id="ada", token_ids=[*LONG, 7], max_tokens=9)
        with pytest.raises(VerifyInterrupted):
            result.result()
        assert turn.usage.cached_tokens == 256
        assert turn.token_ids == fresh_reply([*LONG, 7], max_tokens=9)
        check_is_left_clean(engine)

    def test_memory_that_a_request_needs(self) -> None:
        engine, result = half_verified(num_blocks=30)
        prompt = ids(256 * 16, 1)
        turn = run(engine, agent_id="bob", token_ids=prompt, max_tokens=3)
        with pytest.raises(VerifyInterrupted, match="memory"):
            result.result()
        assert turn.token_ids == fresh_reply(prompt, max_tokens=3)
        check_is_left_clean(engine)

    def test_memory_that_a_reply_needs(self) -> None:
        """It grows, and takes the room of the cold run, not another's row."""
        engine, result = half_verified(num_blocks=30, reserve_reply_tokens=0)
        prompt = ids(256 * 12 + 250, 1)
        request = engine.submit(agent_id="bob", token_ids=prompt, max_tokens=200)
        step(engine, 15)
        assert not result.done()
        turn = completed(drain(engine), request)
        with pytest.raises(VerifyInterrupted, match="memory"):
            result.result()
        assert turn.timing.num_preemptions == 0
        assert turn.token_ids == fresh_reply(prompt, max_tokens=200)
        check_is_left_clean(engine)

    def test_without_room_for_a_second_copy(self) -> None:
        engine = fake_engine(num_blocks=7)
        run(engine, agent_id="ada", token_ids=ids(1_000), max_tokens=3)
        result = begin(engine)
        drain(engine)
        with pytest.raises(PoolExhausted):
            result.result()
        check_is_left_clean(engine)

    def test_a_step_of_others_that_fails(self) -> None:
        factory = FakeFactory()
        engine, result = half_verified(factory=factory)
        engine.submit(agent_id="bob", token_ids=ids(30, 1), max_tokens=90)
        generator = factory.made[-1]
        generator._fail_at = {generator.num_calls + 1}
        drain(engine)
        with pytest.raises(VerifyInterrupted, match="model failed"):
            result.result()
        check_is_left_clean(engine)
        assert engine.verify("ada").passed

    def test_a_units_error_goes_to_its_caller(self) -> None:
        factory = FakeFactory()
        engine, result = half_verified(factory=factory)
        generator = factory.made[-1]
        generator._fail_at = {generator.num_calls + 1}
        drain(engine)
        with pytest.raises(GeneratorFailed):
            result.result()
        check_is_left_clean(engine)

    def test_the_caller_has_gone(self) -> None:
        engine, result = half_verified()
        assert result.cancel()
        num_prefilled = len(generator_of(engine).prefilled)
        drain(engine)
        assert len(generator_of(engine).prefilled) == num_prefilled
        check_is_left_clean(engine)

    def test_one_after_the_other(self) -> None:
        engine, first = half_verified()
        run(engine, agent_id="bob", token_ids=ids(300, 1), max_tokens=3)
        second = begin(engine, "bob")
        with pytest.raises(AgentBusy):
            begin(engine, "bob")
        drain(engine)
        assert first.result().passed
        assert second.result().passed
        check_is_left_clean(engine)


class TestFleets:
    def test_another_models_request_needs_the_memory(self, tmp_path: Path) -> None:
        with opened(tmp_path, budget_bytes=34 * 2048) as setup:
            setup.attach("other")
            setup.run("small", agent_id="ada", token_ids=LONG, max_tokens=3)
            setup.settle()
            result = begin(setup.fleet.engine("small"))
            setup.step(20)
            prompt = ids(256 * 14, 1)
            turn = setup.run("other", agent_id="bob", token_ids=prompt, max_tokens=3)
            assert turn.token_ids == fresh_reply(prompt, max_tokens=3)
            with pytest.raises(VerifyInterrupted):
                result.result()

    @pytest.mark.parametrize("kind", ["prefetch", "verify"])
    def test_the_agent_moves_to_another_model(self, tmp_path: Path, kind: str) -> None:
        with opened(tmp_path) as setup:
            setup.attach("other")
            setup.fleet.engine("small").create("ada")
            say(setup, "small")
            small = setup.fleet.engine("small")
            small.park("ada")
            setup.settle()
            result: Future[VerifyReport] = Future()
            if kind == "prefetch":
                small.prefetch("ada")
            else:
                small.begin_verify("ada", result)
            setup.step(2)
            assert say(setup, "other") == 2
            assert not small._prefetches
            assert not small._verifies


def say(setup: Setup, model: str) -> int | None:
    return setup.say("ada", "word " * 900, model).turn
