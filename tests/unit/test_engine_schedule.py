"""Who runs when: decode beside prefill, the order of prefills, priorities, nobody starves."""

from collections import Counter
from statistics import mean, median

import pytest

from engines import (
    completed,
    deltas_of,
    drain,
    fake_engine,
    generator_of,
    ids,
    phase_of,
    run,
    step,
)
from keepwarm import BlockPoolBatchEngine
from keepwarm.core.events import Completed, Delta, Event, Progress
from keepwarm.core.layout import BLOCK_TOKENS
from keepwarm.core.sequence import Phase
from keepwarm.testing.generator import FAKE_LAYOUT
from timed import MLX, NATIVE, Device, device_of, timed_engine

DEVICES = [NATIVE, MLX]


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


@pytest.mark.parametrize("device", DEVICES, ids=repr)
def test_prefill_beside_decode_is_a_part_of_what_it_is_alone(device: Device) -> None:
    engine, _ = timed_engine(device)
    engine.submit(token_ids=ids(10), max_tokens=3000)
    step(engine, 3)
    engine.submit(token_ids=ids(4000, 1), max_tokens=1)
    step(engine, 20)
    chunks = [length for _, length in device_of(engine).prefilled[1:]]
    assert chunks
    assert max(chunks) <= 32 < engine.config.idle_prefill_tokens


def test_decode_and_a_chunk_are_one_call() -> None:
    engine, _ = timed_engine(NATIVE)
    engine.submit(token_ids=ids(10), max_tokens=3000)
    engine.submit(token_ids=ids(300, 1), max_tokens=1)
    step(engine, 6)
    num_calls = engine.batch.counters.steps
    assert device_of(engine).num_calls == num_calls
    assert any(
        {bool(item.draws) for item in s} == {True, False} for s, _ in device_of(engine).steps
    )


def test_equal_prompts_are_prefilled_in_the_order_of_their_arrival() -> None:
    engine = fake_engine(idle_prefill_tokens=256)
    requests = [engine.submit(token_ids=ids(1500, salt), max_tokens=1) for salt in range(3)]
    assert admission_order_of(engine) == requests


@pytest.mark.parametrize("device", DEVICES, ids=repr)
def test_of_equal_cold_prompts_the_first_does_not_wait_for_the_last(device: Device) -> None:
    engine, clock = timed_engine(device)
    for salt in range(8):
        engine.submit(token_ids=ids(1450, salt), max_tokens=32)
    first_s: dict[str, float] = {}
    while len(first_s) < 8:
        for event in step(engine):
            if isinstance(event, Delta):
                first_s.setdefault(event.request_id, clock())
    assert median(first_s.values()) <= 0.6 * max(first_s.values())


@pytest.mark.parametrize("device", DEVICES, ids=repr)
def test_a_warm_turn_waits_for_no_cold_prompt(device: Device) -> None:
    """Its few new tokens are in the very next call, and all of them in the next few."""
    engine, _ = timed_engine(device)
    first = run(engine, agent_id="ada", token_ids=ids(850), max_tokens=32)
    for salt in range(1, 5):
        engine.submit(token_ids=ids(850, salt), max_tokens=32)
    step(engine, 3)
    num_before = device_of(engine).num_calls
    turn = [*ids(850), *first.token_ids, *ids(80, 9)]
    request = engine.submit(agent_id="ada", token_ids=turn, max_tokens=2)
    while not deltas_of(step(engine), request):
        assert device_of(engine).num_calls <= num_before + 3


@pytest.mark.parametrize(("device", "bound"), [(NATIVE, 1.8), (MLX, 4.0)], ids=repr)
def test_a_long_prefill_beside_decode_keeps_the_bound(device: Device, bound: float) -> None:
    """In each step where the parts share a pass, and on average where they do not."""
    engine, _ = timed_engine(device)
    for salt in range(4):
        engine.submit(token_ids=ids(200, salt), max_tokens=20_000)
    while len(engine.batch.running) < 4 or any(
        sequence.phase is not Phase.DECODING for sequence in engine.batch.running
    ):
        step(engine)
    engine.step()
    num_before = device_of(engine).num_calls
    eve = engine.submit(token_ids=ids(6000, 9), max_tokens=1)
    while not any(isinstance(event, Completed) for event in engine.step()):
        assert device_of(engine).num_calls < 10_000, eve
    steps = device_of(engine).steps[num_before:]
    lengths = [seconds / device.seconds(steps[0][0][:4]) for _, seconds in steps]
    assert max(lengths) <= bound
    assert 1.5 <= mean(lengths) <= 1.81


def test_a_long_prompt_is_not_starved_by_short_ones() -> None:
    engine, _ = timed_engine(NATIVE)
    long = engine.submit(token_ids=ids(3000), max_tokens=1)
    num_short = 0
    events: list[Event] = []
    while not any(isinstance(e, Completed) and e.request_id == long for e in events):
        while len(engine.batch.running) + engine.batch.num_waiting < 6:
            num_short += 1
            engine.submit(token_ids=ids(200, num_short % 100 + 1), max_tokens=1)
        events = engine.step()
        assert 200 * num_short <= 5 * 3000
    assert num_short > 5


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
