"""Room in the memory budget: what is given up for it, and in which order (ADR 3)."""

from keepwarm.core.agent import AgentBlocks
from keepwarm.core.block import Block
from keepwarm.core.errors import PoolExhausted
from keepwarm.core.policies import BlockVictim, choose_victims, demotion_order
from keepwarm.kv.demotion import Demotion
from keepwarm.kv.fetch_queue import FetchQueue
from keepwarm.kv.memory import Memory
from keepwarm.kv.save_queue import SaveQueue


class Room:
    """Takes memory from resting lines, the cheapest loss first."""

    def __init__(
        self, memory: Memory, demotion: Demotion, saves: SaveQueue, fetches: FetchQueue
    ) -> None:
        self.num_evicted_blocks = 0
        self._memory = memory
        self._demotion = demotion
        self._saves = saves
        self._fetches = fetches

    def __repr__(self) -> str:
        return f"Room({self._memory.pool!r}, {self.num_evicted_blocks} blocks lost)"

    def make(self, needed_bytes: int, *, ask_others: bool = True) -> None:
        """Give up memory until `needed_bytes` are free. Raises PoolExhausted when they cannot be.

        Whatever was given up by then stays given up. `ask_others`: the pools of the same budget
        are asked last.
        """
        if self._memory.pool.free_bytes >= needed_bytes:
            return
        self._fetches.free_buffers()
        for free_some in (self._memory.spares.drop, self._drop_redundant, self._demote_resting):
            free_some(needed_bytes)
            if self._memory.pool.free_bytes >= needed_bytes:
                return
        self._evict(needed_bytes)
        if ask_others and self._memory.pool.free_bytes < needed_bytes:
            self._memory.pool.neighbours.make_room(needed_bytes)
        if self._memory.pool.free_bytes < needed_bytes:
            raise PoolExhausted(needed_bytes=needed_bytes, free_bytes=self._memory.pool.free_bytes)

    def lose(self, block: Block, but: AgentBlocks | None = None) -> None:
        """Give up the block's KV: the table of every owner (`but` this one) ends before it."""
        for owner in list(block.owners):
            line = self._memory.lines[owner]
            if line is not but:
                self._fetches.cancel(owner)  # what it reads would no longer follow
                self._memory.lines.cut_to_slab(line, block.depth)
        self.num_evicted_blocks += 1

    def _drop_redundant(self, needed_bytes: int) -> None:
        """Free copies of blocks that a slab holds as well."""
        for block in self._memory.index:
            if self._memory.pool.free_bytes >= needed_bytes:
                return
            if block.slabs and block.payload is not None:
                self._memory.index.drop_payload(block)

    def _demote_resting(self, needed_bytes: int) -> None:
        for line in demotion_order(self._memory.lines.values()):
            if self._memory.pool.free_bytes >= needed_bytes:
                return
            self._demotion.demote(line)
            self._memory.spares.drop(needed_bytes)

    def _evict(self, needed_bytes: int) -> None:
        missing = needed_bytes - self._memory.pool.free_bytes
        unsaved = self._saves.lines_with_unsaved()
        for victim in choose_victims(self._memory.lines, self._memory.index, missing, unsaved):
            if isinstance(victim, BlockVictim):
                self.lose(victim.block)
            else:
                self._memory.lines.drop_tail(victim.line)
