"""The rows: sequences that run, each with a slab and, to compute, a row in the generator."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial

from keepwarm.core.errors import GeneratorFailed, InvariantBroken, PoolExhausted
from keepwarm.core.policies import EngineConfig, choose_preempted, grown_capacity
from keepwarm.core.ports import RowId
from keepwarm.core.sequence import Phase, TokenSequence
from keepwarm.kv.background import Background
from keepwarm.kv.generator_source import GeneratorSource
from keepwarm.kv.line_table import slab_of
from keepwarm.kv.outcomes import Advanced, Broken, Opened, Outcome, Restored
from keepwarm.kv.sequence_queue import SequenceQueue
from keepwarm.kv.tiers import Tiers


class Rows:
    """Owns the running sequences and their outcomes. Sequences that lose their row wait again.

    A line is held from its admission until its sequence leaves the rows, whichever way.
    """

    def __init__(
        self,
        tiers: Tiers,
        model: GeneratorSource,
        queue: SequenceQueue,
        background: Background,
        config: EngineConfig,
    ) -> None:
        self.num_preemptions = 0
        self.num_failures = 0
        self._tiers = tiers
        self._model = model
        self._queue = queue
        self._background = background
        self._config = config
        self._running: list[TokenSequence] = []
        self._outcomes: list[Outcome] = []
        self._next_row = 0

    def __repr__(self) -> str:
        return f"Rows({len(self._running)} running)"

    def __len__(self) -> int:
        return len(self._running)

    def __iter__(self) -> Iterator[TokenSequence]:
        return iter(self._running)

    def in_phase(self, phase: Phase) -> list[TokenSequence]:
        """Return the running sequences of this phase, in the order of their admission."""
        return [sequence for sequence in self._running if sequence.phase is phase]

    def report(self, outcome: Outcome) -> None:
        self._outcomes.append(outcome)

    def take_outcomes(self) -> list[Outcome]:
        """Return what was reported since the last call."""
        outcomes, self._outcomes = self._outcomes, []
        return outcomes

    # -- coming and going ------------------------------------------------------------------------

    def admit(self, sequence: TokenSequence) -> None:
        """Take a sequence that waits and whose line is hot; its slab is to be filled first."""
        self._queue.remove(sequence)
        self._running.append(sequence)
        sequence.phase = Phase.RESTORING

    def open(self, sequence: TokenSequence) -> None:
        """Open a row in the generator: what was kept of the prompt is in the slab."""
        self._next_row += 1
        self._open(sequence, RowId(self._next_row))
        sequence.phase = Phase.PREFILLING if sequence.num_missing else Phase.DECODING
        self.report(Opened(sequence))

    def back_to_restoring(self, sequence: TokenSequence) -> None:
        """Close the row: blocks were found that are to be copied into the slab."""
        self._close(sequence)
        sequence.phase = Phase.RESTORING

    def end_chunk(self, sequence: TokenSequence) -> None:
        """Let the sequence decode when its prompt is computed."""
        if not sequence.num_missing:
            sequence.phase = Phase.DECODING
        self.report(Advanced(sequence))

    def end_prefetch(self, sequence: TokenSequence) -> None:
        self.leave(sequence)
        self.report(Restored(sequence))

    def leave(self, sequence: TokenSequence) -> None:
        """End the sequence, wherever it is; its line rests and keeps what was computed.

        A sequence that a failure has ended already may still have sampled its last token in the
        same step: then there is nothing to do.
        """
        if sequence in self._queue:
            self._queue.remove(sequence)
        elif sequence in self._running:
            self._rest(sequence)
        sequence.phase = Phase.FINISHED

    def preempt(self, sequence: TokenSequence) -> None:
        """Let the sequence wait again and its line rest; it goes on where it was."""
        self._rest(sequence)
        self._queue.add(sequence)
        sequence.num_preemptions += 1
        self.num_preemptions += 1

    def _rest(self, sequence: TokenSequence) -> None:
        self._close(sequence)
        self._tiers.park(sequence.blocks)  # before it is anywhere else: this may raise
        self._running.remove(sequence)

    def _open(self, sequence: TokenSequence, row: RowId) -> None:
        self._model.generator.open_row(row, slab_of(sequence.blocks))
        sequence.row = row

    def _close(self, sequence: TokenSequence) -> None:
        if sequence.row is not None:
            self._model.generator.close_row(sequence.row)
            sequence.row = None

    # -- room for the next token -----------------------------------------------------------------

    def make_room_for_next_tokens(self) -> None:
        """Grow the slabs that are full; where memory is short, rows are preempted."""
        has_grown = False
        for sequence in self.in_phase(Phase.DECODING):
            while sequence.phase is Phase.DECODING and _num_free(sequence) == 0:
                self.attempt([sequence], partial(self._grow, sequence))
                has_grown = True
        if not has_grown:
            self._grow_one_ahead()

    def _grow_one_ahead(self) -> None:
        """Rows of equal length would all grow, and copy their slabs, in the same step."""
        soon_full = [
            sequence
            for sequence in self.in_phase(Phase.DECODING)
            if _num_free(sequence) < min(self._config.max_rows, sequence.num_to_come)
        ]
        if soon_full:
            sequence = min(soon_full, key=_num_free)
            with suppress(PoolExhausted):
                self.attempt([sequence], partial(self._enlarge, sequence))

    def _grow(self, sequence: TokenSequence) -> None:
        """Enlarge the row's slab, or free memory for that and leave the rest to the next try."""
        try:
            self._enlarge(sequence)
        except PoolExhausted as error:
            if self._background.make_way():
                return
            victim = choose_preempted(self._running)
            if victim is None and self._tiers.is_being_freed:
                victim = sequence
            if victim is None:
                self.break_off(sequence, error)
            else:
                self.preempt(victim)

    def _enlarge(self, sequence: TokenSequence) -> None:
        """Move the row to a larger slab. Raises PoolExhausted, leaving the row as it was."""
        row = row_of(sequence)
        max_tokens = len(sequence.token_ids) + sequence.num_to_come
        capacity = grown_capacity(slab_of(sequence.blocks).capacity_tokens, max_tokens)
        self._close(sequence)
        try:
            self._tiers.reserve(sequence.blocks, capacity)
        except PoolExhausted:
            self._open(sequence, row)
            raise
        self._open(sequence, row)

    # -- failure ---------------------------------------------------------------------------------

    def attempt(self, involved: list[TokenSequence], call: Callable[[], None]) -> bool:
        """Call the generator. Returns whether it did not raise.

        When it raises, every row fails, and the queue is served on. The slabs of the rows in the
        call (`involved`) cannot be trusted any more; the others keep theirs.
        """
        try:
            call()
        except (PoolExhausted, InvariantBroken):
            raise
        except Exception as error:  # noqa: BLE001 - decision 14: whatever the model raises
            self._recover(involved, GeneratorFailed(error))
            return False
        return True

    def break_off(self, sequence: TokenSequence, error: Exception) -> None:
        """End the sequence with this error."""
        self.leave(sequence)
        self.report(Broken(sequence, error))

    def _recover(self, involved: list[TokenSequence], error: GeneratorFailed) -> None:
        self.num_failures += 1
        for sequence in involved:
            if sequence.blocks.slab is not None:
                self._tiers.discard_slab(sequence.blocks)
            sequence.row = None
        ended = list(dict.fromkeys([*self._running, *involved]))
        for sequence in ended:
            self._close(sequence)
        self._model.replace_failed()  # first: slabs that are half restored are emptied by it
        for sequence in ended:
            self.break_off(sequence, error)

    def check(self) -> None:
        """Raise InvariantBroken unless rows are open exactly where sequences prefill or decode."""
        for sequence in self._running:
            if sequence.phase in (Phase.WAITING, Phase.FINISHED) or not sequence.blocks.is_held:
                raise InvariantBroken(f"{sequence.request_id} runs in phase {sequence.phase}")
            has_row = sequence.phase in (Phase.PREFILLING, Phase.DECODING)
            if has_row != (sequence.row is not None):
                raise InvariantBroken(f"{sequence.request_id}: row {sequence.row} out of phase")
            if sequence.num_missing < 0:
                raise InvariantBroken(f"{sequence.request_id}: more KV than ids to feed")
            if sequence.phase is Phase.DECODING and sequence.num_missing:
                raise InvariantBroken(f"{sequence.request_id}: decodes with a gap")


def row_of(sequence: TokenSequence) -> RowId:
    """Return the open row of a sequence that must have one. Raises InvariantBroken."""
    if sequence.row is None:
        raise InvariantBroken(f"{sequence.request_id} is in phase {sequence.phase} without a row")
    return sequence.row


def _num_free(sequence: TokenSequence) -> int:
    """Return how many more tokens the slab has room for."""
    slab = sequence.blocks.slab
    return slab.capacity_tokens - slab.num_tokens if slab is not None else 0
