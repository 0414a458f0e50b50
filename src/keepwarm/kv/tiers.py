"""Where every line's KV is, and the moves between the tiers.

Hot is a slab, warm is blocks and a tail, cold is records in the store, found by content. Every byte
of memory is an allocation of the pool.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import takewhile

from keepwarm.core.agent import AgentBlocks
from keepwarm.core.agent_store import NoStore, RecordStore
from keepwarm.core.block import Block, BlockHash, LineId, chain_hashes, common_prefix
from keepwarm.core.errors import InvariantBroken, PoolExhausted
from keepwarm.core.layout import BLOCK_TOKENS, whole_blocks
from keepwarm.core.pool import Allocation, BlockPool, Kind
from keepwarm.core.ports import Payload, Slab
from keepwarm.core.stored import KVFamily
from keepwarm.kv.counters import TierCounters
from keepwarm.kv.fetch_queue import FetchQueue
from keepwarm.kv.generator_source import GeneratorSource
from keepwarm.kv.line_table import LineTable, busy, lives_only_in, slab_of, unpinned
from keepwarm.kv.room import Room
from keepwarm.kv.saver import Saver
from keepwarm.kv.spare_slabs import PaidSlab, SpareSlabs
from keepwarm.kv.truncation import Cutter


class Tiers:
    """Moves KV between slabs, blocks and the store. No lock: one thread.

    `LineTable` owns what each line has, `Saver` what goes to the store, `FetchQueue` what comes
    from there; `Room` makes room, `Cutter` shortens lines.
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
        self.counters = TierCounters()
        self.model = model
        self._store = store
        self._family = family
        self._root = family.root
        self._copies: list[Allocation] = []
        self._token_bytes = family.layout.token_bytes
        self._shelf = SpareSlabs(pool, model)
        self._lines = LineTable(pool, family, now=store.clock())
        self.index = self._lines.index
        self.fetches = FetchQueue(store, pool, model)
        self.saver = Saver(
            self._lines, store, pool, model, token_bytes=self._token_bytes, demote=self.demote
        )
        self.saves = self.saver.queue
        self._room = Room(
            pool,
            self._lines,
            self._shelf,
            saver=self.saver,
            fetches=self.fetches,
            counters=self.counters,
            demote=self.demote,
        )
        self._cutter = Cutter(
            self._lines, self.fetches, self._room, model, token_bytes=self._token_bytes
        )

    def __repr__(self) -> str:
        return f"Tiers({self._lines!r}, {self.pool!r})"

    # -- lines -----------------------------------------------------------------------------------

    def new_line(self, agent_id: str | None = None, namespace: str | None = None) -> AgentBlocks:
        """`namespace` None is the agent's own."""
        return self._lines.new(agent_id, namespace)

    def family_of(self, namespace: str) -> KVFamily:
        """The model's KV in that namespace, which is a line's."""
        return self._lines.family_of(namespace)

    def root_of(self, line: AgentBlocks) -> BlockHash:
        """The parent of the line's first block."""
        return self._lines.parent_of(line, 0)

    def touch(self, line: AgentBlocks) -> None:
        """The line was used just now."""
        self._lines.touch(line)

    def catch_up(self, last_used: int) -> None:
        """What is used from now on was used after that."""
        self._lines.catch_up(last_used)

    def forget(self, line: AgentBlocks) -> None:
        """The line goes; blocks that others own stay with them."""
        self.truncate(line, 0)
        self._free_slab(line)
        self._lines.remove(line)

    def fork(
        self, parent: AgentBlocks, num_tokens: int, agent_id: str | None = None
    ) -> AgentBlocks:
        """A new line that holds the parent's first tokens.

        Whole blocks are shared by reference; only a tail is copied, and left out when there is no
        room for it.
        """
        num_tokens = min(num_tokens, parent.num_tokens)
        child = self._lines.new(agent_id, parent.namespace)
        self._lines.extend(child, parent.blocks[: whole_blocks(num_tokens)])
        with busy(child):
            tail = self._cutter.copy_tail(parent, num_tokens)
        if tail is not None:
            self._lines.set_tail(child, tail)
        child.token_ids = parent.token_ids[: child.num_tokens]
        return child

    def slab_bytes(self, capacity_tokens: int) -> int:
        """What a slab of this capacity occupies."""
        return self.model.generator.slab_bytes(capacity_tokens)

    # -- into the slab ---------------------------------------------------------------------------

    def make_hot(
        self,
        line: AgentBlocks,
        token_ids: Sequence[int],
        capacity_tokens: int,
        *,
        known_ids: Sequence[int] = (),
        is_worth_fetching: Callable[[], bool] = lambda: True,
    ) -> None:
        """Give the line a slab, keep what `token_ids` continues, and name the blocks to restore.

        What memory lacks and the store has is fetched, where that is worth it; `known_ids` are
        those of the line's conversation, under which the store has it. Raises PoolExhausted when
        other running or pinned lines leave too little; the line is then as before.
        """
        run = self.index.longest_run(chain_hashes(self.root_of(line), token_ids))
        with self._lines.guarded(run), busy(line):
            if line.slab is None:
                slab = self._take_slab(capacity_tokens)
                self._adopt(line, run, token_ids)
                line.slab, line.slab_allocation = slab.slab, slab.allocation
            else:
                self.reserve(line, capacity_tokens)
                self._adopt(line, run, token_ids)
        line.busy = True
        self._begin_fetch(line, token_ids, known_ids, is_worth_fetching)

    def make_hot_at_any_cost(
        self,
        line: AgentBlocks,
        token_ids: Sequence[int],
        capacity_tokens: int,
        *,
        known_ids: Sequence[int] = (),
        is_worth_fetching: Callable[[], bool] = lambda: True,
    ) -> None:
        """As make_hot, but where nobody will leave, give up even the blocks to be restored.

        The line's own pin yields: a prefill is better than no answer. Raises PoolExhausted when
        other pinned lines leave too little.
        """
        if line.slab is not None:
            self.demote(line)
        with unpinned(line):
            self.make_room(self.slab_bytes(capacity_tokens))
        self.make_hot(
            line,
            token_ids,
            capacity_tokens,
            known_ids=known_ids,
            is_worth_fetching=is_worth_fetching,
        )

    def reserve(self, line: AgentBlocks, capacity_tokens: int) -> None:
        """Grow the slab to at least that capacity. Raises PoolExhausted, leaving the slab."""
        slab, allocation = slab_of(line)
        if slab.capacity_tokens >= capacity_tokens:
            return
        nbytes = self.slab_bytes(capacity_tokens)
        self.make_room(nbytes - allocation.nbytes)
        self.pool.resize(allocation, nbytes)
        line.slab = self.model.generator.grow_slab(slab, capacity_tokens)
        self.counters.slab_growths += 1

    def prepare(self, line: AgentBlocks, max_bytes: float = math.inf) -> bool:
        """Touch the next part of the slab's memory. Returns whether all of it is ready."""
        slab, _ = slab_of(line)
        if not slab.is_ready:
            self.model.generator.prepare(slab, max_bytes)
        return slab.is_ready

    def restore(self, line: AgentBlocks, max_bytes: float = math.inf) -> int:
        """Copy the next blocks, and at last the tail, into the slab; at least one of them.

        Returns how many tokens were copied.
        """
        slab, _ = slab_of(line)
        before = slab.num_tokens
        max_tokens = max_bytes / self._token_bytes
        while line.num_to_restore and slab.num_tokens - before < max_tokens:
            if whole_blocks(slab.num_tokens) < len(line.blocks):
                num_left = max_tokens - (slab.num_tokens - before)
                self._restore_blocks(line, slab, num_left)
            elif line.tail is not None:
                self.model.generator.reconstruct(slab, [line.tail])
                self._lines.release_tail(line)
        return slab.num_tokens - before

    def take_fetched(
        self, line: AgentBlocks, token_ids: Sequence[int], max_bytes: float = math.inf
    ) -> int:
        """Copy what has come from the store into the slab. Returns how many tokens that were.

        `token_ids` are those that the line was made hot for.
        """
        slab, _ = slab_of(line)
        before = slab.num_tokens
        while (slab.num_tokens - before) * self._token_bytes < max_bytes:
            arrival = self.fetches.next_arrival(line.line)
            if arrival is None:
                break
            start = arrival.record.first_position
            if start != slab.num_tokens:
                raise InvariantBroken(f"{arrival.record} does not follow {slab!r}")
            self.model.generator.reconstruct(slab, [arrival.payload])
            self.fetches.done(line.line)
            self.advance(line, token_ids[start : slab.num_tokens])
        self.counters.fetched_tokens += slab.num_tokens - before
        return slab.num_tokens - before

    def adopt_computed(self, line: AgentBlocks, token_ids: Sequence[int]) -> int:
        """Name the blocks that others have computed meanwhile, right behind what the line holds.

        Returns how many tokens may be restored instead of computed.
        """
        if line.num_tokens % BLOCK_TOKENS:
            return 0
        run = self.index.longest_run(self._lines.hashes_behind(line, token_ids))
        self._lines.extend(line, run)
        line.token_ids = list(token_ids[: line.num_tokens])
        return len(run) * BLOCK_TOKENS

    def advance(self, line: AgentBlocks, token_ids: Sequence[int]) -> None:
        """The slab holds these ids as well now; blocks that became whole can be found by others."""
        line.token_ids.extend(token_ids)
        for block in self._lines.name_whole_blocks(line):
            self.saver.offer_block(line, block)

    # -- out of the slab -------------------------------------------------------------------------

    def park(self, line: AgentBlocks) -> None:
        """The line rests; it keeps its slab until memory is short.

        One that was not wholly restored has its blocks still and goes back to them.
        """
        self.fetches.cancel(line.line)
        if line.num_to_restore:
            self.demote(line)
        line.busy = False
        self._lines.touch(line)

    def demote(self, line: AgentBlocks) -> None:
        """Turn a resting line's slab into blocks and a tail; what exists already is not copied."""
        slab, allocation = slab_of(line)
        num_in_slab = slab.num_tokens
        homeless = [block for block in line.blocks if lives_only_in(block, line)]
        spans = [(b.depth * BLOCK_TOKENS, (b.depth + 1) * BLOCK_TOKENS) for b in homeless]
        tail_start = len(line.blocks) * BLOCK_TOKENS
        if slab.num_tokens > tail_start:
            spans.append((tail_start, slab.num_tokens))
        payloads = self._empty_slab(slab, allocation, spans)
        line.slab = line.slab_allocation = None
        for block, payload in zip(homeless, payloads, strict=False):
            self.index.attach_payload(block, payload)
        for block in line.blocks[: whole_blocks(num_in_slab)]:
            self.index.leave_slab(line.line, block)
        if len(payloads) > len(homeless):
            self._lines.set_tail(line, payloads[-1])
            self.saver.offer_tail(line)
        self.counters.demotions += 1

    def truncate(self, line: AgentBlocks, num_tokens: int) -> None:
        """Forget the line's KV from `num_tokens` on; what other lines own stays with them."""
        self._cutter.truncate(line, num_tokens)

    def owners_of(self, line: AgentBlocks, depth: int) -> set[LineId]:
        """The lines that rely on the block at this depth, this one included."""
        return set(line.blocks[depth].owners) if depth < len(line.blocks) else {line.line}

    def distrust(self, line: AgentBlocks, depth: int) -> None:
        """The line's KV is wrong from this block on: all that rely on the block forget it.

        None of them may be in the batch.
        """
        for owner in self.owners_of(line, depth):
            self._cutter.distrust(self._lines[owner], depth)

    def discard_slab(self, line: AgentBlocks) -> None:
        """The slab's content cannot be trusted: keep only what is stored elsewhere as well."""
        _, allocation = slab_of(line)
        self.fetches.cancel(line.line)
        self._lines.cut_to_slab(line, whole_blocks(line.num_in_slab))
        line.slab = line.slab_allocation = None
        self.pool.release(allocation)
        del line.token_ids[len(line.blocks) * BLOCK_TOKENS :]
        for block in line.blocks:
            self.index.leave_slab(line.line, block)
        lost = next((b for b in line.blocks if b.payload is None and not b.slabs), None)
        if lost is not None:
            self._room.lose(lost)
        line.busy = False

    # -- to the store ----------------------------------------------------------------------------

    def save_some(self, max_bytes: float = math.inf) -> None:
        """Hand what waits to be saved to the store, while that takes it; at most so many bytes."""
        self.saver.save_some(max_bytes)

    def release_put_away(self) -> None:
        """Free the memory of lines that were put away and are wholly stored now."""
        for line in self.saver.take_settled():
            self.truncate(line, 0)

    # -- the whole -------------------------------------------------------------------------------

    def make_room(self, needed_bytes: int, *, ask_others: bool = True) -> None:
        """Free bytes until so many are free. Raises PoolExhausted when that cannot be.

        At last the pools of the same budget are asked for theirs.
        """
        self._room.make(needed_bytes, ask_others=ask_others)

    def put_all_away(self) -> None:
        """Save every resting line to its last token; the memory is free when the store has it."""
        for line in list(self._lines.values()):
            if not line.busy:
                self.saver.put_away(line)
        self.drop_spares()

    def drop_spares(self) -> None:
        """Memory that is kept only to be used again."""
        self.fetches.free_buffers()
        self._shelf.drop(self.pool.budget_bytes + 1)

    def give_slab(self, line: AgentBlocks, capacity_tokens: int) -> None:
        """An empty one, for a line without KV. Raises PoolExhausted."""
        slab = self._take_slab(capacity_tokens)
        line.slab, line.slab_allocation = slab.slab, slab.allocation

    @contextmanager
    def paid(self, nbytes: int) -> Iterator[None]:
        """Memory for copies that are looked at meanwhile, perhaps for many steps.

        Raises PoolExhausted.
        """
        allocation = self.pool.allocate(Kind.READING, nbytes)
        self._copies.append(allocation)
        try:
            yield
        finally:
            self._copies.remove(allocation)
            self.pool.release(allocation)

    def read(self, line: AgentBlocks, start: int, stop: int) -> Payload:
        """A copy of [start, stop), which lies within one block and begins with it."""
        return self._cutter.read(line, start, stop)

    def check(self) -> None:
        """Every block in its places, owners as the tables say, and the pool's bytes all held."""
        self._lines.check()
        self.pool.check(self._holders())

    # -- inside ----------------------------------------------------------------------------------

    def _adopt(self, line: AgentBlocks, run: Sequence[Block], token_ids: Sequence[int]) -> None:
        """Cut the line to what it shares with `token_ids`, and let its table name the run."""
        own = common_prefix(line.token_ids, token_ids)
        if len(run) * BLOCK_TOKENS > own:
            own -= own % BLOCK_TOKENS
        self.truncate(line, own)
        self._lines.extend(line, run[len(line.blocks) :])
        line.token_ids = list(token_ids[: line.num_tokens])

    def _begin_fetch(
        self,
        line: AgentBlocks,
        token_ids: Sequence[int],
        known_ids: Sequence[int],
        is_worth_fetching: Callable[[], bool],
    ) -> None:
        """Have what follows the line's KV, and lies in the store, brought into memory."""
        family, depth = self.family_of(line.namespace), whole_blocks(line.num_tokens)
        parent = self._lines.parent_of(line, depth)
        plan = self.fetches.plan(family, parent, depth, token_ids, known_ids)
        if plan.end <= line.num_tokens or not is_worth_fetching():
            return
        needed = [record for record in plan.records if record.end_position > line.num_tokens]
        if needed[0].first_position != line.num_tokens:
            self.truncate(line, depth * BLOCK_TOKENS)
            needed = plan.records
        with suppress(PoolExhausted), busy(line):
            largest = max(record.num_tokens for record in needed)
            self.make_room(self._store.record_bytes(family, largest))
        self.fetches.begin(line.line, family, needed, plan.end)

    def _take_slab(self, capacity_tokens: int) -> PaidSlab:
        spare = self._shelf.take_spare(capacity_tokens)
        if spare is not None:
            return spare
        self.make_room(self.slab_bytes(capacity_tokens))
        return self._shelf.new(capacity_tokens)

    def _free_slab(self, line: AgentBlocks) -> None:
        if line.slab is not None:
            slab, allocation = slab_of(line)
            line.slab = line.slab_allocation = None
            self._keep_spare(slab, allocation)

    def _keep_spare(self, slab: Slab, allocation: Allocation) -> None:
        self.model.generator.trim(slab, 0)
        self._shelf.keep(slab, allocation)

    def _restore_blocks(self, line: AgentBlocks, slab: Slab, max_tokens: float) -> None:
        """The next blocks: all that have payloads in one go, or one out of another line's slab."""
        depth = whole_blocks(slab.num_tokens)
        num_blocks = max(1, int(min(max_tokens, line.num_to_restore) // BLOCK_TOKENS))
        wanted = line.blocks[depth : depth + num_blocks]
        copied = list(takewhile(lambda block: block.payload is not None, wanted))
        if copied:
            self.model.generator.reconstruct(
                slab, [b.payload for b in copied if b.payload is not None]
            )
        else:
            copied = wanted[:1]
            start = depth * BLOCK_TOKENS
            source = self._lines.slab_with(copied[0])
            self.model.generator.copy_span(source, slab, start, start + BLOCK_TOKENS)
        for block in copied:
            block.slabs.add(line.line)
        self.counters.restored_blocks += len(copied)

    def _empty_slab(
        self, slab: Slab, allocation: Allocation, spans: Sequence[tuple[int, int]]
    ) -> list[Payload]:
        """The spans' payloads; the slab becomes a spare where there is room for both."""
        num_tokens = sum(stop - start for start, stop in spans)
        if num_tokens * self._token_bytes <= self.pool.free_bytes:
            payloads = [self.model.generator.extract(slab, start, stop) for start, stop in spans]
            self._keep_spare(slab, allocation)
            return payloads
        self.pool.release(allocation)
        return self.model.generator.dismantle(slab, spans)

    def _holders(self) -> dict[Allocation, tuple[int, int]]:
        holders = {**self._lines.holders(), **self._shelf.holders(), **self.fetches.holders()}
        holders |= {allocation: (1, allocation.nbytes) for allocation in self._copies}
        for allocation, (count, nbytes) in self.saves.holders().items():
            holders[allocation] = (count + holders.get(allocation, (0, 0))[0], nbytes)
        return holders
