"""Writing lines to the store: the memory that a write reads from, and lines that leave memory."""

import math

from keepwarm.core.agent import AgentBlocks
from keepwarm.core.block import Block, LineId
from keepwarm.core.errors import InvariantBroken
from keepwarm.core.layout import BLOCK_TOKENS
from keepwarm.core.pool import Allocation, Kind
from keepwarm.core.ports import Slab
from keepwarm.kv.demotion import Demotion
from keepwarm.kv.line_table import slab_of
from keepwarm.kv.memory import Memory
from keepwarm.kv.save_queue import PaidPayload, SaveQueue, Unsaved


class Saver:
    """Hands to the store what waits in the queue, and owns which lines are being put away."""

    def __init__(self, memory: Memory, queue: SaveQueue, demotion: Demotion) -> None:
        self._memory = memory
        self._queue = queue
        self._demotion = demotion
        self._put_away: set[LineId] = set()

    def __repr__(self) -> str:
        return f"Saver({self._queue!r}, {len(self._put_away)} lines to put away)"

    # -- lines that leave memory -----------------------------------------------------------------

    def put_away(self, line: AgentBlocks) -> None:
        """Save a resting line to its last token; `take_settled` has it when the store has all."""
        if line.slab is not None:
            self._demotion.demote(line)
        # The disk may have evicted whole blocks that were saved long ago.
        self._queue.offer_line(line)
        self._put_away.add(line.line)

    def take_settled(self) -> list[AgentBlocks]:
        """Return the lines that were put away and are wholly stored now: their memory may be freed.

        A line that was used again meanwhile stays.
        """
        settled: list[AgentBlocks] = []
        for line_id in list(self._put_away):
            line = self._memory.lines.get(line_id)
            if line is None or line.is_held or line.slab is not None:
                self._put_away.remove(line_id)
            elif self._is_stored(line) and not self._queue.has_unsaved(line):
                self._put_away.remove(line_id)
                settled.append(line)
        return settled

    def _is_stored(self, line: AgentBlocks) -> bool:
        return self._queue.stored_tokens(line.token_ids, line.namespace) >= line.num_tokens

    # -- saving ----------------------------------------------------------------------------------

    def save_some(self, max_bytes: float = math.inf) -> None:
        """Hand at most `max_bytes` of what waits to the store, while that takes it.

        What only a slab holds is copied, if the pool has the memory to spare; what cannot be
        copied now is left for later.
        """
        num_left = max_bytes / self._memory.token_bytes
        for unsaved in self._queue:
            num_tokens = self._queue.num_missing(unsaved)
            if not num_tokens or not self._holds(unsaved):
                self._queue.drop(unsaved)
                continue
            if num_left <= 0 or not self._queue.accepts(unsaved, num_tokens):
                return
            source = self._source_of(unsaved, num_tokens)
            if source is None and self._demote_for(unsaved):
                source = self._source_of(unsaved, num_tokens)
            if source is None:
                continue
            self._queue.save(unsaved, source)
            num_left -= num_tokens

    def _holds(self, unsaved: Unsaved) -> bool:
        """Whether its KV is still in memory."""
        line = unsaved.tail_of
        if line is None:
            return self._memory.index.get(unsaved.hash) is not None
        start = unsaved.depth * BLOCK_TOKENS
        ids = line.token_ids[start : start + len(unsaved.token_ids)]
        return line.line in self._memory.lines and tuple(ids) == unsaved.token_ids

    def _source_of(self, unsaved: Unsaved, num_tokens: int) -> PaidPayload | None:
        """Return the KV of its last tokens; None when there is no memory for a copy now."""
        generator = self._memory.model.generator
        stop = len(unsaved.token_ids)
        whole = self._whole_payload(unsaved)
        if whole is not None and num_tokens == stop == whole.payload.num_tokens:
            self._memory.pool.retain(whole.allocation)
            return whole
        allocation = self._staging(num_tokens * self._memory.token_bytes)
        if allocation is None:
            return self._as_it_is(whole, stop)
        if whole is not None:
            payload = generator.cut(whole.payload, stop - num_tokens, stop)
        else:
            end = unsaved.depth * BLOCK_TOKENS + stop
            payload = generator.extract(self._slab_with(unsaved), end - num_tokens, end)
        return PaidPayload(payload, allocation)

    def _staging(self, nbytes: int) -> Allocation | None:
        """Allocate memory for a copy, if the pool has it: nothing is evicted in order to save."""
        if self._memory.pool.free_bytes < nbytes:
            return None
        return self._memory.pool.allocate(Kind.SAVING, nbytes)

    def _as_it_is(self, whole: PaidPayload | None, stop: int) -> PaidPayload | None:
        """Return what the store has already, to be written again where no copy fits into memory."""
        if whole is None or whole.payload.num_tokens != stop:
            return None
        self._memory.pool.retain(whole.allocation)
        return whole

    def _demote_for(self, unsaved: Unsaved) -> bool:
        """Demote a resting line, whose payload can be written where no copy fits into memory."""
        block = self._memory.index.get(unsaved.hash)
        lines = [unsaved.tail_of] if unsaved.tail_of is not None else []
        lines += [self._memory.lines[line] for line in (block.slabs if block is not None else ())]
        resting = next((line for line in lines if line.is_resting), None)
        if resting is not None:
            self._demotion.demote(resting)
        return resting is not None

    def _whole_payload(self, unsaved: Unsaved) -> PaidPayload | None:
        """Return the payload that begins where the block begins, if it has one."""
        line, block = unsaved.tail_of, self._block_of(unsaved)
        if block is not None:
            if block.payload is not None and block.allocation is not None:
                return PaidPayload(block.payload, block.allocation)
        elif line is not None and line.tail is not None and line.tail_allocation is not None:
            return PaidPayload(line.tail, line.tail_allocation)
        return None

    def _slab_with(self, unsaved: Unsaved) -> Slab:
        block = self._block_of(unsaved)
        if block is not None:
            return self._memory.lines.slab_with(block)
        if unsaved.tail_of is None:
            raise InvariantBroken(f"{unsaved} has no KV")
        return slab_of(unsaved.tail_of)

    def _block_of(self, unsaved: Unsaved) -> Block | None:
        """Return the whole block, or the one that the line's tail has become meanwhile."""
        line = unsaved.tail_of
        if line is None:
            return self._memory.index.get(unsaved.hash)
        return line.blocks[unsaved.depth] if unsaved.depth < len(line.blocks) else None
