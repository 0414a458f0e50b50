"""Who runs when: decode beside prefill, turns among prefills, priorities, nobody starves."""

from collections import Counter

import pytest

from engines import completed, drain, fake_engine, generator_of, ids, phase_of, step
from keepwarm import BlockPoolBatchEngine
from keepwarm.core.events import Completed, Progress
from keepwarm.core.layout import BLOCK_TOKENS
from keepwarm.core.sequence import Phase
from keepwarm.testing.generator import FAKE_LAYOUT


def admission_order_of(engine: BlockPoolBatchEngine) -> list[str]:
    """The requests in the order in which they ended."""
    return [event.request_id for event in drain(engine) if isinstance(event, Completed)]


def test_all_that_are_ready_decode_in_one_call() -> None:
    engine = fake_engine()
    for salt in range(5):
        engine.submit(token_ids=ids(10, salt), max_tokens=20)
    drain(engine)
    assert Counter(generator_of(engine).batch_sizes).most_common(1)[0][0] == 5


def test_a_row_joins_and_leaves_in_any_step() -> None:
    engine = fake_engine()
    engine.submit(token_ids=ids(10), max_tokens=20)
    step(engine, 5)
    engine.submit(token_ids=ids(10, 1), max_tokens=3)
    drain(engine)
    sizes = generator_of(engine).batch_sizes
    assert [n for n, before in zip(sizes, [0, *sizes], strict=False) if n != before] == [1, 2, 1]


def test_decode_goes_on_beside_a_long_prefill() -> None:
    engine = fake_engine()
    engine.submit(token_ids=ids(10), max_tokens=2000)
    step(engine, 3)
    long = engine.submit(token_ids=ids(4000, 1), max_tokens=1)
    while phase_of(engine, long) != Phase.DECODING:
        before = engine.batch.counters.decoded_tokens
        step(engine)
        assert engine.batch.counters.decoded_tokens == before + 1


def test_prefill_beside_decode_is_a_part_of_what_it_is_alone() -> None:
    engine = fake_engine(max_step_stretch=1.5)
    engine.submit(token_ids=ids(10), max_tokens=3000)
    step(engine, 3)
    engine.submit(token_ids=ids(4000, 1), max_tokens=1)
    before = engine.batch.counters.prefilled_tokens
    step(engine)
    assert engine.batch.counters.prefilled_tokens - before < engine.config.idle_prefill_tokens


def test_beside_decode_the_model_is_not_called_twice_for_one_small_budget() -> None:
    engine = fake_engine()
    engine.submit(token_ids=ids(10), max_tokens=2000)
    step(engine, 3)
    long = engine.submit(token_ids=ids(4000, 1), max_tokens=1)
    while phase_of(engine, long) != Phase.DECODING:
        before = len(generator_of(engine).prefilled)
        step(engine)
        calls = generator_of(engine).prefilled[before:]
        assert all(num_tokens == 256 for _, num_tokens in calls[:-1]) or len(calls) == 1


def test_prefills_take_turns() -> None:
    engine = fake_engine(idle_prefill_tokens=256)
    requests = [engine.submit(token_ids=ids(1500, salt), max_tokens=1) for salt in range(3)]
    events = step(engine, 6)
    done = [event.request_id for event in events if isinstance(event, Progress)]
    assert done == requests * 2


def test_a_short_prompt_is_not_kept_waiting_by_long_ones() -> None:
    engine = fake_engine()
    for salt in range(3):
        engine.submit(token_ids=ids(5000, salt), max_tokens=1)
    step(engine, 2)
    short = engine.submit(token_ids=ids(50, 7), max_tokens=1)
    assert admission_order_of(engine)[0] == short


def test_progress_counts_up_to_the_prompt() -> None:
    engine = fake_engine(idle_prefill_tokens=256)
    engine.submit(token_ids=ids(1000), max_tokens=1)
    counts = [e for e in drain(engine) if isinstance(e, Progress)]
    assert [event.num_done for event in counts] == [256, 512, 768, 999]
    assert {event.num_total for event in counts} == {999}


def test_no_more_rows_than_allowed() -> None:
    engine = fake_engine(max_rows=2)
    for salt in range(5):
        engine.submit(token_ids=ids(10, salt), max_tokens=4)
    drain(engine)
    assert max(generator_of(engine).batch_sizes) == 2


def test_first_come_first_served() -> None:
    engine = fake_engine(max_rows=1)
    requests = [engine.submit(token_ids=ids(10, salt), max_tokens=2) for salt in range(4)]
    assert admission_order_of(engine) == requests


def test_a_higher_priority_overtakes_those_who_wait() -> None:
    engine = fake_engine(max_rows=1)
    first, plain, low, high = (
        engine.submit(token_ids=ids(10, salt), max_tokens=2, priority=priority)
        for salt, priority in enumerate([0, 0, -1, 9])
    )
    assert admission_order_of(engine) == [high, first, plain, low]


@pytest.mark.parametrize("priority", [1, 3])
def test_a_flood_of_higher_priority_starves_no_request(priority: int) -> None:
    engine = fake_engine(max_rows=1)
    patient = engine.submit(token_ids=ids(10), max_tokens=1)
    num_served = 0
    salt = 0
    while patient in engine._turns.active:
        while len(engine.batch.waiting) < 3:
            salt += 1
            engine.submit(token_ids=ids(10, salt % 50), max_tokens=1, priority=priority)
        num_served += sum(isinstance(event, Completed) for event in step(engine))
        assert num_served < 16 * (priority + 2)
    drain(engine)


def test_a_large_request_is_not_starved_by_small_ones() -> None:
    engine = fake_engine(num_blocks=6, reserve_reply_tokens=0)
    small = [engine.submit(token_ids=ids(10, salt), max_tokens=20) for salt in range(4)]
    step(engine, 2)
    large = engine.submit(token_ids=ids(1200, 9), max_tokens=5)
    for salt in range(20):
        small.append(engine.submit(token_ids=ids(10, 10 + salt), max_tokens=20))
        step(engine, 2)
    order = admission_order_of(engine)
    assert large not in order or order.index(large) < 5


def test_a_large_new_slab_is_prepared_over_several_steps_beside_decode() -> None:
    engine = fake_engine(fresh_bytes_per_step=FAKE_LAYOUT.block_bytes)
    engine.submit(token_ids=ids(10), max_tokens=100)
    step(engine)
    request = engine.submit(token_ids=ids(5 * BLOCK_TOKENS - 200, salt=1), max_tokens=100)
    for _ in range(4):
        step(engine)
        assert phase_of(engine, request) == Phase.RESTORING
    step(engine)
    assert phase_of(engine, request) == Phase.PREFILLING
    assert generator_of(engine).batch_sizes == [1] * 5


def test_rows_of_equal_length_grow_in_different_steps() -> None:
    engine = fake_engine(reserve_reply_tokens=0)
    for salt in range(4):
        engine.submit(token_ids=ids(200, salt), max_tokens=200)
    most = 0
    while engine.has_work:
        before = engine.snapshot().tiers.slab_growths
        step(engine)
        most = max(most, engine.snapshot().tiers.slab_growths - before)
    assert engine.snapshot().tiers.slab_growths == 4
    assert most == 1


def test_a_slab_does_not_grow_for_tokens_that_cannot_come() -> None:
    engine = fake_engine(reserve_reply_tokens=0)
    engine.submit(token_ids=ids(200), max_tokens=56)
    drain(engine)
    assert engine.snapshot().tiers.slab_growths == 0


def test_nothing_to_do_is_no_work() -> None:
    engine = fake_engine()
    assert not engine.has_work
    assert engine.step() == []
    request_id = engine.submit(token_ids=ids(5), max_tokens=1)
    assert engine.has_work
    completed(drain(engine), request_id)
    assert not engine.has_work
