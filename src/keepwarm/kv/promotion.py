"""Promotion: blocks, tails and records from the store are copied into a line's slab."""

import math
from collections.abc import Sequence
from contextlib import suppress
from itertools import takewhile

from keepwarm.core.agent import AgentBlocks
from keepwarm.core.agent_store import RecordStore
from keepwarm.core.errors import InvariantBroken, PoolExhausted
from keepwarm.core.layout import BLOCK_TOKENS, whole_blocks
from keepwarm.core.ports import Slab
from keepwarm.kv.fetch_queue import FetchPlan, FetchQueue
from keepwarm.kv.line_table import slab_of
from keepwarm.kv.memory import Memory
from keepwarm.kv.room import Room
from keepwarm.kv.save_queue import SaveQueue
from keepwarm.kv.truncation import Truncation


class Promotion:
    """Fills the slabs of lines that were made hot, a bounded number of bytes at a time."""

    def __init__(
        self,
        memory: Memory,
        store: RecordStore,
        *,
        saves: SaveQueue,
        fetches: FetchQueue,
        room: Room,
        truncation: Truncation,
    ) -> None:
        self.num_restored_blocks = 0
        self.num_fetched_tokens = 0
        self._memory = memory
        self._store = store
        self._saves = saves
        self._fetches = fetches
        self._room = room
        self._truncation = truncation

    def __repr__(self) -> str:
        return f"Promotion({self.num_restored_blocks} blocks, {self.num_fetched_tokens} tokens)"

    def prepare(self, line: AgentBlocks, max_bytes: float = math.inf) -> bool:
        """Touch the next part of the slab's memory. Returns whether all of it is ready."""
        slab = slab_of(line)
        if not slab.is_ready:
            self._memory.model.generator.prepare(slab, max_bytes)
        return slab.is_ready

    def restore(self, line: AgentBlocks, max_bytes: float = math.inf) -> int:
        """Copy the next blocks, and at last the tail, into the slab; at least one of them.

        Returns how many tokens were copied.
        """
        slab = slab_of(line)
        before = slab.num_tokens
        max_tokens = max_bytes / self._memory.token_bytes
        while line.num_to_restore and slab.num_tokens - before < max_tokens:
            if whole_blocks(slab.num_tokens) < len(line.blocks):
                num_left = max_tokens - (slab.num_tokens - before)
                self._restore_blocks(line, slab, num_left)
            elif line.tail is not None:
                self._memory.model.generator.reconstruct(slab, [line.tail])
                self._memory.lines.release_tail(line)
        return slab.num_tokens - before

    # -- out of the store ------------------------------------------------------------------------

    def plan_fetch(
        self, line: AgentBlocks, token_ids: Sequence[int], known_ids: Sequence[int] = ()
    ) -> FetchPlan | None:
        """Find what memory lacks of these ids and the store has; None where that is nothing.

        `known_ids` are those of the line's conversation, under which the store has it.
        """
        family, depth = self._memory.lines.family_of(line.namespace), whole_blocks(line.num_tokens)
        parent = self._memory.lines.parent_of(line, depth)
        plan = self._fetches.plan(family, parent, depth, token_ids, known_ids)
        return plan if plan.end > line.num_tokens else None

    def fetch(self, line: AgentBlocks, plan: FetchPlan) -> None:
        """Begin to bring into memory what follows the line's KV by this plan, which is fresh."""
        needed = [record for record in plan.records if record.end_position > line.num_tokens]
        if needed[0].first_position != line.num_tokens:
            # The first record begins before the line's end: what both have is copied with it.
            self._truncation.truncate(line, whole_blocks(line.num_tokens) * BLOCK_TOKENS)
            needed = plan.records
        family = self._memory.lines.family_of(line.namespace)
        with suppress(PoolExhausted):
            largest = max(record.num_tokens for record in needed)
            self._room.make(self._store.record_bytes(family, largest))
        self._fetches.begin(line.line, family, needed, plan.end)

    def take_fetched(
        self, line: AgentBlocks, token_ids: Sequence[int], max_bytes: float = math.inf
    ) -> int:
        """Copy what has come from the store into the slab. Returns how many tokens that were.

        `token_ids` are those that the line was made hot for.
        """
        slab = slab_of(line)
        before = slab.num_tokens
        while (slab.num_tokens - before) * self._memory.token_bytes < max_bytes:
            arrival = self._fetches.next_arrival(line.line)
            if arrival is None:
                break
            start = arrival.record.first_position
            if start != slab.num_tokens:
                raise InvariantBroken(f"{arrival.record} does not follow {slab!r}")
            self._memory.model.generator.reconstruct(slab, [arrival.payload])
            self._fetches.done(line.line)
            self._memory.lines.append(line, token_ids[start : slab.num_tokens])
            self._saves.offer_whole_blocks(line)
        self.num_fetched_tokens += slab.num_tokens - before
        return slab.num_tokens - before

    # -- inside ----------------------------------------------------------------------------------

    def _restore_blocks(self, line: AgentBlocks, slab: Slab, max_tokens: float) -> None:
        """Copy the next blocks: all that have payloads at once, or one from another line's slab."""
        depth = whole_blocks(slab.num_tokens)
        num_blocks = max(1, int(min(max_tokens, line.num_to_restore) // BLOCK_TOKENS))
        wanted = line.blocks[depth : depth + num_blocks]
        copied = list(takewhile(lambda block: block.payload is not None, wanted))
        generator = self._memory.model.generator
        if copied:
            generator.reconstruct(slab, [b.payload for b in copied if b.payload is not None])
        else:
            copied = list(wanted[:1])
            start = depth * BLOCK_TOKENS
            source = self._memory.lines.slab_with(copied[0])
            generator.copy_span(source, slab, start, start + BLOCK_TOKENS)
        self._memory.lines.enter_slab(line, copied)
        self.num_restored_blocks += len(copied)
