"""The engine's decisions."""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepwarm.core.block import Block, BlockHash, LineId
from keepwarm.core.errors import ConfigError
from keepwarm.core.policies import (
    PASSES_PER_PRIORITY,
    BlockVictim,
    EngineConfig,
    TailVictim,
    admission_order,
    choose_preempted,
    choose_victims,
    demotion_order,
    grown_capacity,
    reserve_capacity,
)
from keepwarm.kv.line_table import LineBlocks
from keepwarm.testing.generator import FakePayload, FakeSlab
from sequences import sequence


@dataclass(frozen=True)
class Payload:
    num_tokens: int = 256
    nbytes: int = 10


def lines(*last_used: int) -> dict[LineId, LineBlocks]:
    """Warm lines 1, 2, ... by when they were last used."""
    return {
        LineId(number): LineBlocks(LineId(number), last_used=used)
        for number, used in enumerate(last_used, start=1)
    }


def block(depth: int, *owners: int, slabs: Sequence[int] = ()) -> Block:
    return Block(
        BlockHash(repr((depth, owners)).encode()),
        depth,
        payload=Payload(),
        owners={LineId(owner) for owner in owners},
        slabs={LineId(line) for line in slabs},
    )


class TestVictims:
    def test_the_least_recently_used_go_first(self) -> None:
        old, young = block(0, 1), block(0, 2)
        assert choose_victims(lines(5, 9), [young, old], 10) == [BlockVictim(old, 10)]

    def test_a_leaf_goes_before_its_prefix(self) -> None:
        prefix, leaf = block(0, 1), block(1, 1)
        chosen = choose_victims(lines(5), [prefix, leaf], 20)
        assert chosen == [BlockVictim(leaf, 10), BlockVictim(prefix, 10)]

    def test_a_tail_goes_before_the_blocks_before_it(self) -> None:
        known = lines(5)
        known[LineId(1)].tail = FakePayload((1, 2), 4)
        assert choose_victims(known, [block(0, 1)], 1) == [TailVictim(known[LineId(1)], 8)]

    def test_no_more_than_is_needed(self) -> None:
        blocks = [block(depth, 1) for depth in range(5)]
        assert len(choose_victims(lines(5), blocks, 11)) == 2
        assert choose_victims(lines(5), blocks, 0) == []

    def test_a_shared_prefix_is_as_young_as_its_youngest_owner(self) -> None:
        shared, lone = block(0, 1, 3), block(0, 2)
        chosen = choose_victims(lines(1, 5, 9), [shared, lone], 20)
        assert chosen == [BlockVictim(lone, 10), BlockVictim(shared, 10)]

    @pytest.mark.parametrize("why", ["is_held", "pinned"])
    def test_what_a_held_or_pinned_line_owns_is_left(self, why: str) -> None:
        known = lines(1, 2)
        setattr(known[LineId(1)], why, True)
        known[LineId(1)].tail = FakePayload((1,), 8)
        free = block(1, 2)
        assert choose_victims(known, [block(0, 1, 2), free], 100) == [BlockVictim(free, 10)]

    def test_what_a_slab_holds_as_well_is_left(self) -> None:
        assert choose_victims(lines(1, 2), [block(0, 1, 2, slabs=[2])], 10) == []


def test_the_slab_that_rested_longest_is_demoted_first_and_a_pinned_one_last() -> None:
    known = lines(3, 1, 2, 0, 0)
    for line in known.values():
        line.slab = FakeSlab(256, 8)
    known[LineId(2)].pinned = True
    known[LineId(4)].is_held = True
    known[LineId(5)].slab = None
    assert [line.line for line in demotion_order(known.values())] == [3, 1, 2]


class TestAdmission:
    def test_first_come_first_served(self) -> None:
        order = admission_order([sequence(2), sequence(1), sequence(3)])
        assert [row.arrival for row in order] == [1, 2, 3]

    def test_a_higher_priority_goes_first(self) -> None:
        order = admission_order([sequence(1), sequence(2, priority=1), sequence(3, priority=-1)])
        assert [row.arrival for row in order] == [2, 1, 3]

    def test_being_passed_over_raises_the_priority(self) -> None:
        patient = sequence(1)
        patient.num_passed_over = 3 * PASSES_PER_PRIORITY
        order = admission_order([sequence(2, priority=3), patient, sequence(3, priority=4)])
        assert [row.arrival for row in order] == [3, 1, 2]


class TestPreemption:
    def test_the_youngest_goes(self) -> None:
        assert choose_preempted([sequence(3), sequence(1), sequence(2)]).arrival == 3

    def test_the_lowest_priority_goes_before_the_youngest(self) -> None:
        running = [sequence(1), sequence(2, priority=-1), sequence(3)]
        assert choose_preempted(running).arrival == 2

    @given(st.lists(st.integers(-3, 3), min_size=2, max_size=8))
    def test_the_oldest_never_goes(self, priorities: list[int]) -> None:
        running = [sequence(n, priority=p) for n, p in enumerate(priorities)]
        assert choose_preempted(running).arrival != 0

    def test_a_row_alone_stays(self) -> None:
        assert choose_preempted([sequence(1)]) is None
        assert choose_preempted([]) is None


class TestCapacity:
    def test_a_part_of_the_reply_is_reserved(self) -> None:
        config = EngineConfig(reserve_reply_tokens=512)
        reserve = reserve_capacity
        assert reserve(num_tokens=100, reply_tokens=10, config=config) == 256
        assert reserve(num_tokens=256, reply_tokens=1, config=config) == 512
        assert reserve(num_tokens=100, reply_tokens=100_000, config=config) == 768

    @given(st.integers(1, 200), st.integers(0, 100_000))
    def test_growth_is_whole_blocks_and_never_beyond_what_may_come(
        self, num_blocks: int, more: int
    ) -> None:
        capacity, max_tokens = num_blocks * 256, num_blocks * 256 + 1 + more
        grown = grown_capacity(capacity, max_tokens)
        assert grown % 256 == 0
        assert capacity < grown < max_tokens + 256
        assert grown - capacity <= max(256, capacity // 8 + 256)

    def test_a_long_slab_grows_by_an_eighth(self) -> None:
        assert grown_capacity(8192, 100_000) == 9216


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_rows", 0),
        ("max_waiting", 0),
        ("idle_prefill_tokens", 0),
        ("restore_bytes_per_step", 0),
        ("reserve_reply_tokens", -1),
        ("max_side_lines", -1),
        ("max_anonymous_lines", -1),
        ("prefill_chunk_tokens", 0),
        ("prefill_chunk_tokens", 257),
        ("max_step_stretch", 1.0),
        ("max_step_stretch", float("nan")),
    ],
)
def test_a_wrong_setting_is_named(key: str, value: float) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig(**{key: value})
    assert caught.value.key == key


@pytest.mark.parametrize("key", ["max_side_lines", "max_anonymous_lines", "reserve_reply_tokens"])
def test_some_settings_may_be_nothing(key: str) -> None:
    assert getattr(EngineConfig(**{key: 0}), key) == 0
