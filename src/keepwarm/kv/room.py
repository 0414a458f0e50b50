"""Room in the memory budget: what is given up for it, and in which order (ADR 3)."""

from collections.abc import Callable

from keepwarm.core.agent import AgentBlocks
from keepwarm.core.block import Block
from keepwarm.core.errors import PoolExhausted
from keepwarm.core.policies import BlockVictim, choose_victims, demotion_order
from keepwarm.core.pool import BlockPool
from keepwarm.kv.counters import TierCounters
from keepwarm.kv.fetch_queue import FetchQueue
from keepwarm.kv.line_table import LineTable
from keepwarm.kv.saver import Saver
from keepwarm.kv.spare_slabs import SpareSlabs


class Room:
    """Takes memory from the others, the cheapest loss first; it has no state of its own.

    `demote` turns a resting line's slab into blocks and a tail.
    """

    def __init__(
        self,
        pool: BlockPool,
        lines: LineTable,
        shelf: SpareSlabs,
        *,
        saver: Saver,
        fetches: FetchQueue,
        counters: TierCounters,
        demote: Callable[[AgentBlocks], None],
    ) -> None:
        self._pool = pool
        self._lines = lines
        self._shelf = shelf
        self._saver = saver
        self._fetches = fetches
        self._counters = counters
        self._demote = demote

    def make(self, needed_bytes: int, *, ask_others: bool = True) -> None:
        """Free bytes until so many are free. Raises PoolExhausted when that cannot be."""
        if self._pool.free_bytes >= needed_bytes:
            return
        self._fetches.free_buffers()
        for free_some in (self._shelf.drop, self._drop_redundant, self._demote_resting):
            free_some(needed_bytes)
            if self._pool.free_bytes >= needed_bytes:
                return
        self._evict(needed_bytes)
        if ask_others and self._pool.free_bytes < needed_bytes:
            self._pool.neighbours.make_room(needed_bytes)
        if self._pool.free_bytes < needed_bytes:
            raise PoolExhausted(needed_bytes=needed_bytes, free_bytes=self._pool.free_bytes)

    def lose(self, block: Block, but: AgentBlocks | None = None) -> None:
        """The block's KV is given up: every owner's table ends before it."""
        for owner in list(block.owners):
            line = self._lines[owner]
            if line is not but:
                self._fetches.cancel(owner)  # what it reads would no longer follow
                self._lines.cut_to_slab(line, block.depth)
        self._counters.evicted_blocks += 1

    def _drop_redundant(self, needed_bytes: int) -> None:
        """Copies of blocks that some slab holds as well."""
        for block in self._lines.index:
            if self._pool.free_bytes >= needed_bytes:
                return
            if block.slabs and block.payload is not None:
                self._lines.index.drop_payload(block)

    def _demote_resting(self, needed_bytes: int) -> None:
        for line in demotion_order(self._lines.values()):
            if self._pool.free_bytes >= needed_bytes:
                return
            self._demote(line)
            self._shelf.drop(needed_bytes)

    def _evict(self, needed_bytes: int) -> None:
        missing = needed_bytes - self._pool.free_bytes
        unsaved = self._saver.lines_with_unsaved()
        for victim in choose_victims(self._lines, self._lines.index, missing, unsaved):
            if isinstance(victim, BlockVictim):
                self.lose(victim.block)
            else:
                self._lines.drop_tail(victim.line)
