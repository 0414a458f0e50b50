"""Truncation: what a line drops of its KV, and the copies that are made before it goes."""

from keepwarm.core.agent import AgentBlocks
from keepwarm.core.block import Block
from keepwarm.core.errors import PoolExhausted
from keepwarm.core.layout import BLOCK_TOKENS, whole_blocks
from keepwarm.kv.copies import Copies
from keepwarm.kv.fetch_queue import FetchQueue
from keepwarm.kv.line_table import lives_only_in, slab_of
from keepwarm.kv.loss import Loss
from keepwarm.kv.memory import Memory
from keepwarm.kv.room import Room


class Truncation:
    """Shortens lines; it has no state of its own."""

    def __init__(
        self, memory: Memory, fetches: FetchQueue, loss: Loss, room: Room, copies: Copies
    ) -> None:
        self._memory = memory
        self._fetches = fetches
        self._loss = loss
        self._room = room
        self._copies = copies

    def truncate(self, line: AgentBlocks, num_tokens: int) -> None:
        """Forget the line's KV from `num_tokens` on; what other lines own stays with them."""
        self._fetches.cancel(line.line)
        if num_tokens >= line.num_tokens:
            return
        if line.slab is None:
            self._truncate_warm(line, num_tokens)
        else:
            self._truncate_hot(line, num_tokens)

    def distrust(self, line: AgentBlocks, depth: int) -> None:
        """Forget the line's KV from the block at `depth` on, which is wrong: none gets a copy."""
        self._fetches.cancel(line.line)
        self._memory.lines.cut(line, depth)
        if line.slab is not None and line.slab.num_tokens > depth * BLOCK_TOKENS:
            self._memory.model.generator.trim(line.slab, depth * BLOCK_TOKENS)
        self._memory.lines.trim_ids(line)

    def _truncate_warm(self, line: AgentBlocks, num_tokens: int) -> None:
        kept_ids = line.token_ids[:num_tokens]
        tail = self._copies.tail(line, num_tokens)
        self._memory.lines.cut_to_slab(line, whole_blocks(num_tokens))
        if tail is not None:
            self._memory.lines.set_tail(line, tail, kept_ids)

    def _truncate_hot(self, line: AgentBlocks, num_tokens: int) -> None:
        slab = slab_of(line)
        self._memory.lines.drop_tail(line)
        while len(line.blocks) > whole_blocks(num_tokens):
            self._leave(line, line.blocks[-1])
        if num_tokens < slab.num_tokens:
            self._memory.model.generator.trim(slab, num_tokens)
        # A line that is being restored has nothing of the block that was cut.
        self._memory.lines.trim_ids(line)

    def _leave(self, line: AgentBlocks, block: Block) -> None:
        """Drop the line's last block; owners that rely on this slab get a copy first."""
        if lives_only_in(block, line) and len(block.owners) > 1:
            self._save_for_others(line, block)
        self._memory.lines.cut(line, block.depth)

    def _save_for_others(self, line: AgentBlocks, block: Block) -> None:
        try:
            with self._memory.lines.held(line):
                self._room.make(self._memory.token_bytes * BLOCK_TOKENS)
        except PoolExhausted:
            self._loss.lose(block, but=line)
            return
        if len(block.owners) > 1:  # making room may have evicted the other owners' tables
            start = block.depth * BLOCK_TOKENS
            payload = self._memory.model.generator.extract(
                slab_of(line), start, start + BLOCK_TOKENS
            )
            self._memory.index.attach_payload(block, payload)
