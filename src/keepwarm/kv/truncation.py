"""What a line drops of its KV, and the copies that are made before it goes."""

from keepwarm.core.agent import AgentBlocks
from keepwarm.core.block import Block
from keepwarm.core.errors import InvariantBroken, PoolExhausted
from keepwarm.core.layout import BLOCK_TOKENS, whole_blocks
from keepwarm.core.ports import Payload
from keepwarm.kv.fetch_queue import FetchQueue
from keepwarm.kv.generator_source import GeneratorSource
from keepwarm.kv.line_table import LineTable, busy, lives_only_in, slab_of
from keepwarm.kv.room import Room


class Cutter:
    """Shortens lines; it has no state of its own."""

    def __init__(
        self,
        lines: LineTable,
        fetches: FetchQueue,
        room: Room,
        model: GeneratorSource,
        *,
        token_bytes: int,
    ) -> None:
        self._lines = lines
        self._fetches = fetches
        self._room = room
        self._model = model
        self._token_bytes = token_bytes

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
        """As `truncate`, but nobody is given a copy."""
        self._fetches.cancel(line.line)
        self._lines.cut(line, depth)
        if line.slab is not None and line.slab.num_tokens > depth * BLOCK_TOKENS:
            self._model.generator.trim(line.slab, depth * BLOCK_TOKENS)
        del line.token_ids[line.num_tokens :]

    def copy_tail(self, line: AgentBlocks, num_tokens: int) -> Payload | None:
        """A copy of what lies between the last whole block and `num_tokens`.

        None when there is nothing, or no room for it: fewer than 256 tokens will be computed again.
        """
        start = whole_blocks(num_tokens) * BLOCK_TOKENS
        if start == num_tokens:
            return None
        try:
            with busy(line):
                self._room.make(self._token_bytes * (num_tokens - start))
        except PoolExhausted:
            return None
        return self.read(line, start, num_tokens)

    def read(self, line: AgentBlocks, start: int, stop: int) -> Payload:
        """A copy of [start, stop), which lies within one block and begins with it."""
        if line.slab is not None:
            return self._model.generator.extract(line.slab, start, stop)
        if whole_blocks(start) < len(line.blocks):
            block = line.blocks[whole_blocks(start)]
            if block.payload is None:
                return self._model.generator.extract(self._lines.slab_with(block), start, stop)
            return self._model.generator.cut(block.payload, 0, stop - start)
        if line.tail is None:
            raise InvariantBroken(f"line {line.line} has no KV at {start}")
        return self._model.generator.cut(line.tail, 0, stop - start)

    def _truncate_warm(self, line: AgentBlocks, num_tokens: int) -> None:
        kept_ids = line.token_ids[:num_tokens]
        tail = self.copy_tail(line, num_tokens)
        self._lines.cut_to_slab(line, whole_blocks(num_tokens))
        if tail is not None:
            self._lines.set_tail(line, tail)
            line.token_ids = kept_ids

    def _truncate_hot(self, line: AgentBlocks, num_tokens: int) -> None:
        slab, _ = slab_of(line)
        self._lines.drop_tail(line)
        while len(line.blocks) > whole_blocks(num_tokens):
            self._leave(line, line.blocks[-1])
        if num_tokens < slab.num_tokens:
            self._model.generator.trim(slab, num_tokens)
        # A line that is being restored has nothing of the block that was cut.
        del line.token_ids[line.num_tokens :]

    def _leave(self, line: AgentBlocks, block: Block) -> None:
        """The line drops its last block; owners who rely on this slab get a copy first."""
        if lives_only_in(block, line) and len(block.owners) > 1:
            self._save_for_others(line, block)
        self._lines.cut(line, block.depth)

    def _save_for_others(self, line: AgentBlocks, block: Block) -> None:
        start = block.depth * BLOCK_TOKENS
        try:
            with busy(line):
                self._room.make(self._token_bytes * BLOCK_TOKENS)
        except PoolExhausted:
            self._room.lose(block, but=line)
            return
        if len(block.owners) > 1:
            slab, _ = slab_of(line)
            payload = self._model.generator.extract(slab, start, start + BLOCK_TOKENS)
            self._lines.index.attach_payload(block, payload)
