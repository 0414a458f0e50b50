"""Copies of a line's KV, read from wherever memory has it, and the bytes that they take."""

from collections.abc import Iterator
from contextlib import contextmanager

from keepwarm.core.agent import AgentBlocks
from keepwarm.core.errors import InvariantBroken, PoolExhausted
from keepwarm.core.layout import BLOCK_TOKENS, whole_blocks
from keepwarm.core.pool import Allocation, Kind
from keepwarm.core.ports import Payload
from keepwarm.kv.memory import Memory
from keepwarm.kv.room import Room


class Copies:
    """Makes copies, and owns the allocations of those that are only looked at."""

    def __init__(self, memory: Memory, room: Room) -> None:
        self._memory = memory
        self._room = room
        self._paid: list[Allocation] = []

    def __repr__(self) -> str:
        return f"Copies({sum(allocation.nbytes for allocation in self._paid):,} bytes)"

    @contextmanager
    def paid(self, nbytes: int) -> Iterator[None]:
        """Take memory for copies that are looked at meanwhile, perhaps for many steps.

        Raises PoolExhausted.
        """
        allocation = self._memory.pool.allocate(Kind.READING, nbytes)
        self._paid.append(allocation)
        try:
            yield
        finally:
            self._paid.remove(allocation)
            self._memory.pool.release(allocation)

    def read(self, line: AgentBlocks, start: int, stop: int) -> Payload:
        """Copy the positions [start, stop), which begin a block and end in it at the latest."""
        generator = self._memory.model.generator
        if line.slab is not None:
            return generator.extract(line.slab, start, stop)
        if whole_blocks(start) < len(line.blocks):
            block = line.blocks[whole_blocks(start)]
            if block.payload is None:
                return generator.extract(self._memory.lines.slab_with(block), start, stop)
            return generator.cut(block.payload, 0, stop - start)
        if line.tail is None:
            raise InvariantBroken(f"line {line.line} has no KV at {start}")
        return generator.cut(line.tail, 0, stop - start)

    def tail(self, line: AgentBlocks, num_tokens: int) -> Payload | None:
        """Copy what lies between the last whole block and `num_tokens`, making room for it.

        None when there is nothing, or no room for it: fewer than 256 tokens are computed again.
        """
        start = whole_blocks(num_tokens) * BLOCK_TOKENS
        if start == num_tokens:
            return None
        try:
            with self._memory.lines.held(line):
                self._room.make(self._memory.token_bytes * (num_tokens - start))
        except PoolExhausted:
            return None
        return self.read(line, start, num_tokens)

    def holders(self) -> dict[Allocation, tuple[int, int]]:
        """Return what is allocated for copies, for the pool's check."""
        return {allocation: (1, allocation.nbytes) for allocation in self._paid}
