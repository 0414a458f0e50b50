"""The batch: sequences that wait, sequences that run, and one step of the model for all of them.

It moves token ids and KV and knows nothing of text. Restoring and prefill beside decode are
bounded in each step, so that no reply stalls while another's context is computed.
"""

from collections.abc import Callable, Collection
from functools import partial

from keepwarm.core.agent import Tier
from keepwarm.core.block import LineId
from keepwarm.core.errors import InvariantBroken, PoolExhausted
from keepwarm.core.policies import EngineConfig, RestoreCost, reserve_capacity
from keepwarm.core.sequence import Phase, TokenSequence
from keepwarm.kv.background import Background
from keepwarm.kv.counters import BatchCounters
from keepwarm.kv.generator_source import GeneratorSource
from keepwarm.kv.line_table import slab_of
from keepwarm.kv.outcomes import Outcome
from keepwarm.kv.passes import Passes
from keepwarm.kv.prefill import Prefill
from keepwarm.kv.restoring import Restoring
from keepwarm.kv.rows import Rows
from keepwarm.kv.sequence_queue import SequenceQueue
from keepwarm.kv.tiers import Tiers


class Batch:
    """Admits sequences to rows and makes the steps. No lock: one thread.

    `background` gives way where a request lacks memory or a row.
    """

    def __init__(
        self,
        tiers: Tiers,
        model: GeneratorSource,
        background: Background,
        *,
        config: EngineConfig,
        clock: Callable[[], float],
    ) -> None:
        self.is_suspended = False
        self._tiers = tiers
        self._background = background
        self._config = config
        self._clock = clock
        self._cost = cost = RestoreCost()
        self._queue = queue = SequenceQueue()
        self._rows = rows = Rows(tiers, model, queue, background, config)
        self._restoring = Restoring(rows, tiers, cost, config, clock)
        least_tokens = model.generator.least_chunk_tokens
        self._prefill = prefill = Prefill(rows, tiers, cost, config, least_tokens=least_tokens)
        self._passes = Passes(rows, prefill, tiers, model, clock)
        self._num_steps = 0

    def __repr__(self) -> str:
        return f"Batch({len(self._rows)} rows, {len(self._queue)} waiting)"

    # -- sequences -------------------------------------------------------------------------------

    def enqueue(self, sequence: TokenSequence) -> None:
        """Let the sequence wait for a row."""
        self._queue.add(sequence)

    def leave(self, sequence: TokenSequence) -> None:
        """End the sequence, wherever it is; its line rests and keeps what was computed."""
        self._rows.leave(sequence)

    def set_back(self, lines: Collection[LineId]) -> None:
        """Let the rows of these lines wait again: their KV is about to be cut."""
        for sequence in list(self._rows):
            if sequence.blocks.line in lines:
                self._rows.preempt(sequence)

    def suspend(self) -> None:
        """Let every row wait again, and admit none before `resume`."""
        for sequence in list(self._rows):
            self._rows.preempt(sequence)
        self.is_suspended = True

    def resume(self) -> None:
        """Admit sequences again, to the generator as it is now."""
        self.is_suspended = False

    # -- questions -------------------------------------------------------------------------------

    @property
    def waiting(self) -> tuple[TokenSequence, ...]:
        return tuple(self._queue)

    @property
    def running(self) -> tuple[TokenSequence, ...]:
        return tuple(self._rows)

    @property
    def num_waiting(self) -> int:
        return len(self._queue)

    @property
    def num_running(self) -> int:
        return len(self._rows)

    @property
    def counters(self) -> BatchCounters:
        """What the batch has done so far."""
        return BatchCounters(
            steps=self._num_steps,
            decoded_tokens=self._passes.num_decoded,
            prefilled_tokens=self._prefill.num_tokens,
            preemptions=self._rows.num_preemptions,
            generator_failures=self._rows.num_failures,
        )

    @property
    def spare_tokens(self) -> int:
        """How many tokens may be computed now that no request waits for: none beside a prefill."""
        return 0 if self.is_suspended else self._prefill.spare_tokens

    @property
    def will_free(self) -> bool:
        """Whether memory comes free by itself: rows end, or KV is being saved."""
        return bool(len(self._rows)) or self._tiers.saves.is_busy

    @property
    def only_waits(self) -> bool:
        """Whether nothing can happen before the store has answered."""
        if self.is_suspended:
            return True
        if any(sequence.phase is not Phase.RESTORING for sequence in self._rows):
            return False
        lines = [sequence.blocks.line for sequence in self._rows]
        if not all(self._tiers.fetches.is_waiting(line) for line in lines):
            return False
        return bool(lines) or not len(self._queue) or self._tiers.saves.is_busy

    def check(self) -> None:
        """Raise InvariantBroken unless queue, rows and lines agree."""
        if self.is_suspended and len(self._rows):
            raise InvariantBroken(f"{self!r} is suspended and has rows")
        self._rows.check()
        for sequence in self._queue:
            if sequence.phase is not Phase.WAITING or sequence.row is not None:
                raise InvariantBroken(f"{sequence.request_id} waits in phase {sequence.phase}")
            if sequence.blocks.is_held:
                raise InvariantBroken(f"{sequence.request_id} waits, and its line is held")

    # -- a step ----------------------------------------------------------------------------------

    def step(self) -> list[Outcome]:
        """Bring every sequence on by a bounded amount of work. Returns what came of it."""
        if self.is_suspended:
            return []
        self._admit()
        self._restoring.advance()
        self._passes.make()
        self._num_steps += 1
        return self._rows.take_outcomes()

    # -- admission -------------------------------------------------------------------------------

    def _admit(self) -> None:
        for sequence in self._queue.in_order():
            if len(self._rows) >= self._config.max_rows:
                if not sequence.is_prefetch and any(row.is_prefetch for row in self._rows):
                    self._background.make_way()  # and it has its row in the next step
                return
            # A failure of the generator, or work that gave way, may have ended it meanwhile.
            if sequence in self._queue and not self._place(sequence):
                return
            self._queue.note_passed(sequence)

    def _place(self, sequence: TokenSequence) -> bool:
        """Give the sequence a slab and a place; False when it must wait for memory."""
        blocks = sequence.blocks
        had_slab = blocks.slab is not None
        try:
            if not self._rows.attempt([sequence], partial(self._take_memory, sequence)):
                return True
        except PoolExhausted as error:
            if not self._memory_may_come:
                self._rows.break_off(sequence, error)
            return False
        self._rows.admit(sequence)
        if sequence.cached_tokens is None:
            sequence.cached_tokens = blocks.num_tokens
            sequence.tier = _tier_of_reuse(sequence, had_slab=had_slab)
            sequence.admitted_s = self._clock()
        if slab_of(blocks).is_ready:
            self._restoring.end_if_restored(sequence)
        return True

    @property
    def _memory_may_come(self) -> bool:
        return self.will_free or self._tiers.is_being_freed

    def _take_memory(self, sequence: TokenSequence) -> None:
        """Give the sequence's line a slab, and begin to fetch what the store has for it."""
        blocks, target = sequence.blocks, sequence.token_ids[: sequence.target_tokens]
        capacity = reserve_capacity(
            num_tokens=len(sequence.token_ids),
            reply_tokens=sequence.num_to_come,
            config=self._config,
        )
        try:
            self._tiers.make_hot(blocks, target, capacity)
        except PoolExhausted:
            if not sequence.is_prefetch and self._background.make_way():
                self._take_memory(sequence)
                return
            if self._memory_may_come:
                raise
            self._tiers.make_room_at_any_cost(blocks, capacity)
            self._tiers.make_hot(blocks, target, capacity)
        plan = self._tiers.promotion.plan_fetch(blocks, target, sequence.known_ids)
        if plan is not None and self._is_worth_fetching():
            self._tiers.promotion.fetch(blocks, plan)

    def _is_worth_fetching(self) -> bool:
        return self._config.always_restore or self._cost.is_worth_restoring()


def _tier_of_reuse(sequence: TokenSequence, *, had_slab: bool) -> Tier:
    """Return the tier that held the KV which this request did not have to compute."""
    if not sequence.blocks.num_tokens:
        return Tier.NONE
    return Tier.WARM if sequence.blocks.num_to_restore or not had_slab else Tier.HOT
