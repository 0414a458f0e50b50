"""A cold run beside an agent's line: is the KV that it keeps the KV of its tokens?"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from keepwarm.core.agent import AgentBlocks
from keepwarm.core.agent_store import RecordStore
from keepwarm.core.block import BlockHash
from keepwarm.core.errors import GeneratorFailed, InvariantBroken
from keepwarm.core.layout import BLOCK_TOKENS, capacity_for, whole_blocks
from keepwarm.core.ports import Payload, RowId, RowInput
from keepwarm.core.steps import Pause, Steps
from keepwarm.core.stored import Record
from keepwarm.kv.generator_source import GeneratorSource
from keepwarm.kv.line_table import slab_of
from keepwarm.kv.tiers import Tiers

SCRATCH_ROW = RowId(0)
"""The row of the cold run; the batch numbers its own rows from 1."""


@dataclass(frozen=True, slots=True)
class BlockCheck:
    """The largest difference of a block's KV, in memory and on disk, from that of a cold run.

    None: there was none. inf: a value of it is no number.
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

    `num_compared` tokens of `num_tokens` had KV in memory or on disk. `became_shared`: the agent
    was imported, and other agents can find its KV now; `is_durable`: the disk has that as well.
    """

    agent_id: str
    num_tokens: int
    num_compared: int
    bound: float
    blocks: tuple[BlockCheck, ...]
    became_shared: bool = False
    is_durable: bool = True

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
    """A line's KV, computed anew in `scratch`, and how the kept KV differs, so far.

    `records` are those of the line that the store had. Memory had `num_held` of the tokens.
    """

    scratch: AgentBlocks
    records: tuple[Record, ...]
    token_ids: tuple[int, ...]
    num_held: int
    checks: list[BlockCheck] = field(default_factory=list)

    def records_at(self, depths: Sequence[int]) -> list[BlockHash]:
        return [record.hash for record in self.records if record.depth in depths]


UnitTokens = Callable[[], int]


class Verifier:
    """Computes cold runs and compares them with what memory and disk keep."""

    def __init__(self, tiers: Tiers, store: RecordStore, model: GeneratorSource) -> None:
        self._tiers = tiers
        self._model = model
        self._store = store

    @contextmanager
    def cold_run(
        self, line: AgentBlocks, token_ids: Sequence[int], num_held: int
    ) -> Iterator[ColdRun]:
        """Prepare a cold run over the tokens that are kept: `num_held` in memory, or more on disk.

        Raises PoolExhausted when there is no room for a second copy of the line. `scratch` is
        forgotten when the `with` block ends, unless it was taken.
        """
        family = self._tiers.family_of(line.namespace)
        records = self._store.plan(family, family.root, token_ids)
        num_tokens = max(num_held, records[-1].end_position if records else 0)
        buffer_bytes = [self._store.record_bytes(family, record.num_tokens) for record in records]
        copies_bytes = 2 * family.layout.block_bytes
        spare_bytes = copies_bytes + max(buffer_bytes, default=0)
        capacity_tokens = capacity_for(max(num_tokens, 1))
        scratch = self._tiers.new_scratch(line, capacity_tokens, spare_bytes)
        run = ColdRun(scratch, tuple(records), tuple(token_ids[:num_tokens]), num_held)
        try:
            with self._tiers.copies.paid(copies_bytes):
                yield run
        except GeneratorFailed:  # what the slab holds cannot be trusted, nor written again
            self._tiers.discard_slab(scratch)
            self._tiers.forget(scratch)
            raise
        finally:
            if scratch.is_held:
                self._tiers.forget(scratch)

    def compare(self, run: ColdRun, line: AgentBlocks, unit_tokens: UnitTokens) -> Steps[None]:
        """Compute block after block, and note how the kept KV differs from it.

        Pauses after each unit; `unit_tokens` returns how many tokens the next one may compute.
        Raises GeneratorFailed.
        """
        scratch, num_tokens = run.scratch, len(run.token_ids)
        with self._row(scratch):
            if run.records:
                family = self._tiers.family_of(line.namespace)
                self._tiers.fetches.begin(scratch.line, family, run.records, num_tokens)
            for start in range(0, num_tokens, BLOCK_TOKENS):
                stop = min(start + BLOCK_TOKENS, num_tokens)
                yield from self._compute(scratch, run.token_ids[start:stop], unit_tokens)
                yield from self._compare_block(run, line, start, stop)

    def take(self, run: ColdRun) -> AgentBlocks:
        """Turn the scratch line into a line like any other, whose blocks are found by content."""
        scratch = run.scratch
        self._tiers.advance(scratch, ())
        self._tiers.park(scratch)
        return scratch

    # -- inside ----------------------------------------------------------------------------------

    def _compare_block(self, run: ColdRun, line: AgentBlocks, start: int, stop: int) -> Steps[None]:
        scratch, depth = run.scratch, start // BLOCK_TOKENS
        computed = self._model.generator.extract(slab_of(scratch), start, stop)
        # Between two units a line that was put away may have left memory.
        held = self._copies_of(line, start, min(stop, run.num_held, line.num_tokens))
        in_memory = self._largest((computed, 0, copy) for copy in held)
        check = BlockCheck(depth, stop - start, in_memory, None)
        run.checks.append(check)
        fetches = self._tiers.fetches
        while fetches.next_depth(scratch.line) == depth:
            if fetches.is_waiting(scratch.line):
                yield Pause.WAITING
                continue
            arrived = self._arrived(scratch, computed)
            if arrived is None:
                return
            check = replace(check, on_disk=max(arrived, check.on_disk or 0.0))
            run.checks[-1] = check

    def _copies_of(self, line: AgentBlocks, start: int, stop: int) -> Iterator[Payload]:
        """Yield a resting line's positions within one block, once for each place that has them."""
        if start >= stop:
            return
        generator = self._model.generator
        if line.slab is not None:
            yield generator.extract(line.slab, start, stop)
        depth = whole_blocks(start)
        payload = line.blocks[depth].payload if depth < len(line.blocks) else line.tail
        if payload is not None:
            yield generator.cut(payload, 0, stop - start)
        elif line.slab is None:
            yield self._tiers.copies.read(line, start, stop)

    def _compute(
        self, scratch: AgentBlocks, token_ids: Sequence[int], unit_tokens: UnitTokens
    ) -> Steps[None]:
        start = 0
        while start < len(token_ids):
            chunk = list(token_ids[start : start + max(unit_tokens(), 1)])
            try:
                self._model.generator.step([RowInput(SCRATCH_ROW, chunk)])
            except InvariantBroken:
                raise
            except Exception as error:
                raise GeneratorFailed(error) from error
            self._tiers.note_computed(scratch, chunk)
            start += len(chunk)
            yield Pause.READY

    def _largest(self, pairs: Iterable[tuple[Payload, int, Payload]]) -> float | None:
        """Return the largest difference; a pair is computed KV, a start in it, and KV that was
        kept.
        """
        generator = self._model.generator
        differences = [
            generator.largest_difference(
                generator.cut(computed, start, start + kept.num_tokens), kept
            )
            for computed, start, kept in pairs
        ]
        return max(differences, default=None)

    def _arrived(self, scratch: AgentBlocks, computed: Payload) -> float | None:
        """Return how the block's next record from the disk differs; None for a damaged one, the
        last.
        """
        fetches = self._tiers.fetches
        arrival = fetches.next_arrival(scratch.line)
        if arrival is None:
            return None
        difference = self._largest([(computed, arrival.record.start, arrival.payload)])
        fetches.done(scratch.line)
        return difference

    @contextmanager
    def _row(self, scratch: AgentBlocks) -> Iterator[None]:
        """Open a row for the scratch slab, and close it in the generator that opened it."""
        generator = self._model.generator
        generator.open_row(SCRATCH_ROW, slab_of(scratch))
        try:
            yield
        finally:
            generator.close_row(SCRATCH_ROW)
