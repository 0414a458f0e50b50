"""Loss: KV that is given up or cannot be trusted leaves the tables of all that rely on it."""

from keepwarm.core.agent import AgentBlocks
from keepwarm.core.block import Block
from keepwarm.core.layout import whole_blocks
from keepwarm.kv.fetch_queue import FetchQueue
from keepwarm.kv.memory import Memory


class Loss:
    """Gives KV up; what was said stays, and is computed again."""

    def __init__(self, memory: Memory, fetches: FetchQueue) -> None:
        self.num_blocks = 0
        self._memory = memory
        self._fetches = fetches

    def __repr__(self) -> str:
        return f"Loss({self.num_blocks} blocks so far)"

    def lose(self, block: Block, but: AgentBlocks | None = None) -> None:
        """Give up the block's KV: the table of every owner (`but` this one) ends before it."""
        for owner in list(block.owners):
            line = self._memory.lines[owner]
            if line is not but:
                self._fetches.cancel(owner)  # what it reads would no longer follow
                self._memory.lines.cut_to_slab(line, block.depth)
        self.num_blocks += 1

    def discard_slab(self, line: AgentBlocks) -> None:
        """Drop a slab whose content cannot be trusted; keep what is stored elsewhere as well."""
        lines = self._memory.lines
        self._fetches.cancel(line.line)
        lines.cut_to_slab(line, whole_blocks(line.num_in_slab))
        self._memory.pool.release(lines.take_slab(line).allocation)
        lines.trim_ids(line)
        lost = next((b for b in line.blocks if b.payload is None and not b.slabs), None)
        if lost is not None:
            self.lose(lost)
