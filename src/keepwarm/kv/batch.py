"""The batch: who waits, who has a row, and one step of the model for all of them.

It moves token ids and KV and knows nothing of text. A step decodes first, then restores and
prefills under a budget, so that nobody's reply stalls while somebody else's context is computed.
"""

from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from math import inf

from keepwarm.core.agent import Tier
from keepwarm.core.block import BlockHash, LineId, child_hash
from keepwarm.core.errors import GeneratorFailed, InvariantBroken, PoolExhausted
from keepwarm.core.layout import BLOCK_TOKENS
from keepwarm.core.policies import (
    EngineConfig,
    PrefillThrottle,
    RestoreCost,
    admission_order,
    choose_preempted,
    grown_capacity,
    next_chunk,
    reserve_capacity,
)
from keepwarm.core.ports import RowId, RowInput, Slab
from keepwarm.core.sequence import Phase, TokenSequence
from keepwarm.kv.counters import BatchCounters
from keepwarm.kv.generator_source import GeneratorSource
from keepwarm.kv.tiers import Tiers


@dataclass(frozen=True, slots=True)
class Sampled:
    """A decode step gave this sequence its next token."""

    sequence: TokenSequence
    token_id: int


@dataclass(frozen=True, slots=True)
class Opened:
    """The sequence has its row; all of its prompt that was kept somewhere is in its slab."""

    sequence: TokenSequence


@dataclass(frozen=True, slots=True)
class Advanced:
    """More of the sequence's prompt has its KV."""

    sequence: TokenSequence


@dataclass(frozen=True, slots=True)
class Broken:
    """The sequence cannot go on. It has left the batch."""

    sequence: TokenSequence
    error: Exception


@dataclass(frozen=True, slots=True)
class Restored:
    """A prefetch is complete: the line is hot and rests again."""

    sequence: TokenSequence


Outcome = Sampled | Opened | Advanced | Broken | Restored


class Batch:
    """Owns the queue and the rows. No lock: one thread.

    `make_way` calls off what no request waits for, and says whether there was any of it.
    """

    def __init__(
        self,
        tiers: Tiers,
        model: GeneratorSource,
        *,
        config: EngineConfig,
        clock: Callable[[], float],
        make_way: Callable[[], bool] = lambda: False,
    ) -> None:
        self.counters = BatchCounters()
        self.restore_cost = RestoreCost()
        self.waiting: list[TokenSequence] = []
        self.running: list[TokenSequence] = []
        self._tiers = tiers
        self._model = model
        self._config = config
        self._clock = clock
        self._make_way = make_way
        self._throttle = PrefillThrottle(config.max_step_stretch)
        self._outcomes: list[Outcome] = []
        self._next_row = 0
        self.is_suspended = False

    def __repr__(self) -> str:
        return f"Batch({len(self.running)} rows, {len(self.waiting)} waiting)"

    def enqueue(self, sequence: TokenSequence) -> None:
        self.waiting.append(sequence)

    def leave(self, sequence: TokenSequence) -> None:
        """The sequence ends, wherever it is; its line keeps what was computed.

        A sequence that a failure has put out already may still have sampled its last token in the
        same step.
        """
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        elif sequence in self.running:
            self._close_row(sequence)
            self.running.remove(sequence)
        sequence.phase = Phase.FINISHED

    def suspend(self) -> None:
        """Every row waits again, and none is admitted before `resume`."""
        for sequence in list(self.running):
            self._preempt(sequence)
        self.is_suspended = True

    def resume(self) -> None:
        """On the generator that the tiers have now."""
        self.is_suspended = False

    def step(self) -> list[Outcome]:
        self._outcomes = []
        if self.is_suspended:
            return self._outcomes
        self._admit()
        decode_s = self._decode()
        self._restore()
        self._prefill(decode_s)
        self.counters.steps += 1
        return self._outcomes

    @property
    def spare_tokens(self) -> int:
        """How many tokens may be computed now that no request waits for: none beside a prefill."""
        is_busy = self.is_suspended or bool(self._in_phase(Phase.PREFILLING))
        return 0 if is_busy else min(self._throttle.num_tokens, self._config.prefill_chunk_tokens)

    @property
    def will_free(self) -> bool:
        """Whether memory comes free by itself: rows end, or KV is being saved."""
        return bool(self.running) or self._tiers.saves.is_busy

    @property
    def only_waits(self) -> bool:
        """Whether nothing can happen before the store has answered."""
        if self.is_suspended:
            return True
        if any(sequence.phase is not Phase.RESTORING for sequence in self.running):
            return False
        lines = [sequence.blocks.line for sequence in self.running]
        if not all(self._tiers.fetches.is_waiting(line) for line in lines):
            return False
        return bool(lines) or not self.waiting or self._tiers.saves.is_busy

    def check(self) -> None:
        """Rows are open exactly where a sequence prefills or decodes, and targets are in reach."""
        if self.is_suspended and self.running:
            raise InvariantBroken(f"{self!r} is suspended and has rows")
        self._check_running()
        for sequence in self.waiting:
            if sequence.phase is not Phase.WAITING or sequence.row is not None:
                raise InvariantBroken(f"{sequence.request_id} waits in phase {sequence.phase}")

    def _check_running(self) -> None:
        for sequence in self.running:
            if sequence.phase in (Phase.WAITING, Phase.FINISHED) or not sequence.blocks.busy:
                raise InvariantBroken(f"{sequence.request_id} runs in phase {sequence.phase}")
            has_row = sequence.phase in (Phase.PREFILLING, Phase.DECODING)
            if has_row != (sequence.row is not None):
                raise InvariantBroken(f"{sequence.request_id}: row {sequence.row} out of phase")
            if sequence.num_missing < 0:
                raise InvariantBroken(f"{sequence.request_id}: more KV than ids to feed")
            if sequence.phase is Phase.DECODING and sequence.num_missing:
                raise InvariantBroken(f"{sequence.request_id}: decodes with a gap")

    def set_back(self, lines: Collection[LineId]) -> None:
        """The rows of these lines wait again: their KV is about to be cut."""
        for sequence in list(self.running):
            if sequence.blocks.line in lines:
                self._preempt(sequence)

    # -- admission -------------------------------------------------------------------------------

    def _admit(self) -> None:
        for sequence in admission_order(self.waiting):
            if len(self.running) >= self._config.max_rows:
                if not sequence.is_prefetch and any(s.is_prefetch for s in self.running):
                    self._make_way()  # and it has its row in the next step
                return
            if sequence in self.waiting and not self._place(sequence):
                return
            for other in self.waiting:
                other.num_passed_over += other.arrival < sequence.arrival

    def _place(self, sequence: TokenSequence) -> bool:
        """Give the sequence a slab and a place; False when it must wait for somebody's memory."""
        blocks = sequence.blocks
        had_slab = blocks.slab is not None
        try:
            if not self._attempt([sequence], partial(self._make_hot, sequence)):
                return True
        except PoolExhausted as error:
            if not self._memory_may_come():
                self._break(sequence, error)
            return False
        self.waiting.remove(sequence)
        self.running.append(sequence)
        if sequence.cached_tokens is None:
            sequence.cached_tokens = blocks.num_tokens
            sequence.tier = _tier_of_reuse(sequence, had_slab=had_slab)
            sequence.admitted_s = self._clock()
        sequence.phase = Phase.RESTORING
        if self._slab_of(sequence).is_ready:
            self._start_if_restored(sequence)
        return True

    def _memory_may_come(self) -> bool:
        """Whether somebody will leave, or the disk will have taken what is kept for it."""
        return self.will_free or self._tiers.pool.neighbours.will_free()

    def _make_hot(self, sequence: TokenSequence) -> None:
        target = sequence.token_ids[: sequence.target_tokens]
        capacity = reserve_capacity(
            num_tokens=len(sequence.token_ids),
            reply_tokens=sequence.num_to_come,
            config=self._config,
        )
        make_hot, make_hot_at_any_cost = (
            partial(
                way,
                sequence.blocks,
                target,
                capacity,
                known_ids=sequence.known_ids,
                is_worth_fetching=self._is_worth_restoring,
            )
            for way in (self._tiers.make_hot, self._tiers.make_hot_at_any_cost)
        )
        try:
            make_hot()
        except PoolExhausted:
            if not sequence.is_prefetch and self._make_way():
                self._make_hot(sequence)
            elif self._memory_may_come():
                raise
            else:
                make_hot_at_any_cost()

    def _is_worth_restoring(self) -> bool:
        return self._config.always_restore or self.restore_cost.is_worth_restoring()

    def _start_if_restored(self, sequence: TokenSequence) -> None:
        """When all that was stored is in the slab, the row opens."""
        if sequence.blocks.num_to_restore or self._tiers.fetches.is_fetching(sequence.blocks.line):
            return
        self._observe_restore(sequence)
        if sequence.is_fetched:
            self._end_prefetch(sequence)
            return
        self._next_row += 1
        self._open_row(sequence, RowId(self._next_row))
        sequence.phase = Phase.PREFILLING if sequence.num_missing else Phase.DECODING
        self._outcomes.append(Opened(sequence))

    def _end_prefetch(self, sequence: TokenSequence) -> None:
        self.leave(sequence)
        self._outcomes.append(Restored(sequence))

    def _open_row(self, sequence: TokenSequence, row: RowId) -> None:
        self._model.generator.open_row(row, self._slab_of(sequence))
        sequence.row = row

    def _slab_of(self, sequence: TokenSequence) -> Slab:
        slab = sequence.blocks.slab
        if slab is None:
            raise InvariantBroken(f"{sequence.request_id} has no slab for its row")
        return slab

    def _close_row(self, sequence: TokenSequence) -> None:
        if sequence.row is not None:
            self._model.generator.close_row(sequence.row)
            sequence.row = None

    # -- decode ----------------------------------------------------------------------------------

    def _decode(self) -> float:
        """One token for every row that is ready. Returns how long it took in seconds."""
        started = self._clock()
        self._make_room_for_next_tokens()
        rows = self._in_phase(Phase.DECODING)
        if not rows:
            return 0.0
        inputs = [_input_of(sequence) for sequence in rows]
        tokens: list[int] = []
        if self._attempt(rows, lambda: tokens.extend(self._model.generator.decode(inputs))):
            for sequence, token_id in zip(rows, tokens, strict=True):
                self._tiers.advance(sequence.blocks, sequence.token_ids[-1:])
                sequence.append(token_id)
                self._outcomes.append(Sampled(sequence, token_id))
            self.counters.decoded_tokens += len(tokens)
        return self._clock() - started

    def _make_room_for_next_tokens(self) -> None:
        before = self._tiers.counters.slab_growths
        for sequence in self._in_phase(Phase.DECODING):
            while sequence.phase is Phase.DECODING and _num_free(sequence) == 0:
                self._attempt([sequence], partial(self._grow, sequence))
        if self._tiers.counters.slab_growths == before:
            self._grow_one_ahead()

    def _grow_one_ahead(self) -> None:
        """Rows of equal length would all grow, and copy their slabs, in the same step."""
        soon_full = [
            sequence
            for sequence in self._in_phase(Phase.DECODING)
            if _num_free(sequence) < min(self._config.max_rows, sequence.num_to_come)
        ]
        if soon_full:
            sequence = min(soon_full, key=_num_free)
            with suppress(PoolExhausted):
                self._attempt([sequence], partial(self._enlarge, sequence))

    def _grow(self, sequence: TokenSequence) -> None:
        """A larger slab for the row; where memory is short, a row is preempted."""
        try:
            self._enlarge(sequence)
        except PoolExhausted as error:
            if self._make_way():
                return  # and it is tried again
            victim = choose_preempted(self.running)
            if victim is None and self._is_being_freed():
                victim = sequence
            if victim is None:
                self._break(sequence, error)
            else:
                self._preempt(victim)

    def _is_being_freed(self) -> bool:
        """Whether memory comes free though no row of these ends: the disk is taking copies."""
        return self._tiers.saves.is_busy or self._tiers.pool.neighbours.will_free()

    def _enlarge(self, sequence: TokenSequence) -> None:
        """Raises PoolExhausted, leaving the row as it was."""
        row = sequence.row
        if row is None:
            raise InvariantBroken(f"{sequence.request_id} decodes without a row")
        max_tokens = len(sequence.token_ids) + sequence.num_to_come
        capacity = grown_capacity(self._slab_of(sequence).capacity_tokens, max_tokens)
        self._close_row(sequence)
        try:
            self._tiers.reserve(sequence.blocks, capacity)
        except PoolExhausted:
            self._open_row(sequence, row)
            raise
        self._open_row(sequence, row)

    def _preempt(self, sequence: TokenSequence) -> None:
        """The row's memory goes to an older one; it waits, and goes on where it was."""
        self._close_row(sequence)
        self.running.remove(sequence)
        self._tiers.park(sequence.blocks)
        sequence.phase = Phase.WAITING
        sequence.num_preemptions += 1
        self.waiting.append(sequence)
        self.counters.preemptions += 1

    # -- restore and prefill ---------------------------------------------------------------------

    def _restore(self) -> None:
        restoring = self._in_phase(Phase.RESTORING)
        beside_decode = bool(self._in_phase(Phase.DECODING))
        for sequence in restoring:
            started = self._clock()
            if not self._attempt([sequence], partial(self._copy_in, sequence, beside_decode)):
                return
            sequence.restored_s += self._clock() - started

    def _copy_in(self, sequence: TokenSequence, beside_decode: bool) -> None:
        blocks, config = sequence.blocks, self._config
        if not self._tiers.prepare(blocks, config.fresh_bytes_per_step if beside_decode else inf):
            return
        max_bytes = config.restore_bytes_per_step if beside_decode else inf
        if blocks.num_to_restore:
            self._tiers.restore(blocks, max_bytes)
            self._outcomes.append(Advanced(sequence))
        elif self._tiers.fetches.is_fetching(blocks.line):
            self._take_fetched(sequence, max_bytes)
        self._start_if_restored(sequence)

    def _take_fetched(self, sequence: TokenSequence, max_bytes: float) -> None:
        num_tokens = self._tiers.take_fetched(sequence.blocks, sequence.token_ids, max_bytes)
        if not num_tokens:
            return
        sequence.num_fetched += num_tokens
        if not sequence.num_preemptions and sequence.cached_tokens is not None:
            sequence.cached_tokens += num_tokens
            sequence.tier = Tier.COLD
        self._outcomes.append(Advanced(sequence))

    def _observe_restore(self, sequence: TokenSequence) -> None:
        """Learn what fetching costs where nothing else took the time."""
        alone = len(self.running) == 1 and not sequence.num_preemptions
        if alone and sequence.num_fetched and sequence.admitted_s is not None:
            seconds = self._clock() - sequence.admitted_s
            self.restore_cost.observe_restore(sequence.num_fetched, seconds)

    def _prefill(self, decode_s: float) -> None:
        """Chunks in turn, one for each sequence, until the step's budget is used up."""
        beside_decode = decode_s > 0.0
        is_short = beside_decode or self._only_prefetches()
        limit = self._throttle.num_tokens if is_short else self._config.idle_prefill_tokens
        started = self._clock()
        budget = limit
        while budget > 0:
            sequence = self._next_to_prefill()
            if sequence is None:
                break
            num_tokens = self._prefill_chunk(
                sequence, min(budget, self._config.prefill_chunk_tokens)
            )
            budget -= num_tokens
            # A model call costs a decode step however few its tokens: none for a remainder.
            if beside_decode and num_tokens and budget < self._config.prefill_chunk_tokens:
                break
        num_tokens, prefill_s = limit - budget, self._clock() - started
        if beside_decode:
            self._throttle.observe(num_tokens=num_tokens, prefill_s=prefill_s, decode_s=decode_s)
        elif num_tokens >= BLOCK_TOKENS:
            self.restore_cost.observe_prefill(num_tokens, prefill_s)

    def _only_prefetches(self) -> bool:
        """Nobody waits for what is computed, but somebody may come in the middle of it."""
        return all(sequence.is_prefetch for sequence in self.running)

    def _prefill_chunk(self, sequence: TokenSequence, limit: int) -> int:
        """Compute one chunk, or find that another row has computed it. Returns tokens computed."""
        blocks = sequence.blocks
        adopted = self._tiers.adopt_computed(blocks, sequence.token_ids[: sequence.target_tokens])
        if adopted:
            self._note_adopted(sequence, adopted)
            return 0
        chunk = next_chunk(sequence, limit)
        row = sequence.row
        if row is None:
            raise InvariantBroken(f"{sequence.request_id} prefills without a row")
        if not self._attempt([sequence], lambda: self._model.generator.prefill(row, chunk)):
            return limit
        self._tiers.advance(blocks, chunk)
        self.counters.prefilled_tokens += len(chunk)
        if sequence.is_fetched:
            self._end_prefetch(sequence)
            return len(chunk)
        if not sequence.num_missing:
            sequence.phase = Phase.DECODING
        self.running.remove(sequence)
        self.running.append(sequence)
        self._outcomes.append(Advanced(sequence))
        return len(chunk)

    def _note_adopted(self, sequence: TokenSequence, num_tokens: int) -> None:
        """Others computed these blocks while this sequence ran: they are copied, not computed."""
        self._close_row(sequence)
        sequence.phase = Phase.RESTORING
        if not sequence.num_preemptions and sequence.cached_tokens is not None:
            sequence.cached_tokens += num_tokens
            sequence.tier = Tier.WARM

    def _next_to_prefill(self) -> TokenSequence | None:
        """The one that has waited longest for a chunk and would not compute another's block."""
        prefilling = self._in_phase(Phase.PREFILLING)
        begun = {
            self._next_hash(sequence)
            for sequence in prefilling
            if sequence.blocks.num_tokens % BLOCK_TOKENS
        }
        for sequence in prefilling:
            at_boundary = sequence.blocks.num_tokens % BLOCK_TOKENS == 0
            block_hash = self._next_hash(sequence)
            if not at_boundary or block_hash is None or block_hash not in begun:
                return sequence
        return None

    def _next_hash(self, sequence: TokenSequence) -> BlockHash | None:
        """The block that the sequence is computing; None when its prompt ends before the block."""
        depth = sequence.blocks.num_tokens // BLOCK_TOKENS
        ids = sequence.token_ids[depth * BLOCK_TOKENS : (depth + 1) * BLOCK_TOKENS]
        if len(ids) < BLOCK_TOKENS or (depth + 1) * BLOCK_TOKENS > sequence.target_tokens:
            return None
        blocks = sequence.blocks
        parent = blocks.blocks[depth - 1].hash if depth else self._tiers.root_of(blocks)
        return child_hash(parent, ids)

    # -- failure ---------------------------------------------------------------------------------

    def _attempt(self, involved: list[TokenSequence], call: Callable[[], None]) -> bool:
        """Call the generator. When it raises, every row fails, and the queue is served on.

        The slabs of the rows in the call cannot be trusted any more; the others keep theirs.
        """
        try:
            call()
        except (PoolExhausted, InvariantBroken):
            raise
        except Exception as error:  # noqa: BLE001 - decision 14: whatever the model raises
            self._recover(involved, GeneratorFailed(error))
            return False
        return True

    def _recover(self, involved: list[TokenSequence], error: GeneratorFailed) -> None:
        self.counters.generator_failures += 1
        for sequence in involved:
            if sequence.blocks.slab is not None:
                self._tiers.discard_slab(sequence.blocks)
            sequence.row = None
        for sequence in dict.fromkeys([*self.running, *involved]):
            self._break(sequence, error)
        self._model.replace_failed()

    def _break(self, sequence: TokenSequence, error: Exception) -> None:
        self.leave(sequence)
        self._outcomes.append(Broken(sequence, error))

    def _in_phase(self, phase: Phase) -> list[TokenSequence]:
        return [sequence for sequence in self.running if sequence.phase is phase]


def _input_of(sequence: TokenSequence) -> RowInput:
    if sequence.row is None:
        raise InvariantBroken(f"{sequence.request_id} decodes without a row")
    return RowInput(
        row=sequence.row,
        token_id=sequence.token_ids[-1],
        sampling=sequence.sampling,
        draw=sequence.num_reply_tokens,
    )


def _num_free(sequence: TokenSequence) -> int:
    """How many more tokens the slab has room for."""
    slab = sequence.blocks.slab
    return slab.capacity_tokens - slab.num_tokens if slab is not None else 0


def _tier_of_reuse(sequence: TokenSequence, *, had_slab: bool) -> Tier:
    """Where the KV came from that this request did not have to compute."""
    if not sequence.blocks.num_tokens:
        return Tier.NONE
    return Tier.WARM if sequence.blocks.num_to_restore or not had_slab else Tier.HOT
