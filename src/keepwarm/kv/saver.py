"""What of the lines is written to the store, out of which memory, and which lines then leave it."""

import math
from collections.abc import Callable, Sequence

from keepwarm.core.agent import AgentBlocks
from keepwarm.core.agent_store import RecordStore
from keepwarm.core.block import Block, BlockHash, LineId, child_hash
from keepwarm.core.errors import InvariantBroken
from keepwarm.core.layout import BLOCK_TOKENS, whole_blocks
from keepwarm.core.pool import BlockPool
from keepwarm.core.ports import Slab
from keepwarm.kv.generator_source import GeneratorSource
from keepwarm.kv.line_table import LineTable, slab_of
from keepwarm.kv.save_queue import SaveQueue, Source, Unsaved, staging, tail_of


class Saver:
    """Owns which lines are being put away; `queue` owns what waits and what is on its way.

    `demote` turns a resting line's slab into blocks and a tail.
    """

    def __init__(
        self,
        lines: LineTable,
        store: RecordStore,
        pool: BlockPool,
        model: GeneratorSource,
        *,
        token_bytes: int,
        demote: Callable[[AgentBlocks], None],
    ) -> None:
        self.queue = SaveQueue(store, pool, model)
        self._lines = lines
        self._store = store
        self._pool = pool
        self._model = model
        self._token_bytes = token_bytes
        self._demote = demote
        self._put_away: set[LineId] = set()

    def __repr__(self) -> str:
        return f"Saver({self.queue!r}, {len(self._put_away)} lines to put away)"

    # -- what is to be saved ---------------------------------------------------------------------

    def offer_block(self, line: AgentBlocks, block: Block) -> None:
        """Have this block of the line's table saved."""
        depth = block.depth
        ids = tuple(line.token_ids[depth * BLOCK_TOKENS : (depth + 1) * BLOCK_TOKENS])
        parent = self._lines.parent_of(line, depth)
        family = self._lines.family_of(line.namespace)
        self.queue.offer(Unsaved(family, block.hash, parent, depth, ids, line.agent_id))

    def offer_tail(self, line: AgentBlocks) -> None:
        """Have the line's unfinished block saved, as far as it goes."""
        ids = line.token_ids[len(line.blocks) * BLOCK_TOKENS :]
        if ids:
            family = self._lines.family_of(line.namespace)
            self.queue.offer(tail_of(line, family, self._lines.end_of_table(line), ids))

    def offer_tails(self) -> None:
        """Of every line, as before a shutdown."""
        for line in self._lines.values():
            self.offer_tail(line)

    def offer_line(self, line: AgentBlocks) -> None:
        """Have all of the line's KV saved that the store lacks."""
        for block in line.blocks:
            self.offer_block(line, block)
        self.offer_tail(line)

    def offer_first(self, line: AgentBlocks, num_tokens: int) -> list[BlockHash]:
        """Have the KV of the line's first tokens saved that the store lacks, while the line runs.

        Returns the names that it has in the save queue until the store has it.
        """
        whole = line.blocks[: whole_blocks(num_tokens)]
        for block in whole:
            self.offer_block(line, block)
        names = [block.hash for block in whole]
        ids = tuple(line.token_ids[len(whole) * BLOCK_TOKENS : num_tokens])
        if ids:
            family = self._lines.family_of(line.namespace)
            parent = self._lines.parent_of(line, len(whole))
            name = child_hash(parent, ids)
            part = Unsaved(family, name, parent, len(whole), ids, line.agent_id, tail_of=line)
            self.queue.offer(part)
            names.append(name)
        return names

    def is_unsaved(self, line: AgentBlocks) -> bool:
        """Whether something of the line waits to be saved, or is on its way."""
        names = [block.hash for block in line.blocks]
        tail_ids = line.token_ids[len(names) * BLOCK_TOKENS :]
        names += [child_hash(self._lines.end_of_table(line), tail_ids)]
        return any(self.queue.is_unsaved(name) for name in names)

    def lines_with_unsaved(self) -> set[LineId]:
        """The lines of whose KV something is in memory only."""
        lines: set[LineId] = set()
        for unsaved in self.queue:
            if unsaved.tail_of is not None:
                lines.add(unsaved.tail_of.line)
            elif (block := self._lines.index.get(unsaved.hash)) is not None:
                lines |= block.owners
        return lines

    def stored_tokens(self, token_ids: Sequence[int], namespace: str = "") -> int:
        """How many of the first tokens the store has."""
        family = self._lines.family_of(namespace)
        records = self._store.plan(family, family.root, token_ids)
        return records[-1].end_position if records else 0

    # -- lines that leave memory -----------------------------------------------------------------

    def put_away(self, line: AgentBlocks) -> None:
        """Save a resting line to its last token; it is `settled` when the store has it all."""
        if line.slab is not None:
            self._demote(line)
        # The disk may have evicted whole blocks that were saved long ago.
        self.offer_line(line)
        self._put_away.add(line.line)

    def take_settled(self) -> list[AgentBlocks]:
        """The lines that were put away and are wholly stored now: their memory may be freed."""
        settled: list[AgentBlocks] = []
        for line_id in list(self._put_away):
            line = self._lines.get(line_id)
            if line is None or line.busy or line.slab is not None:
                self._put_away.remove(line_id)
            elif self._is_stored(line) and not self.is_unsaved(line):
                self._put_away.remove(line_id)
                settled.append(line)
        return settled

    def _is_stored(self, line: AgentBlocks) -> bool:
        return self.stored_tokens(line.token_ids, line.namespace) >= line.num_tokens

    # -- saving ----------------------------------------------------------------------------------

    def save_some(self, max_bytes: float = math.inf) -> None:
        """Hand what waits to be saved to the store, while that takes it; at most so many bytes.

        What only a slab holds is copied, if the pool has the memory to spare; what cannot be
        copied now is left for later.
        """
        num_left = max_bytes / self._token_bytes
        for unsaved in self.queue:
            num_tokens = self.queue.num_missing(unsaved)
            if not num_tokens or not self._holds(unsaved):
                self.queue.drop(unsaved)
                continue
            if num_left <= 0 or not self.queue.accepts(unsaved, num_tokens):
                return
            source = self._source_of(unsaved, num_tokens)
            if source is None and self._demote_for(unsaved):
                source = self._source_of(unsaved, num_tokens)
            if source is None:
                continue
            self.queue.save(unsaved, source)
            num_left -= num_tokens

    def _holds(self, unsaved: Unsaved) -> bool:
        """Whether its KV is still in memory."""
        line = unsaved.tail_of
        if line is None:
            return self._lines.index.get(unsaved.hash) is not None
        start = unsaved.depth * BLOCK_TOKENS
        ids = line.token_ids[start : start + len(unsaved.token_ids)]
        return line.line in self._lines and tuple(ids) == unsaved.token_ids

    def _source_of(self, unsaved: Unsaved, num_tokens: int) -> Source | None:
        """The KV of its last tokens; None when there is no memory for a copy now."""
        stop = len(unsaved.token_ids)
        whole = self._whole_payload(unsaved)
        if whole is not None and num_tokens == stop == whole.payload.num_tokens:
            self._pool.retain(whole.allocation)
            return whole
        allocation = staging(self._pool, num_tokens * self._token_bytes)
        if allocation is None:
            return self._as_it_is(whole, stop)
        if whole is not None:
            return Source(
                self._model.generator.cut(whole.payload, stop - num_tokens, stop), allocation
            )
        start = unsaved.depth * BLOCK_TOKENS
        slab = self._slab_with(unsaved)
        payload = self._model.generator.extract(slab, start + stop - num_tokens, start + stop)
        return Source(payload, allocation)

    def _as_it_is(self, whole: Source | None, stop: int) -> Source | None:
        """Where memory has no room for a copy, what the store has already is written again."""
        if whole is None or whole.payload.num_tokens != stop:
            return None
        self._pool.retain(whole.allocation)
        return whole

    def _demote_for(self, unsaved: Unsaved) -> bool:
        """Where memory has no room for a copy, a resting line's slab becomes what is written."""
        block = self._lines.index.get(unsaved.hash)
        lines = [unsaved.tail_of] if unsaved.tail_of is not None else []
        lines += [self._lines[line] for line in (block.slabs if block is not None else ())]
        resting = [line for line in lines if line.slab is not None and not line.busy]
        if resting:
            self._demote(resting[0])
        return bool(resting)

    def _whole_payload(self, unsaved: Unsaved) -> Source | None:
        """The payload that begins where the block begins, if it has one."""
        line, block = unsaved.tail_of, self._block_of(unsaved)
        if block is not None:
            if block.payload is not None and block.allocation is not None:
                return Source(block.payload, block.allocation)
        elif line is not None and line.tail is not None and line.tail_allocation is not None:
            return Source(line.tail, line.tail_allocation)
        return None

    def _slab_with(self, unsaved: Unsaved) -> Slab:
        block = self._block_of(unsaved)
        if block is not None:
            return self._lines.slab_with(block)
        if unsaved.tail_of is None:
            raise InvariantBroken(f"{unsaved} has no KV")
        return slab_of(unsaved.tail_of)[0]

    def _block_of(self, unsaved: Unsaved) -> Block | None:
        """The whole block, or the one that the line's tail has become meanwhile."""
        line = unsaved.tail_of
        if line is None:
            return self._lines.index.get(unsaved.hash)
        return line.blocks[unsaved.depth] if unsaved.depth < len(line.blocks) else None
