"""Whose prompt is computed next, and how much of it: nobody starves, and the bound is kept."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepwarm.core.prefill_policies import (
    FIRST_CHUNK_TOKENS,
    OVERTAKING_PER_PRIORITY,
    STEPS_PER_PLAIN_STEP,
    PrefillThrottle,
    next_chunk,
    prefill_order,
)
from sequences import sequence

CHUNK_TOKENS = 256
NUM_ROWS = 16


@given(
    num_tokens=st.integers(2, 900),
    held=st.integers(0, 900),
    limit=st.integers(1, 256),
)
def test_a_chunk_never_crosses_a_blocks_end_nor_the_last_id(
    num_tokens: int, held: int, limit: int
) -> None:
    held = min(held, num_tokens - 2)
    chunk = next_chunk(sequence(1, num_tokens=num_tokens, held=held), limit)
    end = held + len(chunk)
    assert chunk == list(range(held, end))
    assert 1 <= len(chunk) <= limit
    assert held // 256 == (end - 1) // 256
    assert end <= num_tokens - 1
    assert len(chunk) == limit or end % 256 == 0 or end == num_tokens - 1


# -- the order of prefills -----------------------------------------------------------------------


@dataclass(eq=False)
class Prompt:
    """A prompt that is computed, as far as `prefill_order` asks."""

    arrival: int
    num_missing: int
    priority: int = 0
    num_overtaken: int = 0


def order_of(*prompts: Prompt) -> list[int]:
    return [prompt.arrival for prompt in prefill_order(prompts)]  # type: ignore[arg-type]


def run_through(prompts: Sequence[Prompt]) -> Iterator[Prompt]:
    """Compute the prompts, at most NUM_ROWS at a time, one more joining with every chunk.

    Yields each as it ends.
    """
    waiting, running = list(prompts), []  # type: list[Prompt], list[Prompt]
    while waiting or running:
        if waiting and len(running) < NUM_ROWS:
            running.append(waiting.pop(0))
        first = prefill_order(running)[0]  # type: ignore[arg-type]
        assert isinstance(first, Prompt)
        num_tokens = min(first.num_missing, CHUNK_TOKENS)
        first.num_missing -= num_tokens
        for other in running:
            other.num_overtaken += num_tokens if other.arrival < first.arrival else 0
        if not first.num_missing:
            running.remove(first)
            yield first


def test_the_shortest_rest_goes_first_and_among_equals_the_first_to_come() -> None:
    assert order_of(Prompt(1, 900), Prompt(2, 80), Prompt(3, 900), Prompt(4, 80)) == [2, 4, 1, 3]


def test_a_higher_priority_goes_before_a_shorter_rest() -> None:
    assert order_of(Prompt(1, 80), Prompt(2, 900, priority=1), Prompt(3, 9, priority=-100)) == [
        2,
        1,
        3,
    ]


def test_a_prompt_that_was_overtaken_by_four_times_its_rest_gains_a_priority() -> None:
    almost = OVERTAKING_PER_PRIORITY * 900 - 1
    assert order_of(Prompt(1, 900, num_overtaken=almost), Prompt(2, 80)) == [2, 1]
    assert order_of(Prompt(1, 900, num_overtaken=almost + 1), Prompt(2, 80)) == [1, 2]


@given(
    patient=st.integers(1, 3000),
    others=st.lists(st.tuples(st.integers(1, 600), st.integers(0, 2)), min_size=60, max_size=300),
)
def test_no_prompt_starves(patient: int, others: list[tuple[int, int]]) -> None:
    """However many shorter and more urgent ones follow it."""
    first = Prompt(0, patient)
    stream = [Prompt(n, num, priority) for n, (num, priority) in enumerate(others, start=1)]
    for prompt in run_through([first, *stream]):
        if prompt is first:
            break
    most = OVERTAKING_PER_PRIORITY * 3 * patient + NUM_ROWS * 600
    assert first.num_overtaken <= most


@given(st.lists(st.tuples(st.sampled_from([1, 80, 255, 900]), st.integers(0, 1)), max_size=60))
def test_equal_prompts_end_in_the_order_of_their_arrival(kinds: list[tuple[int, int]]) -> None:
    prompts = [Prompt(n, num, priority) for n, (num, priority) in enumerate(kinds)]
    ended = [(kinds[prompt.arrival], prompt.arrival) for prompt in run_through(prompts)]
    for kind in set(kinds):
        arrivals = [arrival for other, arrival in ended if other == kind]
        assert arrivals == sorted(arrivals)


# -- the budget beside decode --------------------------------------------------------------------


@dataclass(frozen=True)
class Device:
    """What a step costs: in itself, for each row, each token of prefill, and for having any."""

    step_s: float
    row_s: float
    token_s: float
    chunk_s: float = 0.0

    def seconds(self, num_rows: int, num_tokens: int) -> float:
        chunk_s = self.chunk_s if num_tokens else 0.0
        return self.step_s + num_rows * self.row_s + num_tokens * self.token_s + chunk_s


devices = st.builds(
    Device,
    step_s=st.floats(1e-3, 0.2),
    row_s=st.floats(0.0, 0.05),
    token_s=st.floats(1e-4, 0.02),
)
stretches = st.floats(1.1, 5.0)


def step(throttle: PrefillThrottle, device: Device, num_rows: int) -> tuple[int, float]:
    """One step with as much prefill as it may have: its tokens, and its length over a plain one."""
    num_tokens = throttle.num_tokens(num_rows)
    step_s = device.seconds(num_rows, num_tokens)
    throttle.observe(num_rows=num_rows, num_tokens=num_tokens, step_s=step_s)
    return num_tokens, step_s / device.seconds(num_rows, 0)


@given(devices, stretches, st.lists(st.integers(1, NUM_ROWS), min_size=1, max_size=120))
def test_where_parts_share_a_pass_no_chunk_of_several_tokens_exceeds_the_bound(
    device: Device, stretch: float, rows: list[int]
) -> None:
    throttle = PrefillThrottle(stretch)
    throttle.observe_alone(num_tokens=256, step_s=256 * device.token_s)
    for num_rows in rows:
        num_tokens, length = step(throttle, device, num_rows)
        assert num_tokens <= 1 or length <= stretch * 1.001


@given(devices, st.floats(0.0, 0.2), stretches)
def test_where_each_chunk_costs_a_pass_the_steps_keep_the_bound_on_average(
    device: Device, chunk_s: float, stretch: float
) -> None:
    slow = Device(device.step_s, device.row_s, device.token_s, chunk_s)
    throttle = PrefillThrottle(stretch, least_tokens=32)
    throttle.observe_alone(num_tokens=256, step_s=256 * slow.token_s + chunk_s)
    lengths = [step(throttle, slow, 4)[1] for _ in range(400)]
    one_chunk = slow.seconds(4, 32) / slow.seconds(4, 0) - 1.0
    assert sum(lengths) <= 400 * stretch * 1.001 + 3 * one_chunk


@given(devices, st.sampled_from([0.0, 0.1]), stretches, st.sampled_from([1, 32]))
def test_it_never_stops_prefill(
    device: Device, chunk_s: float, stretch: float, least_tokens: int
) -> None:
    slow = Device(device.step_s, device.row_s, device.token_s, chunk_s)
    throttle = PrefillThrottle(stretch, least_tokens=least_tokens)
    chunk = slow.seconds(4, least_tokens) / slow.seconds(4, 0) - 1.0
    num_steps = int(4 * (chunk / (stretch - 1.0) + STEPS_PER_PLAIN_STEP))
    assert sum(step(throttle, slow, 4)[0] for _ in range(num_steps)) >= least_tokens


@pytest.mark.parametrize("least_tokens", [1, 32])
def test_it_uses_most_of_what_it_may(least_tokens: int) -> None:
    device = Device(0.02, 0.005, 0.002)
    throttle = PrefillThrottle(2.0, least_tokens=least_tokens)
    steps = [step(throttle, device, 4) for _ in range(200)]
    assert 1.8 <= sum(length for _, length in steps[20:]) / 180 <= 2.02


def test_a_step_without_prefill_shows_now_and_then_what_decode_takes() -> None:
    device = Device(0.02, 0.005, 0.002)
    throttle = PrefillThrottle(2.0)
    tokens = [step(throttle, device, 4)[0] for _ in range(3 * (STEPS_PER_PLAIN_STEP + 1))]
    plain = [number for number, num_tokens in enumerate(tokens) if not num_tokens]
    assert plain == [0, STEPS_PER_PLAIN_STEP + 1, 2 * (STEPS_PER_PLAIN_STEP + 1)]


def test_another_number_of_rows_is_measured_before_anything_is_computed_beside_it() -> None:
    device = Device(0.02, 0.005, 0.002)
    throttle = PrefillThrottle(2.0)
    assert [step(throttle, device, rows)[0] for rows in (4, 4, 5, 5)] == [
        0,
        FIRST_CHUNK_TOKENS,
        0,
        22,
    ]


def test_a_prompt_that_becomes_dearer_is_followed() -> None:
    throttle = PrefillThrottle(2.0)
    longest = 0.0
    for number in range(300):
        device = Device(0.02, 0.005, 0.001 * (1 + number / 50))
        _, length = step(throttle, device, 4)
        longest = max(longest, length if number > 2 else 0.0)
    assert longest <= 2.05


def test_one_slow_step_halves_nothing_for_long() -> None:
    device = Device(0.02, 0.005, 0.002)
    throttle = PrefillThrottle(2.0)
    for _ in range(10):
        step(throttle, device, 4)
    before = throttle.num_tokens(4)
    throttle.observe(num_rows=4, num_tokens=before, step_s=10.0)
    assert throttle.num_tokens(4) == pytest.approx(before / 1.5, abs=1)
    for _ in range(5):
        step(throttle, device, 4)
    assert throttle.num_tokens(4) >= before - 2


def test_a_chunk_that_was_cut_short_teaches_nothing() -> None:
    throttle = PrefillThrottle(2.0, least_tokens=32)
    throttle.observe_alone(num_tokens=256, step_s=0.256)
    throttle.observe(num_rows=1, num_tokens=0, step_s=0.1)
    before = throttle.token_s
    throttle.observe(num_rows=1, num_tokens=3, step_s=0.2)
    assert throttle.token_s == before


def test_what_other_work_may_compute_is_what_a_step_allows() -> None:
    throttle = PrefillThrottle(2.0)
    assert throttle.spare_tokens(4) == 1
    throttle.observe_alone(num_tokens=256, step_s=0.256)
    throttle.observe(num_rows=4, num_tokens=0, step_s=0.1)
    assert throttle.spare_tokens(4) == 100
