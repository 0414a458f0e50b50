"""Which blocks exist, which lines own them and where their KV is."""

from collections.abc import Iterable, Iterator

from keepwarm.core.block import Block, BlockHash, LineId
from keepwarm.core.errors import InvariantBroken
from keepwarm.core.pool import Allocation, BlockPool, Kind
from keepwarm.core.ports import Payload


class PrefixIndex:
    """All blocks by hash. A hash names its whole prefix, so a look-up goes through the parent.

    A block exists while a line owns it and its KV is in memory; the bytes of payloads are
    allocations of the pool, retained once for each owner.
    """

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._blocks: dict[BlockHash, Block] = {}

    def __repr__(self) -> str:
        stored = sum(block.payload is not None for block in self._blocks.values())
        return f"PrefixIndex({len(self._blocks)} blocks, {stored} with a copy of their own)"

    def __len__(self) -> int:
        return len(self._blocks)

    def __iter__(self) -> Iterator[Block]:
        return iter(self._blocks.values())

    def get(self, block_hash: BlockHash) -> Block | None:
        return self._blocks.get(block_hash)

    def longest_run(self, hashes: Iterable[BlockHash]) -> list[Block]:
        """Return the blocks of the first hashes, up to the first hash that has none."""
        run: list[Block] = []
        for block_hash in hashes:
            block = self._blocks.get(block_hash)
            if block is None:
                break
            run.append(block)
        return run

    def enter_slab(self, line: LineId, depth: int, block_hash: BlockHash) -> Block:
        """Note that the line's slab holds this block; the line becomes its owner."""
        block = self._blocks.get(block_hash)
        if block is None:
            block = self._blocks[block_hash] = Block(block_hash, depth)
        block.slabs.add(line)
        self._own(line, block)
        return block

    def retain(self, line: LineId, block: Block) -> None:
        """Note that the line's block table names this block."""
        self._own(line, block)

    def attach_payload(self, block: Block, payload: Payload) -> None:
        """Give the block a copy of its own. Raises PoolExhausted; nothing has changed then."""
        allocation = self._pool.allocate(Kind.BLOCK, payload.nbytes)
        for _ in range(len(block.owners) - 1):
            self._pool.retain(allocation)
        block.payload, block.allocation = payload, allocation

    def leave_slab(self, line: LineId, block: Block) -> None:
        """Note that the line's slab no longer holds the block; the line still owns it."""
        block.slabs.remove(line)

    def disown(self, line: LineId, block: Block) -> None:
        """Note that the line's table no longer names the block; it goes with its last owner."""
        block.slabs.discard(line)
        block.owners.remove(line)
        if block.allocation is not None:
            self._pool.release(block.allocation)
        if not block.owners:
            del self._blocks[block.hash]

    def drop_payload(self, block: Block) -> None:
        """Free the block's own copy; hot lines may still hold the block in their slabs."""
        allocation = block.allocation
        if allocation is not None:
            block.payload = block.allocation = None
            for _ in block.owners:
                self._pool.release(allocation)

    def holders(self) -> dict[Allocation, tuple[int, int]]:
        """Return the payloads' allocations with their owners and bytes, for the pool's check."""
        return {
            block.allocation: (len(block.owners), block.payload.nbytes)
            for block in self._blocks.values()
            if block.allocation is not None and block.payload is not None
        }

    def check(self) -> None:
        """Raise InvariantBroken unless each block has KV, and owners, which its slabs belong to."""
        for key, block in self._blocks.items():
            if key != block.hash or not block.owners:
                raise InvariantBroken(f"{block}: under another name, or without an owner")
            if block.payload is None and not block.slabs:
                raise InvariantBroken(f"{block}: its KV is nowhere")
            if (block.payload is None) != (block.allocation is None):
                raise InvariantBroken(f"{block}: a payload without bytes, or the reverse")
            if not block.slabs <= block.owners:
                raise InvariantBroken(f"{block}: in a slab of a line that does not own it")

    def _own(self, line: LineId, block: Block) -> None:
        if line not in block.owners:
            block.owners.add(line)
            if block.allocation is not None:
                self._pool.retain(block.allocation)
