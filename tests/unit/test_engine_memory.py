"""A small budget: what goes first, who is preempted, and that the answers are the same."""

import pytest

from engines import (
    BLOCK_BYTES,
    FakeFactory,
    check_values,
    completed,
    drain,
    failed,
    fake_engine,
    fake_loaded,
    fresh_reply,
    generator_of,
    ids,
    main_blocks,
    run,
    step,
)
from keepwarm import BlockPool
from keepwarm.core.agent import Tier
from keepwarm.core.errors import PoolExhausted
from keepwarm.core.ports import RowId, RowInput
from keepwarm.core.stored import KVFamily
from keepwarm.kv.generator_source import GeneratorSource
from keepwarm.kv.tiers import Tiers
from keepwarm.testing.generator import FAKE_LAYOUT

SHARED = ids(512, 9)


class TestSharing:
    @pytest.mark.parametrize(("chunk", "idle"), [(256, 512), (100, 250), (1, 50)])
    def test_equal_prefixes_are_computed_once_even_in_the_same_moment(
        self, chunk: int, idle: int
    ) -> None:
        factory = FakeFactory()
        engine = fake_engine(factory=factory, prefill_chunk_tokens=chunk, idle_prefill_tokens=idle)
        requests = [
            engine.submit(agent_id=f"a{n}", token_ids=[*SHARED, *ids(20, n)], max_tokens=3)
            for n in range(6)
        ]
        events = drain(engine)
        assert factory.num_prefilled == 512 + 6 * 19
        for n, request_id in enumerate(requests):
            alone = fresh_reply([*SHARED, *ids(20, n)], max_tokens=3)
            done = completed(events, request_id)
            assert done.token_ids == alone
            assert done.usage.cached_tokens == (512 if n else 0)

    def test_demoted_prefixes_are_one_block(self) -> None:
        engine = fake_engine()
        for n in range(5):
            run(engine, agent_id=f"a{n}", token_ids=[*SHARED, *ids(20, n)], max_tokens=1)
        for n in range(5):
            engine.demote(f"a{n}")
        pool = engine.snapshot().pool
        assert pool.num_by_kind["block"] == 2
        assert pool.bytes_by_kind["block"] == 2 * BLOCK_BYTES
        assert pool.num_by_kind["tail"] == 5

    def test_a_canceled_leader_hands_the_work_to_those_who_wait_for_it(self) -> None:
        engine = fake_engine(prefill_chunk_tokens=100, idle_prefill_tokens=100)
        leader, follower = (
            engine.submit(agent_id=name, token_ids=[*SHARED, 1], max_tokens=2) for name in "ab"
        )
        step(engine, 2)
        engine.cancel(leader)
        assert completed(drain(engine), follower).token_ids == fresh_reply(
            [*SHARED, 1], max_tokens=2
        )


class TestPressure:
    def test_a_resting_slab_becomes_blocks_before_anything_is_lost(self) -> None:
        engine = fake_engine(num_blocks=5)
        run(engine, agent_id="ada", token_ids=ids(512), max_tokens=1)
        run(engine, agent_id="bob", token_ids=ids(700, 1), max_tokens=1)
        view = engine.agent("ada")
        assert (view.tier, view.held_tokens) == (Tier.WARM, 512)
        assert engine.snapshot().tiers.evicted_blocks == 0

    def test_then_the_least_recently_used_is_forgotten_from_its_end(self) -> None:
        engine = fake_engine(num_blocks=8)
        for salt, name in enumerate(("ada", "bob", "cleo")):
            run(engine, agent_id=name, token_ids=ids(700, salt), max_tokens=1)
        assert engine.agent("cleo").held_tokens == 700
        assert engine.agent("bob").held_tokens == 700
        assert 0 < engine.agent("ada").held_tokens < 700
        done = run(engine, agent_id="ada", token_ids=ids(710, 0), max_tokens=1)
        assert done.cache.reason == "evicted"
        assert done.cache.diverged_at == done.usage.cached_tokens < 700

    def test_eviction_frees_bytes(self) -> None:
        engine = fake_engine(num_blocks=8)
        run(engine, agent_id="ada", token_ids=ids(700), max_tokens=1)
        engine.demote("ada")
        used = engine.tiers.pool.used_bytes
        engine.tiers.make_room(engine.tiers.pool.budget_bytes - BLOCK_BYTES)
        assert engine.tiers.pool.used_bytes <= BLOCK_BYTES < used

    def test_a_pinned_agent_is_never_forgotten(self) -> None:
        engine = fake_engine(num_blocks=9)
        run(engine, agent_id="ada", token_ids=ids(700), max_tokens=1)
        engine.pin("ada")
        for salt in range(1, 9):
            run(engine, agent_id=f"a{salt}", token_ids=ids(700, salt), max_tokens=2)
        assert engine.agent("ada").held_tokens == 700
        done = run(engine, agent_id="ada", token_ids=ids(710), max_tokens=1)
        assert done.usage.cached_tokens == 700

    def test_unpinned_it_is_forgotten_like_all_others(self) -> None:
        engine = fake_engine(num_blocks=8)
        run(engine, agent_id="ada", token_ids=ids(700), max_tokens=1)
        engine.pin("ada")
        engine.pin("ada", pinned=False)
        for salt in range(1, 9):
            run(engine, agent_id=f"a{salt}", token_ids=ids(700, salt), max_tokens=2)
        assert engine.agent("ada").held_tokens < 700

    def test_what_pins_leave_no_room_for_fails_with_the_bytes(self) -> None:
        engine = fake_engine(num_blocks=4)
        run(engine, agent_id="ada", token_ids=ids(700), max_tokens=1)
        engine.pin("ada")
        request_id = engine.submit(agent_id="bob", token_ids=ids(600, 1), max_tokens=1)
        error = failed(drain(engine), request_id).error
        assert isinstance(error, PoolExhausted)
        engine.pin("ada", pinned=False)
        run(engine, agent_id="bob", token_ids=ids(600, 1), max_tokens=1)

    def test_a_pinned_agent_of_more_than_half_the_budget_can_go_on(self) -> None:
        engine = fake_engine(num_blocks=4)
        run(engine, agent_id="ada", token_ids=ids(700), max_tokens=1)
        engine.pin("ada")
        engine.demote("ada")
        prompt = [*ids(700), *ids(200, 3)]
        done = run(engine, agent_id="ada", token_ids=prompt, max_tokens=3)
        assert done.token_ids == fresh_reply(prompt, max_tokens=3)
        assert engine.agent("ada").pinned

    def test_cutting_a_block_for_its_first_tokens_never_evicts_that_block(self) -> None:
        tiers = Tiers(
            BlockPool(2 * BLOCK_BYTES + 100),
            GeneratorSource(fake_loaded()),
            family=KVFamily("fake", FAKE_LAYOUT),
        )
        line = tiers.new_line()
        tiers.make_hot(line, ids(512), 512)
        assert line.slab is not None
        for chunk in (ids(512)[:256], ids(512)[256:]):
            tiers.model.generator.open_row(RowId(1), line.slab)
            tiers.model.generator.step([RowInput(RowId(1), chunk)])
            tiers.model.generator.close_row(RowId(1))
            tiers.advance(line, chunk)
        tiers.park(line)
        tiers.demote(line)
        tiers.truncate(line, 300)
        tiers.check()
        check_values(tiers)
        assert line.num_tokens == 256


class TestPreemption:
    """Three rows that grow into a budget for two."""

    def test_it_happens_and_every_reply_is_the_same_as_alone(self) -> None:
        engine = fake_engine(num_blocks=7, reserve_reply_tokens=0)
        requests = [
            engine.submit(agent_id=f"a{n}", token_ids=ids(250, n), max_tokens=700) for n in range(3)
        ]
        events = drain(engine)
        endings = [completed(events, request_id) for request_id in requests]
        assert engine.snapshot().batch.preemptions > 0
        assert endings[0].timing.num_preemptions == 0
        assert endings[2].timing.num_preemptions > 0
        for n, ending in enumerate(endings):
            assert ending.token_ids == fresh_reply(ids(250, n), max_tokens=700)
            assert ending.usage.cached_tokens == 0

    def test_a_seeded_reply_goes_on_with_the_same_draws(self) -> None:
        engine = fake_engine(num_blocks=7, reserve_reply_tokens=0)
        wanted = {"max_tokens": 700, "temperature": 0.7, "seed": 11}
        requests = [engine.submit(token_ids=ids(250, n), **wanted) for n in range(3)]
        events = drain(engine)
        assert engine.snapshot().batch.preemptions > 0
        for n, request_id in enumerate(requests):
            assert completed(events, request_id).token_ids == fresh_reply(ids(250, n), **wanted)

    def test_the_lowest_priority_goes_first(self) -> None:
        engine = fake_engine(num_blocks=7, reserve_reply_tokens=0)
        priorities = [0, -5, 0]
        requests = [
            engine.submit(token_ids=ids(250, n), max_tokens=500, priority=priorities[n])
            for n in range(3)
        ]
        events = drain(engine)
        counts = [completed(events, request).timing.num_preemptions for request in requests]
        assert counts[1] > 0
        assert counts[0] == counts[2] == 0

    def test_the_oldest_stays_even_with_the_lowest_priority(self) -> None:
        engine = fake_engine(num_blocks=7, reserve_reply_tokens=0)
        oldest = engine.submit(token_ids=ids(250), max_tokens=700, priority=-100)
        step(engine, 3)
        for n in (1, 2, 3):
            engine.submit(token_ids=ids(250, n), max_tokens=700, priority=50)
        events = drain(engine)
        assert engine.snapshot().batch.preemptions > 0
        assert completed(events, oldest).timing.num_preemptions == 0


@pytest.mark.parametrize("num_blocks", [3, 4, 6, 9])
def test_any_budget_gives_the_same_answers(num_blocks: int) -> None:
    engine = fake_engine(num_blocks=num_blocks, restore_bytes_per_step=1)
    requests = {}
    for n in range(8):
        prompt = [*SHARED[: 256 * (n % 2)], *ids(120, n)]
        requests[engine.submit(agent_id=f"a{n % 5}", token_ids=prompt, max_tokens=150)] = prompt
        step(engine, 3)
    events = drain(engine)
    for request_id, prompt in requests.items():
        assert completed(events, request_id).token_ids == fresh_reply(prompt, max_tokens=150)
    assert engine.tiers.pool.peak_bytes <= engine.tiers.pool.budget_bytes


def test_a_slab_is_reused() -> None:
    engine = fake_engine()
    run(engine, agent_id="ada", token_ids=ids(300), max_tokens=1)
    engine.demote("ada")
    assert engine.snapshot().pool.num_by_kind["spare"] == 1
    run(engine, agent_id="ada", token_ids=ids(300), max_tokens=1)
    assert "spare" not in engine.snapshot().pool.num_by_kind


def test_a_hot_line_that_must_grow_copies_itself_once() -> None:
    engine = fake_engine(reserve_reply_tokens=0)
    run(engine, agent_id="ada", token_ids=ids(250), max_tokens=1)
    run(engine, agent_id="ada", token_ids=ids(800), max_tokens=1)
    assert generator_of(engine).num_copied_tokens == 250
    assert main_blocks(engine, "ada").num_tokens == 800
