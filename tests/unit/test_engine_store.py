"""Agents that outlive their engine: the engine over a store, with a real one on a real disk."""

from pathlib import Path
from typing import Any

import pytest

from engines import (
    BLOCK_BYTES,
    FakeFactory,
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
from keepwarm import BlockPoolBatchEngine
from keepwarm.core.agent import Tier
from keepwarm.core.errors import UnknownAgent
from keepwarm.testing.agent_store import MemoryAgentStore
from stores import HeldAnswers, Restart


def num_prefilled(engine: BlockPoolBatchEngine) -> int:
    return sum(length for _, length in generator_of(engine).prefilled)


class TestRestart:
    @pytest.mark.parametrize("num_tokens", [5, 255, 256, 257, 600, 2000])
    def test_after_a_clean_stop_nothing_is_computed_again(
        self, restart: Restart, num_tokens: int
    ) -> None:
        first = run(restart(), agent_id="ada", token_ids=ids(num_tokens), max_tokens=20)
        assert first.durable
        said = [*ids(num_tokens), *first.token_ids]
        engine = restart()
        prompt = [*said, 1, 2, 3]
        second = run(engine, agent_id="ada", token_ids=prompt, max_tokens=20)
        assert second.token_ids == fresh_reply(prompt, max_tokens=20)
        assert second.cache.cached_tokens == len(said) - 1
        assert second.cache.tier is Tier.COLD
        assert num_prefilled(engine) == 3

    def test_without_a_clean_stop_less_than_a_block_is_computed_again(
        self, restart: Restart
    ) -> None:
        engine = restart()
        first = run(engine, agent_id="ada", token_ids=ids(1000), max_tokens=100)
        settle(engine)
        engine = restart(clean=False)
        prompt = [*ids(1000), *first.token_ids, 1]
        second = run(engine, agent_id="ada", token_ids=prompt, max_tokens=20)
        assert second.token_ids == fresh_reply(prompt, max_tokens=20)
        assert second.cache.cached_tokens == 1024
        assert second.cache.reason == "evicted"

    def test_the_conversation_goes_on_where_it_was(self, restart: Restart) -> None:
        engine = restart()
        run(engine, agent_id="ada", messages=[user("Hello")], max_tokens=9)
        before = engine.agent("ada")
        engine = restart()
        assert [view.agent_id for view in engine.agents()] == ["ada"]
        after = engine.agent("ada")
        assert (after.num_tokens, after.num_turns) == (before.num_tokens, before.num_turns)
        assert after.tier is Tier.COLD
        assert after.held_tokens == after.num_tokens - 1
        turn = run(engine, agent_id="ada", append=[user("And?")], max_tokens=9)
        assert turn.cache.cached_tokens == before.num_tokens - 1
        assert engine.agent("ada").num_turns == 2

    def test_drifted_ids_survive(self, restart: Restart) -> None:
        """The reply spells a word in bytes; no tokenizer would."""
        spelling = tuple(b"Hello")
        engine = restart(factory=FakeFactory(script=spelling))
        run(engine, agent_id="ada", messages=[user("Hello")], max_tokens=5)
        engine = restart()
        messages = [user("Hello"), {"role": "assistant", "content": "Hello"}, user("More")]
        turn = run(engine, agent_id="ada", messages=messages, max_tokens=1)
        assert turn.cache.reason == "new_message"

    def test_another_model_shares_nothing(self, restart: Restart) -> None:
        run(restart(), agent_id="ada", token_ids=ids(600), max_tokens=5)
        engine = restart(fingerprint="other")
        turn = run(engine, agent_id="ada", token_ids=ids(600), max_tokens=5)
        assert turn.cache.cached_tokens == 0
        assert engine.agent("ada").num_turns > 0

    def test_side_lines_survive(self, restart: Restart) -> None:
        engine = restart()
        requests = [
            engine.submit(agent_id="ada", token_ids=ids(300, salt), max_tokens=5)
            for salt in range(3)
        ]
        events = drain(engine)
        assert all(completed(events, request).durable for request in requests)
        engine = restart()
        assert engine.agent("ada").num_side_lines == 2
        for salt in range(3):
            turn = run(engine, agent_id="ada", token_ids=[*ids(300, salt), 1], max_tokens=5)
            assert turn.cache.cached_tokens >= 300


class TestSharing:
    def test_equal_blocks_are_written_once(self, restart: Restart) -> None:
        engine = restart()
        for salt in range(3):
            run(engine, agent_id=f"a{salt}", token_ids=[*ids(512), *ids(50, salt)], max_tokens=2)
        settle(engine)
        assert engine.snapshot().store.num_records == 2

    def test_another_agent_finds_them_after_a_restart(self, restart: Restart) -> None:
        run(restart(), agent_id="ada", token_ids=ids(600), max_tokens=2)
        turn = run(restart(), agent_id="bob", token_ids=[*ids(520), 1], max_tokens=2)
        assert turn.cache.cached_tokens == 512
        assert turn.token_ids == fresh_reply([*ids(520), 1], max_tokens=2)

    def test_an_anonymous_request_leaves_blocks_and_no_agent(self, restart: Restart) -> None:
        engine = restart()
        assert not run(engine, token_ids=ids(600), max_tokens=2).durable
        engine = restart()
        assert engine.agents() == ()
        turn = run(engine, token_ids=ids(600), max_tokens=2)
        assert turn.cache.cached_tokens == 512


class TestMemoryPressure:
    """A budget of memory for one agent, and several agents on disk."""

    def test_agents_take_turns_and_none_prefills_twice(self, restart: Restart) -> None:
        engine = restart(num_blocks=6)
        prompts = {f"a{n}": ids(600, n) for n in range(4)}
        for agent_id, prompt in prompts.items():
            run(engine, agent_id=agent_id, token_ids=prompt, max_tokens=2)
            settle(engine)
        for agent_id, prompt in prompts.items():
            turn = run(engine, agent_id=agent_id, token_ids=[*prompt, 9], max_tokens=2)
            assert turn.token_ids == fresh_reply([*prompt, 9], max_tokens=2)
            assert turn.cache.cached_tokens == 600
        assert engine.snapshot().tiers.fetched_tokens >= 2 * 600

    def test_what_the_disk_has_goes_first(self, restart: Restart) -> None:
        engine = restart(num_blocks=8)
        run(engine, agent_id="ada", token_ids=ids(500), max_tokens=2)
        settle(engine)
        engine._store.refuses = True  # type: ignore[attr-defined]
        if not isinstance(engine._store, MemoryAgentStore):
            pytest.skip("a real disk refuses only when it is full; see tests/crash")
        run(engine, agent_id="bob", token_ids=ids(500, 1), max_tokens=2)
        engine.demote("ada")
        engine.demote("bob")
        engine.tiers.touch(main_blocks(engine, "ada"))
        run(engine, agent_id="eve", token_ids=ids(1100, 2), max_tokens=2)
        assert main_blocks(engine, "bob").num_tokens >= 256

    def test_a_budget_for_less_than_a_read_buffer_prefills(self, restart: Restart) -> None:
        run(restart(), agent_id="ada", token_ids=ids(500), max_tokens=2)
        engine = restart(num_blocks=2)
        turn = run(engine, agent_id="ada", token_ids=ids(500), max_tokens=2)
        assert turn.token_ids == fresh_reply(ids(500), max_tokens=2)


class TestParkAndPrefetch:
    def test_a_parked_agent_leaves_memory_and_comes_back(self, restart: Restart) -> None:
        engine = restart()
        run(engine, agent_id="ada", token_ids=ids(600), max_tokens=2)
        engine.park("ada")
        settle(engine)
        step(engine)
        assert main_blocks(engine, "ada").num_tokens == 0
        assert engine.agent("ada").tier is Tier.COLD
        turn = run(engine, agent_id="ada", token_ids=ids(600), max_tokens=2)
        assert turn.cache.tier is Tier.COLD
        assert turn.cache.cached_tokens == 599

    def test_what_the_disk_has_lost_is_saved_again_before_it_leaves(self, restart: Restart) -> None:
        engine = restart()
        run(engine, agent_id="ada", token_ids=ids(600), max_tokens=2)
        settle(engine)
        family = engine.tiers.family_of("")
        evicted = engine._store.plan(family, family.root, ids(256))
        engine._store.drop([record.hash for record in evicted])
        engine.park("ada")
        settle(engine)
        step(engine)
        assert main_blocks(engine, "ada").num_tokens == 0
        turn = run(engine, agent_id="ada", token_ids=ids(600), max_tokens=2)
        assert turn.cache.tier is Tier.COLD
        assert turn.cache.cached_tokens == 599

    def test_a_prefetched_agent_is_hot(self, restart: Restart) -> None:
        run(restart(), agent_id="ada", token_ids=ids(600), max_tokens=2)
        engine = restart()
        engine.prefetch("ada")
        drain(engine)
        assert engine.agent("ada").tier is Tier.HOT
        turn = run(engine, agent_id="ada", token_ids=ids(600), max_tokens=2)
        assert turn.cache.tier is Tier.HOT
        assert turn.cache.cached_tokens == 599

    def test_prefetching_what_is_not_stored_computes_nothing(self, restart: Restart) -> None:
        engine = restart()
        run(engine, agent_id="ada", token_ids=ids(600), max_tokens=2)
        engine.forget_cache("ada")
        before = num_prefilled(engine)
        engine.prefetch("ada")
        drain(engine)
        assert num_prefilled(engine) == before

    def test_a_request_may_come_while_it_is_prefetched(self, restart: Restart) -> None:
        run(restart(), agent_id="ada", token_ids=ids(600), max_tokens=2)
        engine = restart()
        engine.prefetch("ada")
        turn = run(engine, agent_id="ada", token_ids=ids(600), max_tokens=2)
        assert turn.token_ids == fresh_reply(ids(600), max_tokens=2)

    def test_an_unknown_agent(self, restart: Restart) -> None:
        engine = restart()
        for call in (engine.park, engine.prefetch):
            with pytest.raises(UnknownAgent):
                call("nobody")


class TestAgentsAsData:
    def test_a_fork_survives_and_shares_its_blocks(self, restart: Restart) -> None:
        engine = restart()
        run(engine, agent_id="ada", token_ids=ids(600), max_tokens=2)
        engine.fork("ada", "bob")
        assert engine.flush()
        engine = restart()
        turn = run(engine, agent_id="bob", token_ids=[*ids(600), 5], max_tokens=2)
        assert turn.cache.cached_tokens == 600

    def test_a_rollback_survives(self, restart: Restart) -> None:
        engine = restart()
        run(engine, agent_id="ada", messages=[user("One")], max_tokens=3)
        run(engine, agent_id="ada", append=[user("Two")], max_tokens=3)
        after_one = engine.agent("ada").num_tokens
        engine.rollback("ada", turn=1)
        after_one = engine.agent("ada").num_tokens
        assert engine.flush()
        engine = restart()
        assert engine.agent("ada").num_turns == 1
        assert engine.agent("ada").num_tokens == after_one

    def test_settings_survive(self, restart: Restart) -> None:
        engine = restart()
        run(engine, agent_id="ada", messages=[user("One")], max_tokens=3)
        engine.configure("ada", pinned=True, priority=3, quota_bytes=1 << 20)
        assert engine.flush()
        settings = restart().book.get("ada").settings
        assert (settings.pinned, settings.priority, settings.quota_bytes) == (True, 3, 1 << 20)

    def test_a_deleted_agent_is_gone(self, restart: Restart) -> None:
        engine = restart()
        run(engine, agent_id="ada", token_ids=ids(600), max_tokens=2)
        settle(engine)
        engine.delete("ada")
        assert engine.flush()
        engine = restart()
        assert engine.agents() == ()
        assert engine.snapshot().store.num_records == 0
        assert run(engine, token_ids=ids(600), max_tokens=2).cache.cached_tokens == 0


class TestBytesWritten:
    """Every token's KV is written once, however short the turns are."""

    @pytest.mark.parametrize("demoting", [False, True])
    def test_over_a_chat_of_short_turns(self, demoting: bool) -> None:
        store = MemoryAgentStore()
        engine = fake_engine(store=store)
        prompt = ids(30)
        for turn in range(50):
            done = run(engine, agent_id="ada", token_ids=prompt, max_tokens=20)
            prompt = [*prompt, *done.token_ids, *ids(17, turn)]
            if demoting:
                engine.demote("ada")
            settle(engine)
        engine.close()
        num_made = main_blocks(engine, "ada").num_tokens
        assert store.num_written_bytes <= num_made * BLOCK_BYTES // 256


def test_a_record_that_cannot_be_read_is_computed(tmp_path: Path) -> None:
    store = MemoryAgentStore()
    engine = fake_engine(store=store)
    run(engine, agent_id="ada", token_ids=ids(1000), max_tokens=2)
    engine.close()
    records = store.plan(engine.tiers.family_of(""), engine.tiers.family_of("").root, ids(1000))
    store.unreadable.add(records[2].hash)
    engine = fake_engine(store=store)
    turn = run(engine, agent_id="ada", token_ids=ids(1000), max_tokens=2)
    assert turn.cache.cached_tokens == 512
    assert turn.token_ids == fresh_reply(ids(1000), max_tokens=2)


def test_a_turn_that_the_disk_refused_is_not_durable_and_serving_goes_on() -> None:
    store = MemoryAgentStore()
    engine = fake_engine(store=store)
    store.refuses = True
    assert not run(engine, agent_id="ada", token_ids=ids(600), max_tokens=2).durable
    turn = run(engine, agent_id="ada", token_ids=[*ids(600), 4], max_tokens=2)
    assert turn.cache.tier is Tier.HOT
    store.refuses = False
    settle(engine)
    assert store.health().num_records == 2
    assert run(engine, agent_id="ada", token_ids=[*ids(600), 5], max_tokens=2).durable


def test_a_full_memory_does_not_keep_a_clean_stop_from_saving() -> None:
    store = MemoryAgentStore()
    engine = fake_engine(store=store, num_blocks=3)
    run(engine, agent_id="ada", token_ids=ids(100), max_tokens=1)
    engine.demote("ada")
    settle(engine)
    store.refuses = True
    run(engine, agent_id="ada", token_ids=[*ids(100), *ids(100, 3)], max_tokens=1)
    engine.demote("ada")
    run(engine, agent_id="bob", token_ids=ids(400, 5), max_tokens=1)
    store.refuses = False
    assert engine.close()
    engine = fake_engine(store=store)
    for agent_id, prompt in (("ada", [*ids(100), *ids(100, 3)]), ("bob", ids(400, 5))):
        turn = run(engine, agent_id=agent_id, token_ids=prompt, max_tokens=1)
        assert turn.cache.cached_tokens == len(prompt) - 1


class OthersTakeLong(MemoryAgentStore):
    """A disk that does not finish what one agent gave it before it is told to hurry."""

    def __init__(self, slow_agent: str) -> None:
        super().__init__()
        self._slow_agent = slow_agent
        self._held = HeldAnswers(are_held=True)

    def save(
        self, family: Any, record: Any, token_ids: Any, pieces: Any, maker: Any, answer: Any
    ) -> None:
        if maker == self._slow_agent:
            answer = self._held.through(answer)
        super().save(family, record, token_ids, pieces, maker, answer)

    def poll(self) -> None:
        super().poll()
        self._held.deliver()

    def hurry(self) -> None:
        self._held.are_held = False


def test_a_parked_agent_does_not_wait_for_what_others_save() -> None:
    engine = fake_engine(store=OthersTakeLong("bob"))
    run(engine, agent_id="ada", token_ids=ids(600), max_tokens=2)
    run(engine, agent_id="bob", token_ids=ids(600, 1), max_tokens=2)
    engine.park("ada")
    step(engine, 3)
    assert engine.tiers.saves.is_busy
    assert main_blocks(engine, "ada").num_tokens == 0


def test_a_reply_waits_for_memory_that_the_disk_is_taking() -> None:
    store = OthersTakeLong("bob")
    engine = fake_engine(store=store, num_blocks=12)
    run(engine, agent_id="bob", token_ids=ids(256 * 6, 1), max_tokens=1)
    engine.park("bob")
    request = engine.submit(agent_id="ada", token_ids=ids(256 * 4), max_tokens=256 * 6)
    while not engine.batch.counters.preemptions:
        step(engine)
    step(engine, 20)
    assert engine.batch.counters.preemptions == 1
    store.hurry()
    reply = completed(drain(engine), request)
    assert reply.token_ids == fresh_reply(ids(256 * 4), max_tokens=256 * 6)
