"""Restoring: the slabs of admitted sequences are filled, beside decode a bounded part per step."""

from collections.abc import Callable
from functools import partial
from math import inf

from keepwarm.core.agent import Tier
from keepwarm.core.policies import EngineConfig, RestoreCost
from keepwarm.core.sequence import Phase, TokenSequence
from keepwarm.kv.outcomes import Advanced
from keepwarm.kv.rows import Rows
from keepwarm.kv.tiers import Tiers


class Restoring:
    """Brings sequences from their admission to an open row; learns what the disk costs."""

    def __init__(
        self,
        rows: Rows,
        tiers: Tiers,
        cost: RestoreCost,
        config: EngineConfig,
        clock: Callable[[], float],
    ) -> None:
        self._rows = rows
        self._tiers = tiers
        self._cost = cost
        self._config = config
        self._clock = clock

    def advance(self) -> None:
        """Copy the next part into each slab that is not filled yet."""
        restoring = self._rows.in_phase(Phase.RESTORING)
        beside_decode = bool(self._rows.in_phase(Phase.DECODING))
        for sequence in restoring:
            started = self._clock()
            if not self._rows.attempt([sequence], partial(self._copy_in, sequence, beside_decode)):
                return  # every row has failed
            sequence.restored_s += self._clock() - started

    def end_if_restored(self, sequence: TokenSequence) -> None:
        """Open the row when all that was kept is in the slab; a prefetch ends there."""
        blocks = sequence.blocks
        if blocks.num_to_restore or self._tiers.fetches.is_fetching(blocks.line):
            return
        self._observe(sequence)
        if sequence.is_fetched:
            self._rows.end_prefetch(sequence)
        else:
            self._rows.open(sequence)

    def _copy_in(self, sequence: TokenSequence, beside_decode: bool) -> None:
        blocks, config = sequence.blocks, self._config
        # The first touch of fresh memory is slow, so it has a bound of its own and comes first.
        fresh_bytes = config.fresh_bytes_per_step if beside_decode else inf
        if not self._tiers.promotion.prepare(blocks, fresh_bytes):
            return
        max_bytes = config.restore_bytes_per_step if beside_decode else inf
        if blocks.num_to_restore:
            self._tiers.promotion.restore(blocks, max_bytes)
            self._rows.report(Advanced(sequence))
        elif self._tiers.fetches.is_fetching(blocks.line):
            self._take_fetched(sequence, max_bytes)
        self.end_if_restored(sequence)

    def _take_fetched(self, sequence: TokenSequence, max_bytes: float) -> None:
        num_tokens = self._tiers.promotion.take_fetched(
            sequence.blocks, sequence.token_ids, max_bytes
        )
        if not num_tokens:
            return
        sequence.num_fetched += num_tokens
        sequence.note_cached(num_tokens, Tier.COLD)
        self._rows.report(Advanced(sequence))

    def _observe(self, sequence: TokenSequence) -> None:
        """Learn what fetching costs where nothing else took the time."""
        alone = len(self._rows) == 1 and not sequence.num_preemptions
        if alone and sequence.num_fetched and sequence.admitted_s is not None:
            seconds = self._clock() - sequence.admitted_s
            self._cost.observe_restore(sequence.num_fetched, seconds)
