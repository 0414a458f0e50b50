"""Where every line's KV is, and the moves between the tiers.

Hot is a slab, warm is blocks and a tail, cold is records in the store, found by content. Every byte
of memory is an allocation of the pool; when it is short the cheapest loss comes first: spare slabs
and buffers, copies of what a slab holds as well, the slabs of resting lines (which become blocks,
equal prefixes once), and only then blocks themselves, those that are on disk first.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import takewhile

from keepwarm.core.agent import AgentBlocks
from keepwarm.core.agent_store import AgentStore, NoStore
from keepwarm.core.block import (
    Block,
    BlockHash,
    LineId,
    chain_hashes,
    child_hash,
    common_prefix,
)
from keepwarm.core.errors import InvariantBroken, PoolExhausted
from keepwarm.core.layout import BLOCK_TOKENS, capacity_for, whole_blocks
from keepwarm.core.policies import BlockVictim, choose_victims, demotion_order
from keepwarm.core.pool import Allocation, BlockPool, Kind
from keepwarm.core.ports import BatchGenerator, Payload, Slab
from keepwarm.core.prefix_index import PrefixIndex
from keepwarm.core.stored import KVFamily, Record
from keepwarm.engine.fetching import FetchQueue
from keepwarm.engine.saving import SaveQueue, Source, Unsaved, staging, tail_of
from keepwarm.engine.slabs import PaidSlab, SlabShelf


@dataclass(slots=True)
class TierCounters:
    """How often each move happened."""

    demotions: int = 0
    evicted_blocks: int = 0
    restored_blocks: int = 0
    fetched_tokens: int = 0
    slab_growths: int = 0


@dataclass(frozen=True, slots=True)
class _Plan:
    """Records to fetch, in order, and the first position that they cannot serve."""

    records: list[Record]
    end: int


class Tiers:
    """Owns the lines' slabs, blocks and tails, the index and the spare slabs. No lock: one thread.

    The generator is handed in for each model; slabs and payloads are its own values.
    """

    def __init__(
        self,
        pool: BlockPool,
        generator: BatchGenerator,
        *,
        family: KVFamily,
        store: AgentStore | None = None,
    ) -> None:
        store = store or NoStore()
        self.pool = pool
        self.index = PrefixIndex(pool)
        self.counters = TierCounters()
        self.generator = generator
        self.saves = SaveQueue(store, pool)
        self.fetches = FetchQueue(store, pool)
        self._store = store
        self._family = family
        self._families = {family.namespace: family}
        self._root = family.root
        self._token_bytes = family.layout.token_bytes
        self._lines: dict[LineId, AgentBlocks] = {}
        self._put_away: set[LineId] = set()
        self._shelf = SlabShelf(pool)
        self._next_line = 0
        self._now = store.clock()

    def __repr__(self) -> str:
        hot = sum(line.slab is not None for line in self._lines.values())
        return f"Tiers({len(self._lines)} lines, {hot} hot, {self.index!r}, {self.pool!r})"

    # -- lines -----------------------------------------------------------------------------------

    def new_line(self, agent_id: str | None = None) -> AgentBlocks:
        self._next_line += 1
        line = AgentBlocks(LineId(self._next_line), agent_id)
        self._lines[line.line] = line
        self.touch(line)
        return line

    def family_of(self, namespace: str) -> KVFamily:
        """The model's KV in that namespace, which is a line's."""
        family = self._families.get(namespace)
        if family is None:
            family = self._families[namespace] = replace(self._family, namespace=namespace)
        return family

    def root_of(self, line: AgentBlocks) -> BlockHash:
        """The parent of the line's first block."""
        return self.family_of(line.namespace).root

    def touch(self, line: AgentBlocks) -> None:
        """The line was used just now."""
        self._now += 1
        line.last_used = self._now

    def forget(self, line: AgentBlocks) -> None:
        """The line goes; blocks that others own stay with them."""
        self.truncate(line, 0)
        self._free_slab(line)
        del self._lines[line.line]

    def fork(
        self, parent: AgentBlocks, num_tokens: int, agent_id: str | None = None
    ) -> AgentBlocks:
        """A new line that holds the parent's first tokens.

        Whole blocks are shared by reference; only a tail is copied, and left out when there is no
        room for it.
        """
        num_tokens = min(num_tokens, parent.num_tokens)
        child = self.new_line(agent_id)
        child.namespace = parent.namespace
        for block in parent.blocks[: whole_blocks(num_tokens)]:
            self.index.retain(child.line, block)
            child.blocks.append(block)
        with _busy(child):
            tail = self._copy_tail(parent, num_tokens)
        if tail is not None:
            self._set_tail(child, tail)
        child.token_ids = parent.token_ids[: child.num_tokens]
        return child

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
        with self._guarded(run), _busy(line):
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
        with _unpinned(line):
            self.make_room(self.generator.slab_bytes(capacity_tokens))
        self.make_hot(
            line,
            token_ids,
            capacity_tokens,
            known_ids=known_ids,
            is_worth_fetching=is_worth_fetching,
        )

    def reserve(self, line: AgentBlocks, capacity_tokens: int) -> None:
        """Grow the slab to at least that capacity. Raises PoolExhausted, leaving the slab."""
        slab, allocation = _slab_of(line)
        if slab.capacity_tokens >= capacity_tokens:
            return
        nbytes = self.generator.slab_bytes(capacity_tokens)
        self.make_room(nbytes - allocation.nbytes)
        self.pool.resize(allocation, nbytes)
        line.slab = self.generator.grow_slab(slab, capacity_tokens)
        self.counters.slab_growths += 1

    def prepare(self, line: AgentBlocks, max_bytes: float = math.inf) -> bool:
        """Touch the next part of the slab's memory. Returns whether all of it is ready."""
        slab, _ = _slab_of(line)
        if not slab.is_ready:
            self.generator.prepare(slab, max_bytes)
        return slab.is_ready

    def restore(self, line: AgentBlocks, max_bytes: float = math.inf) -> int:
        """Copy the next blocks, and at last the tail, into the slab; at least one of them.

        Returns how many tokens were copied.
        """
        slab, _ = _slab_of(line)
        before = slab.num_tokens
        max_tokens = max_bytes / self._token_bytes
        while line.num_to_restore and slab.num_tokens - before < max_tokens:
            if whole_blocks(slab.num_tokens) < len(line.blocks):
                num_left = max_tokens - (slab.num_tokens - before)
                self._restore_blocks(line, slab, num_left)
            elif line.tail is not None:
                self.generator.reconstruct(slab, [line.tail])
                self._release_tail(line)
        return slab.num_tokens - before

    def take_fetched(
        self, line: AgentBlocks, token_ids: Sequence[int], max_bytes: float = math.inf
    ) -> int:
        """Copy what has come from the store into the slab. Returns how many tokens that were.

        `token_ids` are those that the line was made hot for.
        """
        slab, _ = _slab_of(line)
        before = slab.num_tokens
        while (slab.num_tokens - before) * self._token_bytes < max_bytes:
            arrival = self.fetches.next_arrival(line.line, self.generator)
            if arrival is None:
                break
            start = arrival.record.first_position
            if start != slab.num_tokens:
                raise InvariantBroken(f"{arrival.record} does not follow {slab!r}")
            self.generator.reconstruct(slab, [arrival.payload])
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
        hashes = self._hashes_behind(line, token_ids)
        run = self.index.longest_run(hashes)
        for block in run:
            self.index.retain(line.line, block)
            line.blocks.append(block)
        line.token_ids = list(token_ids[: line.num_tokens])
        return len(run) * BLOCK_TOKENS

    def advance(self, line: AgentBlocks, token_ids: Sequence[int]) -> None:
        """The slab holds these ids as well now; blocks that became whole can be found by others."""
        line.token_ids.extend(token_ids)
        for start in range(len(line.blocks) * BLOCK_TOKENS, line.num_tokens, BLOCK_TOKENS):
            ids = line.token_ids[start : start + BLOCK_TOKENS]
            if len(ids) == BLOCK_TOKENS:
                name = child_hash(self._last_hash(line), ids)
                block = self.index.enter_slab(line.line, len(line.blocks), name)
                line.blocks.append(block)
                self.saves.offer(self._unsaved_block(line, block))

    def _last_hash(self, line: AgentBlocks) -> BlockHash:
        """Of what the line's table ends with."""
        return line.blocks[-1].hash if line.blocks else self.root_of(line)

    def _unsaved_block(self, line: AgentBlocks, block: Block) -> Unsaved:
        depth = block.depth
        ids = tuple(line.token_ids[depth * BLOCK_TOKENS : (depth + 1) * BLOCK_TOKENS])
        parent = line.blocks[depth - 1].hash if depth else self.root_of(line)
        family = self.family_of(line.namespace)
        return Unsaved(family, block.hash, parent, depth, ids, line.agent_id)

    # -- out of the slab -------------------------------------------------------------------------

    def park(self, line: AgentBlocks) -> None:
        """The line rests; it keeps its slab until memory is short.

        One that was not wholly restored has its blocks still and goes back to them.
        """
        self.fetches.cancel(line.line)
        if line.num_to_restore:
            self.demote(line)
        line.busy = False
        self.touch(line)

    def demote(self, line: AgentBlocks) -> None:
        """Turn a resting line's slab into blocks and a tail; what exists already is not copied."""
        slab, allocation = _slab_of(line)
        num_in_slab = slab.num_tokens
        homeless = [block for block in line.blocks if _lives_only_in(block, line)]
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
            self._set_tail(line, payloads[-1])
            self.offer_tail(line)
        self.counters.demotions += 1

    def truncate(self, line: AgentBlocks, num_tokens: int) -> None:
        """Forget the line's KV from `num_tokens` on; what other lines own stays with them."""
        self.fetches.cancel(line.line)
        if num_tokens >= line.num_tokens:
            return
        if line.slab is None:
            self._truncate_warm(line, num_tokens)
        else:
            self._truncate_hot(line, num_tokens)

    def discard_slab(self, line: AgentBlocks) -> None:
        """The slab's content cannot be trusted: keep only what is stored elsewhere as well."""
        _, allocation = _slab_of(line)
        self.fetches.cancel(line.line)
        self._cut_table(line, whole_blocks(line.num_in_slab))
        line.slab = line.slab_allocation = None
        self.pool.release(allocation)
        del line.token_ids[len(line.blocks) * BLOCK_TOKENS :]
        for block in line.blocks:
            self.index.leave_slab(line.line, block)
        lost = next((b for b in line.blocks if b.payload is None and not b.slabs), None)
        if lost is not None:
            self._lose(lost)
        line.busy = False

    # -- to the store ----------------------------------------------------------------------------

    def offer_tail(self, line: AgentBlocks) -> None:
        """Have the line's unfinished block saved, as far as it goes."""
        ids = line.token_ids[len(line.blocks) * BLOCK_TOKENS :]
        if ids:
            family = self.family_of(line.namespace)
            self.saves.offer(tail_of(line, family, self._last_hash(line), ids))

    def offer_line(self, line: AgentBlocks) -> None:
        """Have all of the line's KV saved that the store lacks."""
        for block in line.blocks:
            self.saves.offer(self._unsaved_block(line, block))
        self.offer_tail(line)

    def is_unsaved(self, line: AgentBlocks) -> bool:
        """Whether something of the line waits to be saved, or is on its way."""
        names = [block.hash for block in line.blocks]
        names += [child_hash(self._last_hash(line), line.token_ids[len(names) * BLOCK_TOKENS :])]
        return any(self.saves.is_unsaved(name) for name in names)

    def offer_tails(self) -> None:
        """Of every line, as before a shutdown."""
        for line in self._lines.values():
            self.offer_tail(line)

    def save_some(self, max_bytes: float = math.inf) -> None:
        """Hand what waits to be saved to the store, while that takes it; at most so many bytes.

        What only a slab holds is copied, if the pool has the memory to spare.
        """
        num_left = max_bytes / self._token_bytes
        for unsaved in self.saves:
            num_tokens = self.saves.num_missing(unsaved)
            if not num_tokens or not self._holds(unsaved):
                self.saves.drop(unsaved)
                continue
            if num_left <= 0 or not self.saves.accepts(unsaved, num_tokens):
                return
            source = self._source_of(unsaved, num_tokens)
            if source is None and self._demote_for(unsaved):
                source = self._source_of(unsaved, num_tokens)
            if source is None:
                return
            self.saves.save(unsaved, source, self.generator)
            num_left -= num_tokens

    def put_away(self, line: AgentBlocks) -> None:
        """Save a resting line to its last token, and free its memory when the store has it all."""
        if line.slab is not None:
            self.demote(line)
        self.offer_tail(line)
        self._put_away.add(line.line)

    def release_put_away(self) -> None:
        """Free the memory of lines that were put away and are wholly stored now."""
        for line_id in list(self._put_away):
            line = self._lines.get(line_id)
            if line is None or line.busy or line.slab is not None:
                self._put_away.remove(line_id)
            elif self._is_stored(line) and not self._is_saving(line):
                self._put_away.remove(line_id)
                self.truncate(line, 0)

    def _is_stored(self, line: AgentBlocks) -> bool:
        return self.stored_tokens(line.token_ids, line.namespace) >= line.num_tokens

    def _is_saving(self, line: AgentBlocks) -> bool:
        return line.line in self._with_unsaved() or self.saves.is_busy

    def stored_tokens(self, token_ids: Sequence[int], namespace: str = "") -> int:
        """How many of the first tokens the store has."""
        family = self.family_of(namespace)
        records = self._store.plan(family, family.root, token_ids)
        return records[-1].end_position if records else 0

    # -- beside a line ---------------------------------------------------------------------------

    def new_scratch(self, line: AgentBlocks, num_tokens: int, spare_bytes: int) -> AgentBlocks:
        """A line with a slab of its own, for a cold run beside the line's KV, which stays.

        `spare_bytes` more are free then. Whoever asked for it forgets it. Raises PoolExhausted.
        """
        scratch = self.new_line(line.agent_id)
        scratch.busy = True
        try:
            with _busy(line):
                capacity = capacity_for(max(num_tokens, 1))
                self.make_room(self.generator.slab_bytes(capacity) + spare_bytes)
                slab = self._take_slab(capacity)
                scratch.slab, scratch.slab_allocation = slab.slab, slab.allocation
                self.make_room(spare_bytes)
        except BaseException:
            self.forget(scratch)
            raise
        return scratch

    def copies_of(self, line: AgentBlocks, start: int, stop: int) -> Iterator[Payload]:
        """Of a resting line's positions within one block, wherever memory has them for it."""
        if start >= stop:
            return
        if line.slab is not None:
            yield self.generator.extract(line.slab, start, stop)
        depth = whole_blocks(start)
        payload = line.blocks[depth].payload if depth < len(line.blocks) else line.tail
        if payload is not None:
            yield self.generator.cut(payload, 0, stop - start)
        elif line.slab is None:
            yield self._read(line, start, stop)

    def owners_of(self, line: AgentBlocks, depth: int) -> set[LineId]:
        """The lines that rely on the block at this depth, this one included."""
        return set(line.blocks[depth].owners) if depth < len(line.blocks) else {line.line}

    def distrust(self, line: AgentBlocks, depth: int) -> None:
        """The line's KV is wrong from this block on: all that rely on the block forget it.

        None of them may be in the batch.
        """
        for owner in self.owners_of(line, depth):
            self._forget_from(self._lines[owner], depth)

    def _forget_from(self, line: AgentBlocks, depth: int) -> None:
        """As `truncate`, but nobody is given a copy."""
        self.fetches.cancel(line.line)
        self._drop_tail(line)
        for block in line.blocks[depth:]:
            self.index.disown(line.line, block)
        del line.blocks[depth:]
        if line.slab is not None and line.slab.num_tokens > depth * BLOCK_TOKENS:
            self.generator.trim(line.slab, depth * BLOCK_TOKENS)
        del line.token_ids[line.num_tokens :]

    # -- room ------------------------------------------------------------------------------------

    def make_room(self, needed_bytes: int) -> None:
        """Free bytes until so many are free. Raises PoolExhausted when that cannot be."""
        if self.pool.free_bytes >= needed_bytes:
            return
        self.fetches.free_buffers()
        for free_some in (self._shelf.drop, self._drop_redundant, self._demote_resting):
            free_some(needed_bytes)
            if self.pool.free_bytes >= needed_bytes:
                return
        self._evict(needed_bytes)
        if self.pool.free_bytes < needed_bytes:
            raise PoolExhausted(needed_bytes=needed_bytes, free_bytes=self.pool.free_bytes)

    def check(self) -> None:
        """Every block in its places, owners as the tables say, and the pool's bytes all held."""
        self.index.check()
        for line in self._lines.values():
            line.check()
        named = {(line.line, block.hash) for line in self._lines.values() for block in line.blocks}
        owned = {(owner, block.hash) for block in self.index for owner in block.owners}
        if named != owned:
            raise InvariantBroken(f"{self!r}: tables and owners differ by {named ^ owned}")
        self.pool.check(self._holders())

    # -- inside ----------------------------------------------------------------------------------

    def _holders(self) -> dict[Allocation, tuple[int, int]]:
        holders = self.index.holders()
        for line in self._lines.values():
            if line.slab is not None and line.slab_allocation is not None:
                holders[line.slab_allocation] = (1, line.slab.nbytes)
            if line.tail is not None and line.tail_allocation is not None:
                holders[line.tail_allocation] = (1, line.tail.nbytes)
        for spare in self._shelf:
            holders[spare.allocation] = (1, spare.slab.nbytes)
        holders.update(self.fetches.holders())
        for allocation, (count, nbytes) in self.saves.holders().items():
            holders[allocation] = (count + holders.get(allocation, (0, 0))[0], nbytes)
        return holders

    @contextmanager
    def _guarded(self, run: Sequence[Block]) -> Iterator[None]:
        """Nothing evicts these blocks meanwhile."""
        guard = self.new_line()
        guard.busy = True
        for block in run:
            self.index.retain(guard.line, block)
            guard.blocks.append(block)
        try:
            yield
        finally:
            for block in guard.blocks:
                self.index.disown(guard.line, block)
            del self._lines[guard.line]

    def _adopt(self, line: AgentBlocks, run: Sequence[Block], token_ids: Sequence[int]) -> None:
        """Cut the line to what it shares with `token_ids`, and let its table name the run."""
        own = common_prefix(line.token_ids, token_ids)
        if len(run) * BLOCK_TOKENS > own:
            own -= own % BLOCK_TOKENS
        self.truncate(line, own)
        for block in run[len(line.blocks) :]:
            self.index.retain(line.line, block)
            line.blocks.append(block)
        line.token_ids = list(token_ids[: line.num_tokens])

    def _begin_fetch(
        self,
        line: AgentBlocks,
        token_ids: Sequence[int],
        known_ids: Sequence[int],
        is_worth_fetching: Callable[[], bool],
    ) -> None:
        """Have what follows the line's KV, and lies in the store, brought into memory."""
        depth = whole_blocks(line.num_tokens)
        plan = self._plan(line, depth, token_ids, known_ids)
        if plan.end <= line.num_tokens or not is_worth_fetching():
            return
        family = self.family_of(line.namespace)
        needed = [record for record in plan.records if record.end_position > line.num_tokens]
        if needed[0].first_position != line.num_tokens:
            self.truncate(line, depth * BLOCK_TOKENS)
            needed = plan.records
        with suppress(PoolExhausted), _busy(line):
            largest = max(record.num_tokens for record in needed)
            self.make_room(self._store.record_bytes(family, largest))
        self.fetches.begin(line.line, family, needed, plan.end)

    def _plan(
        self, line: AgentBlocks, depth: int, token_ids: Sequence[int], known_ids: Sequence[int]
    ) -> _Plan:
        """By what was asked for; or by what the line is known to have said, where that is longer.

        Of a record that goes on otherwise than asked for, the beginning serves.
        """
        family, start = self.family_of(line.namespace), depth * BLOCK_TOKENS
        parent = line.blocks[depth - 1].hash if depth else family.root
        wanted = self._store.plan(family, parent, token_ids[start:])
        end = wanted[-1].end_position if wanted else start
        num_common = common_prefix(token_ids, known_ids)
        if num_common > end:
            known = self._store.plan(family, parent, known_ids[start:])
            useful = [record for record in known if record.first_position < num_common]
            if useful and min(useful[-1].end_position, num_common) > end:
                return _Plan(useful, min(useful[-1].end_position, num_common))
        return _Plan(wanted, end)

    def _holds(self, unsaved: Unsaved) -> bool:
        """Whether its KV is still in memory."""
        line = unsaved.tail_of
        if line is None:
            return self.index.get(unsaved.hash) is not None
        start = unsaved.depth * BLOCK_TOKENS
        ids = line.token_ids[start : start + len(unsaved.token_ids)]
        return line.line in self._lines and tuple(ids) == unsaved.token_ids

    def _source_of(self, unsaved: Unsaved, num_tokens: int) -> Source | None:
        """The KV of its last tokens; None when there is no memory for a copy now."""
        stop = len(unsaved.token_ids)
        whole = self._whole_payload(unsaved)
        if whole is not None and num_tokens == stop == whole.payload.num_tokens:
            self.pool.retain(whole.allocation)
            return whole
        allocation = staging(self.pool, num_tokens * self._token_bytes)
        if allocation is None:
            return None
        if whole is not None:
            return Source(self.generator.cut(whole.payload, stop - num_tokens, stop), allocation)
        start = unsaved.depth * BLOCK_TOKENS
        slab = self._slab_of_unsaved(unsaved)
        payload = self.generator.extract(slab, start + stop - num_tokens, start + stop)
        return Source(payload, allocation)

    def _demote_for(self, unsaved: Unsaved) -> bool:
        """Where memory has no room for a copy, a resting line's slab becomes what is written."""
        block = self.index.get(unsaved.hash)
        lines = [unsaved.tail_of] if unsaved.tail_of is not None else []
        lines += [self._lines[line] for line in (block.slabs if block is not None else ())]
        resting = [line for line in lines if line.slab is not None and not line.busy]
        if resting:
            self.demote(resting[0])
        return bool(resting)

    def _whole_payload(self, unsaved: Unsaved) -> Source | None:
        """The payload that begins where the block begins, if it has one."""
        line = unsaved.tail_of
        block = self.index.get(unsaved.hash) if line is None else self._block_at(line, unsaved)
        if block is not None:
            if block.payload is not None and block.allocation is not None:
                return Source(block.payload, block.allocation)
        elif line is not None and line.tail is not None and line.tail_allocation is not None:
            return Source(line.tail, line.tail_allocation)
        return None

    def _block_at(self, line: AgentBlocks, unsaved: Unsaved) -> Block | None:
        """The whole block that the line's tail has become meanwhile."""
        return line.blocks[unsaved.depth] if unsaved.depth < len(line.blocks) else None

    def _slab_of_unsaved(self, unsaved: Unsaved) -> Slab:
        line = unsaved.tail_of
        block = self.index.get(unsaved.hash) if line is None else self._block_at(line, unsaved)
        if block is not None:
            return self._slab_with(block)
        if line is None:
            raise InvariantBroken(f"{unsaved} has no KV")
        return _slab_of(line)[0]

    def _take_slab(self, capacity_tokens: int) -> PaidSlab:
        spare = self._shelf.take_spare(capacity_tokens)
        if spare is not None:
            return spare
        self.make_room(self.generator.slab_bytes(capacity_tokens))
        return self._shelf.new(self.generator, capacity_tokens)

    def _free_slab(self, line: AgentBlocks) -> None:
        if line.slab is not None:
            slab, allocation = _slab_of(line)
            line.slab = line.slab_allocation = None
            self._keep_spare(slab, allocation)

    def _keep_spare(self, slab: Slab, allocation: Allocation) -> None:
        self.generator.trim(slab, 0)
        self._shelf.keep(slab, allocation)

    def _restore_blocks(self, line: AgentBlocks, slab: Slab, max_tokens: float) -> None:
        """The next blocks: all that have payloads in one go, or one out of another line's slab."""
        depth = whole_blocks(slab.num_tokens)
        num_blocks = max(1, int(min(max_tokens, line.num_to_restore) // BLOCK_TOKENS))
        wanted = line.blocks[depth : depth + num_blocks]
        copied = list(takewhile(lambda block: block.payload is not None, wanted))
        if copied:
            self.generator.reconstruct(slab, [b.payload for b in copied if b.payload is not None])
        else:
            copied = wanted[:1]
            start = depth * BLOCK_TOKENS
            source = self._slab_with(copied[0])
            self.generator.copy_span(source, slab, start, start + BLOCK_TOKENS)
        for block in copied:
            block.slabs.add(line.line)
        self.counters.restored_blocks += len(copied)

    def _slab_with(self, block: Block) -> Slab:
        return _slab_of(self._lines[next(iter(block.slabs))])[0]

    def _hashes_behind(self, line: AgentBlocks, token_ids: Sequence[int]) -> Iterator[BlockHash]:
        return chain_hashes(self._last_hash(line), token_ids[len(line.blocks) * BLOCK_TOKENS :])

    def _empty_slab(
        self, slab: Slab, allocation: Allocation, spans: Sequence[tuple[int, int]]
    ) -> list[Payload]:
        """The spans' payloads; the slab becomes a spare where there is room for both."""
        num_tokens = sum(stop - start for start, stop in spans)
        if num_tokens * self._token_bytes <= self.pool.free_bytes:
            payloads = [self.generator.extract(slab, start, stop) for start, stop in spans]
            self._keep_spare(slab, allocation)
            return payloads
        self.pool.release(allocation)
        return self.generator.dismantle(slab, spans)

    def _truncate_hot(self, line: AgentBlocks, num_tokens: int) -> None:
        slab, _ = _slab_of(line)
        self._drop_tail(line)
        while len(line.blocks) > whole_blocks(num_tokens):
            self._leave(line, line.blocks[-1])
        if num_tokens < slab.num_tokens:
            self.generator.trim(slab, num_tokens)
        # A line that is being restored has nothing of the block that was cut.
        del line.token_ids[line.num_tokens :]

    def _leave(self, line: AgentBlocks, block: Block) -> None:
        """The line drops its last block; owners who rely on this slab get a copy first."""
        if _lives_only_in(block, line) and len(block.owners) > 1:
            self._save_for_others(line, block)
        line.blocks.remove(block)
        self.index.disown(line.line, block)

    def _save_for_others(self, line: AgentBlocks, block: Block) -> None:
        start = block.depth * BLOCK_TOKENS
        try:
            with _busy(line):
                self.make_room(self._token_bytes * BLOCK_TOKENS)
        except PoolExhausted:
            self._lose(block, but=line)
            return
        if len(block.owners) > 1:
            slab, _ = _slab_of(line)
            payload = self.generator.extract(slab, start, start + BLOCK_TOKENS)
            self.index.attach_payload(block, payload)

    def _truncate_warm(self, line: AgentBlocks, num_tokens: int) -> None:
        kept_ids = line.token_ids[:num_tokens]
        tail = self._copy_tail(line, num_tokens)
        self._cut_table(line, whole_blocks(num_tokens))
        if tail is not None:
            self._set_tail(line, tail)
            line.token_ids = kept_ids

    def _lose(self, block: Block, but: AgentBlocks | None = None) -> None:
        """The block's KV is given up: every owner's table ends before it."""
        for owner in list(block.owners):
            line = self._lines[owner]
            if line is not but:
                self.fetches.cancel(owner)  # what it reads would no longer follow
                self._cut_table(line, block.depth)
        self.counters.evicted_blocks += 1

    def _cut_table(self, line: AgentBlocks, depth: int) -> None:
        """The table ends before the block at `depth`, unless the slab holds that one."""
        self._drop_tail(line)
        depth = max(depth, whole_blocks(line.num_in_slab))
        for block in line.blocks[depth:]:
            self.index.disown(line.line, block)
        del line.blocks[depth:]
        del line.token_ids[max(len(line.blocks) * BLOCK_TOKENS, line.num_in_slab) :]

    def _copy_tail(self, line: AgentBlocks, num_tokens: int) -> Payload | None:
        """A copy of what lies between the last whole block and `num_tokens`.

        None when there is nothing, or no room for it: fewer than 256 tokens will be computed again.
        """
        start = whole_blocks(num_tokens) * BLOCK_TOKENS
        if start == num_tokens:
            return None
        try:
            with _busy(line):
                self.make_room(self._token_bytes * (num_tokens - start))
        except PoolExhausted:
            return None
        return self._read(line, start, num_tokens)

    def _read(self, line: AgentBlocks, start: int, stop: int) -> Payload:
        """A copy of [start, stop), which lies within one block and begins with it."""
        if line.slab is not None:
            return self.generator.extract(line.slab, start, stop)
        if whole_blocks(start) < len(line.blocks):
            block = line.blocks[whole_blocks(start)]
            if block.payload is None:
                return self.generator.extract(self._slab_with(block), start, stop)
            return self.generator.cut(block.payload, 0, stop - start)
        if line.tail is None:
            raise InvariantBroken(f"line {line.line} has no KV at {start}")
        return self.generator.cut(line.tail, 0, stop - start)

    def _set_tail(self, line: AgentBlocks, payload: Payload) -> None:
        line.tail_allocation = self.pool.allocate(Kind.TAIL, payload.nbytes)
        line.tail = payload

    def _release_tail(self, line: AgentBlocks) -> None:
        if line.tail_allocation is not None:
            self.pool.release(line.tail_allocation)
            line.tail = line.tail_allocation = None

    def _drop_tail(self, line: AgentBlocks) -> None:
        self._release_tail(line)
        del line.token_ids[line.num_tokens :]

    def _drop_redundant(self, needed_bytes: int) -> None:
        for block in self.index:
            if self.pool.free_bytes >= needed_bytes:
                return
            if block.slabs and block.payload is not None:
                self.index.drop_payload(block)

    def _demote_resting(self, needed_bytes: int) -> None:
        for line in demotion_order(self._lines.values()):
            if self.pool.free_bytes >= needed_bytes:
                return
            self.demote(line)
            self._shelf.drop(needed_bytes)

    def _evict(self, needed_bytes: int) -> None:
        missing = needed_bytes - self.pool.free_bytes
        for victim in choose_victims(self._lines, self.index, missing, self._with_unsaved()):
            if isinstance(victim, BlockVictim):
                self._lose(victim.block)
            else:
                self._drop_tail(victim.line)

    def _with_unsaved(self) -> set[LineId]:
        """The lines of whose KV something is in memory only."""
        lines: set[LineId] = set()
        for unsaved in self.saves:
            if unsaved.tail_of is not None:
                lines.add(unsaved.tail_of.line)
            elif (block := self.index.get(unsaved.hash)) is not None:
                lines |= block.owners
        return lines


def _lives_only_in(block: Block, line: AgentBlocks) -> bool:
    """Whether the line's slab is the only place of the block's KV."""
    return block.payload is None and block.slabs == {line.line}


@contextmanager
def _busy(line: AgentBlocks) -> Iterator[None]:
    """Nothing demotes or evicts this line meanwhile."""
    was_busy, line.busy = line.busy, True
    try:
        yield
    finally:
        line.busy = was_busy


@contextmanager
def _unpinned(line: AgentBlocks) -> Iterator[None]:
    """The line may be evicted meanwhile."""
    was_pinned, line.pinned = line.pinned, False
    try:
        yield
    finally:
        line.pinned = was_pinned


def _slab_of(line: AgentBlocks) -> tuple[Slab, Allocation]:
    if line.slab is None or line.slab_allocation is None:
        raise InvariantBroken(f"line {line.line} has no slab")
    return line.slab, line.slab_allocation
