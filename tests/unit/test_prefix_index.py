"""Which blocks exist, who owns them, and where they are."""

from dataclasses import dataclass

import pytest

from keepwarm.core.block import Block, BlockHash, LineId
from keepwarm.core.errors import InvariantBroken, PoolExhausted
from keepwarm.core.pool import BlockPool
from keepwarm.core.prefix_index import PrefixIndex

ADA, BOB = LineId(1), LineId(2)
FIRST, SECOND, THIRD = (BlockHash(name) for name in (b"first", b"second", b"third"))


@dataclass(frozen=True)
class Payload:
    num_tokens: int = 256
    nbytes: int = 10


@pytest.fixture
def pool() -> BlockPool:
    return BlockPool(25)


@pytest.fixture
def index(pool: BlockPool) -> PrefixIndex:
    return PrefixIndex(pool)


def stored(index: PrefixIndex, line: LineId, depth: int, name: BlockHash) -> Block:
    """A block with a copy of its own, in nobody's slab."""
    block = index.enter_slab(line, depth, name)
    index.attach_payload(block, Payload())
    index.leave_slab(line, block)
    return block


def test_a_line_whose_slab_holds_a_block_owns_it(index: PrefixIndex) -> None:
    block = index.enter_slab(ADA, 0, FIRST)
    assert block.slabs == block.owners == {ADA}
    index.check()


def test_equal_blocks_of_two_lines_are_one(index: PrefixIndex) -> None:
    assert index.enter_slab(ADA, 0, FIRST) is index.enter_slab(BOB, 0, FIRST)
    assert len(index) == 1


def test_a_run_ends_at_the_first_block_that_is_missing(index: PrefixIndex) -> None:
    first = index.enter_slab(ADA, 0, FIRST)
    index.enter_slab(ADA, 2, THIRD)
    assert index.longest_run([FIRST, SECOND, THIRD]) == [first]


def test_a_run_asks_for_no_hash_beyond_its_end(index: PrefixIndex) -> None:
    hashes = iter([FIRST, SECOND])
    assert index.longest_run(hashes) == []
    assert next(hashes) == SECOND


def test_a_copy_is_retained_once_for_each_owner(index: PrefixIndex, pool: BlockPool) -> None:
    block = index.enter_slab(ADA, 0, FIRST)
    index.retain(BOB, block)
    index.attach_payload(block, Payload())
    pool.check(index.holders())
    index.retain(LineId(3), block)
    pool.check(index.holders())


def test_owning_twice_is_owning_once(index: PrefixIndex, pool: BlockPool) -> None:
    block = stored(index, ADA, 0, FIRST)
    index.retain(ADA, block)
    pool.check(index.holders())


def test_a_block_goes_with_its_last_owner(index: PrefixIndex, pool: BlockPool) -> None:
    block = stored(index, ADA, 0, FIRST)
    index.retain(BOB, block)
    index.disown(ADA, block)
    assert index.get(FIRST) is block
    assert pool.used_bytes == 10
    index.disown(BOB, block)
    assert index.get(FIRST) is None
    assert pool.used_bytes == 0


def test_dropping_a_copy_frees_its_bytes_and_keeps_the_owners(
    index: PrefixIndex, pool: BlockPool
) -> None:
    block = index.enter_slab(ADA, 0, FIRST)
    index.retain(BOB, block)
    index.attach_payload(block, Payload())
    index.drop_payload(block)
    assert pool.used_bytes == 0
    assert block.owners == {ADA, BOB}
    index.check()


def test_a_copy_without_room_changes_nothing(index: PrefixIndex) -> None:
    block = index.enter_slab(ADA, 0, FIRST)
    with pytest.raises(PoolExhausted):
        index.attach_payload(block, Payload(nbytes=26))
    assert block.payload is None
    assert block.allocation is None
    index.check()


class TestCheckFinds:
    def test_a_block_that_is_nowhere(self, index: PrefixIndex) -> None:
        index.leave_slab(ADA, index.enter_slab(ADA, 0, FIRST))
        with pytest.raises(InvariantBroken, match="nowhere"):
            index.check()

    def test_a_block_without_an_owner(self, index: PrefixIndex) -> None:
        stored(index, ADA, 0, FIRST).owners.clear()
        with pytest.raises(InvariantBroken, match="without an owner"):
            index.check()

    def test_a_block_under_another_name(self, index: PrefixIndex) -> None:
        index.enter_slab(ADA, 0, FIRST).hash = SECOND
        with pytest.raises(InvariantBroken, match="another name"):
            index.check()

    def test_a_payload_that_is_not_charged(self, index: PrefixIndex) -> None:
        stored(index, ADA, 0, FIRST).allocation = None
        with pytest.raises(InvariantBroken, match="without bytes"):
            index.check()

    def test_a_slab_of_a_line_that_does_not_own_the_block(self, index: PrefixIndex) -> None:
        index.enter_slab(ADA, 0, FIRST).slabs.add(BOB)
        with pytest.raises(InvariantBroken, match="does not own"):
            index.check()
