"""Room in the memory budget: what is given up for it, and in which order (ADR 3)."""

from keepwarm.core.errors import PoolExhausted
from keepwarm.core.policies import BlockVictim, choose_victims, demotion_order
from keepwarm.kv.demotion import Demotion
from keepwarm.kv.fetch_queue import FetchQueue
from keepwarm.kv.loss import Loss
from keepwarm.kv.memory import Memory
from keepwarm.kv.save_queue import SaveQueue


class Room:
    """Takes memory from resting lines, the cheapest loss first."""

    def __init__(
        self,
        memory: Memory,
        demotion: Demotion,
        loss: Loss,
        saves: SaveQueue,
        fetches: FetchQueue,
    ) -> None:
        self._memory = memory
        self._demotion = demotion
        self._loss = loss
        self._saves = saves
        self._fetches = fetches

    def __repr__(self) -> str:
        return f"Room({self._memory.pool!r})"

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
                self._loss.lose(victim.block)
            else:
                self._memory.lines.drop_tail(victim.line)
