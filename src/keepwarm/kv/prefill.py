"""Prefill: chunks of prompts in turn, beside decode under a budget that is learnt."""

from collections.abc import Callable

from keepwarm.core.agent import Tier
from keepwarm.core.block import BlockHash, child_hash
from keepwarm.core.layout import BLOCK_TOKENS, whole_blocks
from keepwarm.core.policies import EngineConfig, PrefillThrottle, RestoreCost, next_chunk
from keepwarm.core.sequence import Phase, TokenSequence
from keepwarm.kv.generator_source import GeneratorSource
from keepwarm.kv.rows import Rows, row_of
from keepwarm.kv.tiers import Tiers


class Prefill:
    """Computes prompts; owns how many tokens a step may compute beside decode."""

    def __init__(
        self,
        rows: Rows,
        tiers: Tiers,
        model: GeneratorSource,
        cost: RestoreCost,
        config: EngineConfig,
        clock: Callable[[], float],
    ) -> None:
        self.num_tokens = 0
        """How many tokens were prefilled so far."""
        self._rows = rows
        self._tiers = tiers
        self._model = model
        self._cost = cost
        self._config = config
        self._clock = clock
        self._throttle = PrefillThrottle(config.max_step_stretch)

    @property
    def spare_tokens(self) -> int:
        """How many tokens other work may compute in this step: none beside a prefill."""
        if self._rows.in_phase(Phase.PREFILLING):
            return 0
        return min(self._throttle.num_tokens, self._config.prefill_chunk_tokens)

    def advance(self, decode_s: float) -> None:
        """Compute chunks, one for each sequence in turn, until the step's budget is used up.

        `decode_s` is how long the step's decode took; 0 where nothing decodes.
        """
        beside_decode = decode_s > 0.0
        limit = self._limit(beside_decode)
        chunk_tokens = self._config.prefill_chunk_tokens
        started = self._clock()
        budget = limit
        while budget > 0:
            sequence = self._next()
            if sequence is None:
                break
            num_tokens = self._compute_chunk(sequence, min(budget, chunk_tokens))
            budget -= num_tokens
            # A model call costs a decode step however few its tokens: none for a remainder.
            if beside_decode and num_tokens and budget < chunk_tokens:
                break
        num_tokens, prefill_s = limit - budget, self._clock() - started
        if beside_decode:
            self._throttle.observe(num_tokens=num_tokens, prefill_s=prefill_s, decode_s=decode_s)
        elif num_tokens >= BLOCK_TOKENS:
            self._cost.observe_prefill(num_tokens, prefill_s)

    def _limit(self, beside_decode: bool) -> int:
        """Return how many tokens this step may compute.

        Where only prefetches run, a request that comes in the middle of the step waits for its end.
        """
        if beside_decode or all(sequence.is_prefetch for sequence in self._rows):
            return self._throttle.num_tokens
        return self._config.idle_prefill_tokens

    def _compute_chunk(self, sequence: TokenSequence, limit: int) -> int:
        """Compute one chunk, or find that another row has computed it. Returns tokens computed."""
        blocks = sequence.blocks
        adopted = self._tiers.adopt_computed(blocks, sequence.token_ids[: sequence.target_tokens])
        if adopted:
            self._rows.back_to_restoring(sequence)
            sequence.note_cached(adopted, Tier.WARM)
            return 0
        chunk, row = next_chunk(sequence, limit), row_of(sequence)
        if not self._rows.attempt([sequence], lambda: self._model.generator.prefill(row, chunk)):
            return limit
        self._tiers.advance(blocks, chunk)
        self.num_tokens += len(chunk)
        if sequence.is_fetched:
            self._rows.end_prefetch(sequence)
        else:
            self._rows.end_chunk(sequence)
        return len(chunk)

    def _next(self) -> TokenSequence | None:
        """Return the sequence that has waited longest and would not compute another's block."""
        prefilling = self._rows.in_phase(Phase.PREFILLING)
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
        """Return the block that the sequence is computing; None when its prompt ends before the
        block.
        """
        blocks = sequence.blocks
        depth = whole_blocks(blocks.num_tokens)
        end = (depth + 1) * BLOCK_TOKENS
        if end > sequence.target_tokens:
            return None
        parent = blocks.blocks[depth - 1].hash if depth else self._tiers.root_of(blocks)
        return child_hash(parent, sequence.token_ids[end - BLOCK_TOKENS : end])
