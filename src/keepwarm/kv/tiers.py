"""Where every line's KV is, and the moves between the tiers.

Hot is a slab, warm is blocks and a tail, cold is records in the store, found by content. Every byte
of memory is an allocation of the pool.
"""

import math
from collections.abc import Sequence

from keepwarm.core.agent import AgentBlocks
from keepwarm.core.agent_store import NoStore, RecordStore
from keepwarm.core.block import Block, BlockHash, LineId, common_prefix
from keepwarm.core.layout import BLOCK_TOKENS, whole_blocks
from keepwarm.core.pool import Allocation, BlockPool
from keepwarm.core.stored import KVFamily
from keepwarm.kv.copies import Copies
from keepwarm.kv.counters import TierCounters
from keepwarm.kv.demotion import Demotion
from keepwarm.kv.fetch_queue import FetchQueue
from keepwarm.kv.generator_source import GeneratorSource
from keepwarm.kv.line_table import paid_slab_of
from keepwarm.kv.loss import Loss
from keepwarm.kv.memory import Memory
from keepwarm.kv.promotion import Promotion
from keepwarm.kv.room import Room
from keepwarm.kv.save_queue import SaveQueue
from keepwarm.kv.saver import Saver
from keepwarm.kv.spare_slabs import PaidSlab
from keepwarm.kv.truncation import Truncation


class Tiers:
    """Moves KV between slabs, blocks and the store. No lock: one thread.

    Each of its parts knows only those before it: `memory` has the books and the free slabs, `saves`
    and `fetches` the traffic with the store; `Loss` gives KV up, `Demotion` empties slabs, `Room`
    makes room, `copies` reads, `Truncation` shortens lines, `promotion` fills slabs, and `saver`
    writes.
    """

    def __init__(
        self,
        pool: BlockPool,
        model: GeneratorSource,
        *,
        family: KVFamily,
        store: RecordStore | None = None,
    ) -> None:
        store = store or NoStore()
        self.pool = pool
        self.model = model
        self.memory = memory = Memory.of_model(pool, model, family, now=store.clock())
        self._lines = memory.lines
        self.fetches = fetches = FetchQueue(store, pool, model)
        self.saves = saves = SaveQueue(memory, store)
        self._loss = loss = Loss(memory, fetches)
        self._demotion = demotion = Demotion(memory, loss, saves)
        self._room = room = Room(memory, demotion, loss, saves, fetches)
        self.copies = copies = Copies(memory, room)
        self._truncation = truncation = Truncation(memory, fetches, loss, room, copies)
        self.promotion = Promotion(
            memory, store, saves=saves, fetches=fetches, room=room, truncation=truncation
        )
        self.saver = Saver(memory, saves, demotion)
        self._num_slab_growths = 0

    def __repr__(self) -> str:
        return f"Tiers({self._lines!r}, {self.pool!r})"

    @property
    def counters(self) -> TierCounters:
        """How often each move has happened so far."""
        return TierCounters(
            demotions=self._demotion.num_demotions,
            evicted_blocks=self._loss.num_blocks,
            restored_blocks=self.promotion.num_restored_blocks,
            fetched_tokens=self.promotion.num_fetched_tokens,
            slab_growths=self._num_slab_growths,
        )

    # -- lines -----------------------------------------------------------------------------------

    def new_line(self, agent_id: str | None = None, namespace: str | None = None) -> AgentBlocks:
        """Add an empty line. `namespace` None is the agent's own."""
        return self._lines.new(agent_id, namespace)

    def has_line(self, line: AgentBlocks) -> bool:
        """Whether the line was made here and is not forgotten."""
        return self._lines.get(line.line) is line

    def family_of(self, namespace: str) -> KVFamily:
        """Return the family that the model's KV in this namespace belongs to."""
        return self._lines.family_of(namespace)

    def root_of(self, line: AgentBlocks) -> BlockHash:
        """Return the parent of the line's first block."""
        return self._lines.parent_of(line, 0)

    def touch(self, line: AgentBlocks, *, as_of: int | None = None) -> None:
        """Note that the line was used just now, or give it back the age that it had before."""
        self._lines.touch(line, as_of=as_of)

    def catch_up(self, last_used: int) -> None:
        """Count on from another model's age: a line used from now on is younger than that."""
        self._lines.catch_up(last_used)

    def pin(self, line: AgentBlocks, *, pinned: bool = True) -> None:
        """Keep the line's blocks from being evicted, or let them be."""
        self._lines.pin(line, pinned=pinned)

    def forget(self, line: AgentBlocks) -> None:
        """Drop the line; blocks that others own stay with them."""
        self.truncate(line, 0)
        if line.slab is not None:
            self.memory.spares.keep(self._lines.take_slab(line))
        self._lines.remove(line)

    def fork(
        self, parent: AgentBlocks, num_tokens: int, agent_id: str | None = None
    ) -> AgentBlocks:
        """Add a line that holds the parent's first tokens.

        Whole blocks are shared by reference; only a tail is copied, and left out when there is no
        room for it.
        """
        num_tokens = min(num_tokens, parent.num_tokens)
        child = self._lines.new(agent_id, parent.namespace)
        shared = parent.blocks[: whole_blocks(num_tokens)]
        self._lines.extend(child, shared, parent.token_ids)
        with self._lines.held(child):
            tail = self.copies.tail(parent, num_tokens)
        if tail is not None:
            self._lines.set_tail(child, tail, parent.token_ids)
        return child

    def new_scratch(
        self, beside: AgentBlocks, capacity_tokens: int, spare_bytes: int
    ) -> AgentBlocks:
        """Add a held line with an empty slab, to compute what a line has while that keeps its KV.

        `spare_bytes` more are free then. Raises PoolExhausted.
        """
        scratch = self._lines.new(beside.agent_id)
        self._lines.hold(scratch)
        try:
            with self._lines.held(beside):
                self.make_room(self.slab_bytes(capacity_tokens) + spare_bytes)
                self._lines.put_slab(scratch, self._new_slab(capacity_tokens))
                self.make_room(spare_bytes)
        except BaseException:
            self.forget(scratch)
            raise
        return scratch

    # -- into the slab ---------------------------------------------------------------------------

    def slab_bytes(self, capacity_tokens: int) -> int:
        """Return what a slab of this capacity occupies."""
        return self.model.generator.slab_bytes(capacity_tokens)

    def make_hot(self, line: AgentBlocks, token_ids: Sequence[int], capacity_tokens: int) -> None:
        """Give the line a slab, keep what `token_ids` continues, and name the blocks to restore.

        The line is held from then on, until it is parked. Raises PoolExhausted when other running
        or pinned lines leave too little; the line is then as before.
        """
        run = self._lines.longest_run(line, token_ids)
        with self._lines.guarded(run), self._lines.held(line):
            if line.slab is None:
                slab = self._new_slab(capacity_tokens)
                self._adopt(line, run, token_ids)
                self._lines.put_slab(line, slab)
            else:
                self.reserve(line, capacity_tokens)
                self._adopt(line, run, token_ids)
        self._lines.hold(line)

    def make_room_at_any_cost(self, line: AgentBlocks, capacity_tokens: int) -> None:
        """Free the bytes of the line's slab where no row will end: its own blocks may go for it.

        The line's own pin yields: a prefill is better than no answer. Raises PoolExhausted when
        other pinned lines leave too little.
        """
        if line.slab is not None:
            self.demote(line)
        with self._lines.unpinned(line):
            self.make_room(self.slab_bytes(capacity_tokens))

    def reserve(self, line: AgentBlocks, capacity_tokens: int) -> None:
        """Grow the slab to at least that capacity. Raises PoolExhausted, leaving the slab."""
        paid = paid_slab_of(line)
        if paid.slab.capacity_tokens >= capacity_tokens:
            return
        nbytes = self.slab_bytes(capacity_tokens)
        self.make_room(nbytes - paid.allocation.nbytes)
        self.pool.resize(paid.allocation, nbytes)
        grown = self.model.generator.grow_slab(paid.slab, capacity_tokens)
        self._lines.replace_slab(line, grown)
        self._num_slab_growths += 1

    def adopt_computed(self, line: AgentBlocks, token_ids: Sequence[int]) -> int:
        """Name the blocks that others have computed meanwhile, right behind what the line holds.

        Returns how many tokens may be restored instead of computed.
        """
        if line.num_tokens % BLOCK_TOKENS:
            return 0
        run = self._lines.run_behind(line, token_ids)
        if run:
            self._lines.extend(line, run, token_ids)
        return len(run) * BLOCK_TOKENS

    def advance(self, line: AgentBlocks, token_ids: Sequence[int]) -> None:
        """Note that the slab holds these ids as well; blocks that became whole can be found."""
        self._lines.append(line, token_ids)
        self.saves.offer_whole_blocks(line)

    def note_computed(self, line: AgentBlocks, token_ids: Sequence[int]) -> None:
        """Note that the slab holds these ids as well, and let no other line find them yet."""
        self._lines.append(line, token_ids)

    # -- out of the slab -------------------------------------------------------------------------

    def park(self, line: AgentBlocks) -> None:
        """Let the line rest; it keeps its slab until memory is short.

        A line that was not wholly restored has its blocks still and goes back to them.
        """
        self.fetches.cancel(line.line)
        if line.num_to_restore:
            self.demote(line)
        self._lines.let_go(line)
        self._lines.touch(line)

    def demote(self, line: AgentBlocks) -> None:
        """Turn a resting line's slab into blocks and a tail; what exists already is not copied."""
        self._demotion.demote(line)

    def truncate(self, line: AgentBlocks, num_tokens: int) -> None:
        """Forget the line's KV from `num_tokens` on; what other lines own stays with them."""
        self._truncation.truncate(line, num_tokens)

    def owners_of(self, line: AgentBlocks, depth: int) -> set[LineId]:
        """Return the lines that rely on the block at this depth, this one included."""
        return set(line.blocks[depth].owners) if depth < len(line.blocks) else {line.line}

    def distrust(self, line: AgentBlocks, depth: int) -> None:
        """Forget the line's KV from this block on, which is wrong, with all that rely on the block.

        None of them may be in the batch.
        """
        for owner in self.owners_of(line, depth):
            self._truncation.distrust(self._lines[owner], depth)

    def discard_slab(self, line: AgentBlocks) -> None:
        """Drop a slab whose content cannot be trusted; keep what is stored elsewhere as well."""
        self._loss.discard_slab(line)
        self._lines.let_go(line)

    # -- to the store ----------------------------------------------------------------------------

    def save_some(self, max_bytes: float = math.inf) -> None:
        """Hand at most `max_bytes` of what waits to be saved to the store, while that takes it."""
        self.saver.save_some(max_bytes)

    def release_put_away(self) -> None:
        """Free the memory of lines that were put away and are wholly stored now."""
        for line in self.saver.take_settled():
            self.truncate(line, 0)

    def put_all_away(self) -> None:
        """Save every resting line to its last token; the memory is free when the store has it."""
        for line in list(self._lines.values()):
            if not line.is_held:
                self.saver.put_away(line)
        self.drop_spares()

    # -- the whole -------------------------------------------------------------------------------

    @property
    def spendable_bytes(self) -> int:
        """How many bytes new KV can take without any other KV being given up."""
        return self.pool.free_bytes + self.memory.spares.nbytes

    @property
    def is_being_freed(self) -> bool:
        """Whether memory comes free though no row ends here: KV is being saved, or others end."""
        return self.saves.is_busy or self.pool.neighbours.will_free()

    def make_room(self, needed_bytes: int, *, ask_others: bool = True) -> None:
        """Give up memory until `needed_bytes` are free. Raises PoolExhausted when they cannot be.

        The pools of the same budget are asked last, if they are to be.
        """
        self._room.make(needed_bytes, ask_others=ask_others)

    def drop_spares(self) -> None:
        """Free memory that is kept only to be used again."""
        self.fetches.free_buffers()
        self.memory.spares.drop_all()

    def check(self) -> None:
        """Raise InvariantBroken unless tables, blocks and the pool's bytes agree."""
        self._lines.check()
        self.pool.check(self._holders())

    # -- inside ----------------------------------------------------------------------------------

    def _adopt(self, line: AgentBlocks, run: Sequence[Block], token_ids: Sequence[int]) -> None:
        """Cut the line to what it shares with `token_ids`, and let its table name the run."""
        own = common_prefix(line.token_ids, token_ids)
        if len(run) * BLOCK_TOKENS > own:
            own -= own % BLOCK_TOKENS
        self.truncate(line, own)
        self._lines.extend(line, run[len(line.blocks) :], token_ids)

    def _new_slab(self, capacity_tokens: int) -> PaidSlab:
        spare = self.memory.spares.take_spare(capacity_tokens)
        if spare is not None:
            return spare
        self.make_room(self.slab_bytes(capacity_tokens))
        return self.memory.spares.new(capacity_tokens)

    def _holders(self) -> dict[Allocation, tuple[int, int]]:
        holders = {
            **self._lines.holders(),
            **self.memory.spares.holders(),
            **self.fetches.holders(),
        }
        holders |= self.copies.holders()
        for allocation, (count, nbytes) in self.saves.holders().items():
            holders[allocation] = (count + holders.get(allocation, (0, 0))[0], nbytes)
        return holders
