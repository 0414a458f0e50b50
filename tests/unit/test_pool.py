"""The memory budget."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from keepwarm.core.errors import ConfigError, InvariantBroken, PoolExhausted
from keepwarm.core.pool import Allocation, BlockPool, Kind


def test_bytes_are_taken_until_the_last_holder_releases_them() -> None:
    pool = BlockPool(100)
    block = pool.allocate(Kind.BLOCK, 60)
    pool.retain(block)
    pool.release(block)
    assert pool.free_bytes == 40
    pool.release(block)
    assert pool.free_bytes == 100


def test_exhaustion_takes_nothing_and_carries_the_facts() -> None:
    pool = BlockPool(100)
    pool.allocate(Kind.SLAB, 60)
    with pytest.raises(PoolExhausted) as caught:
        pool.allocate(Kind.BLOCK, 41)
    assert (caught.value.needed_bytes, caught.value.free_bytes) == (41, 40)
    assert pool.free_bytes == 40
    pool.check()


def test_the_last_byte_can_be_taken() -> None:
    pool = BlockPool(100)
    pool.allocate(Kind.SLAB, 60)
    pool.allocate(Kind.BLOCK, 40)
    assert pool.free_bytes == 0


def test_resizing_moves_the_sum_and_an_impossible_size_leaves_the_old_one() -> None:
    pool = BlockPool(100)
    slab = pool.allocate(Kind.SLAB, 60)
    pool.resize(slab, 90)
    assert pool.free_bytes == 10
    with pytest.raises(PoolExhausted):
        pool.resize(slab, 101)
    assert slab.nbytes == 90
    pool.resize(slab, 30)
    assert pool.free_bytes == 70
    pool.check()


def test_the_peak_is_remembered() -> None:
    pool = BlockPool(100)
    pool.release(pool.allocate(Kind.SLAB, 80))
    pool.allocate(Kind.SLAB, 10)
    assert pool.snapshot().peak_bytes == 80


def test_reuse_changes_the_kind_and_not_the_bytes() -> None:
    pool = BlockPool(100)
    slab = pool.allocate(Kind.SLAB, 60)
    pool.reuse(slab, Kind.SPARE)
    snapshot = pool.snapshot()
    assert snapshot.bytes_by_kind == {"spare": 60}
    assert snapshot.num_by_kind == {"spare": 1}
    assert repr(pool) == "BlockPool(60 of 100 bytes: 1 spare)"


@pytest.mark.parametrize("use", ["retain", "release", "resize", "reuse"])
def test_an_allocation_is_not_used_after_its_release(use: str) -> None:
    pool = BlockPool(100)
    gone = pool.allocate(Kind.BLOCK, 10)
    pool.release(gone)
    calls = {
        "retain": lambda: pool.retain(gone),
        "release": lambda: pool.release(gone),
        "resize": lambda: pool.resize(gone, 5),
        "reuse": lambda: pool.reuse(gone, Kind.SPARE),
    }
    with pytest.raises(InvariantBroken, match="after its release"):
        calls[use]()
    assert pool.free_bytes == 100


@pytest.mark.parametrize("budget", [0, -1])
def test_a_budget_must_be_positive(budget: int) -> None:
    with pytest.raises(ConfigError) as caught:
        BlockPool(budget)
    assert caught.value.key == "budget_bytes"


class TestCheckFinds:
    """check() sees what was planted."""

    def test_a_wrong_sum(self) -> None:
        pool = BlockPool(100)
        pool.allocate(Kind.BLOCK, 10)
        pool.used_bytes = 11
        with pytest.raises(InvariantBroken, match="sum to 10"):
            pool.check()

    def test_more_than_the_budget(self) -> None:
        pool = BlockPool(100)
        pool.allocate(Kind.BLOCK, 90)
        pool.budget_bytes = 80
        with pytest.raises(InvariantBroken):
            pool.check()

    def test_an_allocation_without_a_holder(self) -> None:
        pool = BlockPool(100)
        pool.allocate(Kind.BLOCK, 10).count = 0
        with pytest.raises(InvariantBroken, match="without a holder"):
            pool.check()

    def test_what_no_agent_holds(self) -> None:
        pool = BlockPool(100)
        pool.allocate(Kind.BLOCK, 10)
        with pytest.raises(InvariantBroken, match="nobody holds"):
            pool.check({})

    def test_what_is_held_after_its_release(self) -> None:
        pool = BlockPool(100)
        with pytest.raises(InvariantBroken, match="released but held"):
            pool.check({Allocation(Kind.BLOCK, 10): (1, 10)})

    @pytest.mark.parametrize("held", [(2, 10), (1, 11)])
    def test_another_count_or_size_than_the_owners(self, held: tuple[int, int]) -> None:
        pool = BlockPool(100)
        block = pool.allocate(Kind.BLOCK, 10)
        pool.check({block: (1, 10)})
        with pytest.raises(InvariantBroken, match="by the owners' count"):
            pool.check({block: held})


class PoolMachine(RuleBasedStateMachine):
    """Random operations beside a model: for each allocation its holders and bytes."""

    allocations = Bundle("allocations")

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(1000)
        self.model: dict[Allocation, tuple[int, int]] = {}

    @rule(target=allocations, kind=st.sampled_from(Kind), nbytes=st.integers(0, 400))
    def allocate(self, kind: Kind, nbytes: int) -> Allocation | None:
        free = 1000 - sum(size for _, size in self.model.values())
        try:
            allocation = self.pool.allocate(kind, nbytes)
        except PoolExhausted:
            assert nbytes > free
            return None
        assert nbytes <= free
        self.model[allocation] = (1, nbytes)
        return allocation

    @rule(allocation=allocations)
    def retain(self, allocation: Allocation | None) -> None:
        if allocation in self.model:
            self.pool.retain(allocation)
            count, nbytes = self.model[allocation]
            self.model[allocation] = (count + 1, nbytes)

    @rule(allocation=allocations, nbytes=st.integers(0, 600))
    def resize(self, allocation: Allocation | None, nbytes: int) -> None:
        if allocation not in self.model:
            return
        count, old = self.model[allocation]
        try:
            self.pool.resize(allocation, nbytes)
        except PoolExhausted:
            assert nbytes - old > self.pool.free_bytes
        else:
            self.model[allocation] = (count, nbytes)

    @rule(allocation=consumes(allocations))
    def release(self, allocation: Allocation | None) -> None:
        if allocation in self.model:
            count, nbytes = self.model.pop(allocation)
            self.pool.release(allocation)
            if count > 1:
                self.model[allocation] = (count - 1, nbytes)

    @invariant()
    def the_pool_agrees_with_the_model(self) -> None:
        self.pool.check(self.model)


TestPoolMachine = PoolMachine.TestCase
