"""Is the KV that an agent keeps the KV of its tokens? A cold run beside it, block by block."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from keepwarm.core.agent import AgentBlocks
from keepwarm.core.agent_store import AgentStore
from keepwarm.core.block import BlockHash
from keepwarm.core.errors import GeneratorFailed, InvariantBroken
from keepwarm.core.layout import BLOCK_TOKENS, capacity_for, whole_blocks
from keepwarm.core.pool import Kind
from keepwarm.core.ports import Payload, RowId, Slab
from keepwarm.core.stored import Record
from keepwarm.engine.lines import busy
from keepwarm.engine.tiers import Tiers

SCRATCH_ROW = RowId(0)
"""The batch numbers its rows from 1."""


@dataclass(frozen=True, slots=True)
class BlockCheck:
    """The largest difference of a block's KV, in memory and on disk, from that of a cold run.

    None: it was not there. inf: something in it is no number.
    """

    depth: int
    num_tokens: int
    in_memory: float | None
    on_disk: float | None

    @property
    def largest(self) -> float:
        return max(self.in_memory or 0.0, self.on_disk or 0.0)

    @property
    def is_compared(self) -> bool:
        return self.in_memory is not None or self.on_disk is not None


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What `verify` found out about an agent's main line; blocks that differ were dropped.

    `num_compared` tokens of `num_tokens` had KV somewhere. `became_shared`: the agent was imported,
    and its KV can be found by everyone now.
    """

    agent_id: str
    num_tokens: int
    num_compared: int
    bound: float
    blocks: tuple[BlockCheck, ...]
    became_shared: bool = False

    @property
    def differing(self) -> tuple[int, ...]:
        """The depths of the blocks that differ by more than the bound."""
        return tuple(block.depth for block in self.blocks if block.largest > self.bound)

    @property
    def passed(self) -> bool:
        return not self.differing

    @property
    def largest(self) -> float:
        return max((block.largest for block in self.blocks), default=0.0)


@dataclass(slots=True, eq=False)
class ColdRun:
    """A line's KV, computed anew in `scratch`, and what the comparison with the kept KV gave.

    `records` are those of the line that the store had, all of which were asked for.
    """

    scratch: AgentBlocks
    records: tuple[Record, ...]
    checks: tuple[BlockCheck, ...] = ()

    def records_at(self, depths: Sequence[int]) -> list[BlockHash]:
        return [record.hash for record in self.records if record.depth in depths]


class Verifier:
    """Runs on the engine's thread; `hear` waits for the store and passes its answers on."""

    def __init__(
        self, tiers: Tiers, store: AgentStore, *, chunk_tokens: int, hear: Callable[[], None]
    ) -> None:
        self._tiers = tiers
        self._store = store
        self._chunk_tokens = chunk_tokens
        self._hear = hear

    @contextmanager
    def run(self, line: AgentBlocks, token_ids: Sequence[int], num_held: int) -> Iterator[ColdRun]:
        """Compare memory's first `num_held` of these tokens, and what the store has of them.

        Raises PoolExhausted when there is no room for a second copy of the line, and
        GeneratorFailed. `scratch` is forgotten at the block's end unless it was taken.
        """
        family = self._tiers.family_of(line.namespace)
        records = self._store.plan(family, family.root, token_ids)
        num_tokens = max(num_held, records[-1].end_position if records else 0)
        buffer_bytes = [self._store.record_bytes(family, record.num_tokens) for record in records]
        copies_bytes = 2 * family.layout.block_bytes
        spare_bytes = copies_bytes + max(buffer_bytes, default=0)
        scratch = self._new_scratch(line, num_tokens, spare_bytes)
        run = ColdRun(scratch, tuple(records))
        try:
            with self._paid(copies_bytes), self._row(scratch):
                if records:
                    self._tiers.fetches.begin(scratch.line, family, records, num_tokens)
                ids = list(token_ids[:num_tokens])
                run.checks = tuple(self._checks(line, scratch, ids, num_held))
            yield run
        except GeneratorFailed:  # what the slab holds cannot be trusted, nor written again
            self._tiers.discard_slab(scratch)
            self._tiers.forget(scratch)
            raise
        finally:
            if scratch.busy:
                self._tiers.forget(scratch)

    def take(self, run: ColdRun) -> AgentBlocks:
        """The scratch line as a line like any other, its blocks to be found by content."""
        scratch = run.scratch
        token_ids, scratch.token_ids = scratch.token_ids, []
        self._tiers.advance(scratch, token_ids)
        self._tiers.park(scratch)
        return scratch

    # -- inside ----------------------------------------------------------------------------------

    def _checks(
        self, line: AgentBlocks, scratch: AgentBlocks, token_ids: Sequence[int], num_held: int
    ) -> Iterator[BlockCheck]:
        for start in range(0, len(token_ids), BLOCK_TOKENS):
            stop = min(start + BLOCK_TOKENS, len(token_ids))
            self._compute(scratch, token_ids[start:stop])
            computed = self._tiers.generator.extract(_slab_of(scratch), start, stop)
            # Meanwhile a line that was put away may have left memory.
            held = self._copies_of(line, start, min(stop, num_held, line.num_tokens))
            in_memory = self._largest((computed, 0, copy) for copy in held)
            depth = start // BLOCK_TOKENS
            on_disk = self._largest(self._arrivals(scratch, depth, computed))
            yield BlockCheck(depth, stop - start, in_memory, on_disk)

    def _new_scratch(self, line: AgentBlocks, num_tokens: int, spare_bytes: int) -> AgentBlocks:
        """A line with a slab of its own, for a cold run beside the line's KV, which stays.

        `spare_bytes` more are free then. Whoever asked for it forgets it. Raises PoolExhausted.
        """
        scratch = self._tiers.new_line(line.agent_id)
        scratch.busy = True
        try:
            with busy(line):
                capacity = capacity_for(max(num_tokens, 1))
                self._tiers.make_room(self._tiers.generator.slab_bytes(capacity) + spare_bytes)
                self._tiers.give_slab(scratch, capacity)
                self._tiers.make_room(spare_bytes)
        except BaseException:
            self._tiers.forget(scratch)
            raise
        return scratch

    def _copies_of(self, line: AgentBlocks, start: int, stop: int) -> Iterator[Payload]:
        """Of a resting line's positions within one block, wherever memory has them for it."""
        if start >= stop:
            return
        generator = self._tiers.generator
        if line.slab is not None:
            yield generator.extract(line.slab, start, stop)
        depth = whole_blocks(start)
        payload = line.blocks[depth].payload if depth < len(line.blocks) else line.tail
        if payload is not None:
            yield generator.cut(payload, 0, stop - start)
        elif line.slab is None:
            yield self._tiers.read(line, start, stop)

    def _compute(self, scratch: AgentBlocks, token_ids: Sequence[int]) -> None:
        for start in range(0, len(token_ids), self._chunk_tokens):
            chunk = token_ids[start : start + self._chunk_tokens]
            try:
                self._tiers.generator.prefill(SCRATCH_ROW, chunk)
            except InvariantBroken:
                raise
            except Exception as error:
                raise GeneratorFailed(error) from error
            scratch.token_ids.extend(chunk)

    def _largest(self, pairs: Iterator[tuple[Payload, int, Payload]]) -> float | None:
        """Of computed KV, from a position on, and a copy of it that was kept."""
        generator = self._tiers.generator
        differences = [
            generator.largest_difference(
                generator.cut(computed, start, start + kept.num_tokens), kept
            )
            for computed, start, kept in pairs
        ]
        return max(differences, default=None)

    def _arrivals(
        self, scratch: AgentBlocks, depth: int, computed: Payload
    ) -> Iterator[tuple[Payload, int, Payload]]:
        """The block's records as they come from the disk; a damaged one is the last."""
        fetches = self._tiers.fetches
        while fetches.next_depth(scratch.line) == depth:
            if fetches.is_waiting(scratch.line):
                self._hear()
                continue
            arrival = fetches.next_arrival(scratch.line, self._tiers.generator)
            if arrival is None:
                return
            yield computed, arrival.record.start, arrival.payload
            fetches.done(scratch.line)

    @contextmanager
    def _row(self, scratch: AgentBlocks) -> Iterator[None]:
        """The scratch slab in the batch."""
        generator = self._tiers.generator
        generator.open_row(SCRATCH_ROW, _slab_of(scratch))
        try:
            yield
        finally:
            generator.close_row(SCRATCH_ROW)

    @contextmanager
    def _paid(self, nbytes: int) -> Iterator[None]:
        allocation = self._tiers.pool.allocate(Kind.READING, nbytes)
        try:
            yield
        finally:
            self._tiers.pool.release(allocation)


def _slab_of(scratch: AgentBlocks) -> Slab:
    if scratch.slab is None:
        raise InvariantBroken(f"line {scratch.line} has no slab for its cold run")
    return scratch.slab
