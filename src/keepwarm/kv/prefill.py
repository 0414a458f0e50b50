"""Prefill: which chunks of which prompts a step computes, beside decode under a learnt budget."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from keepwarm.core.agent import Tier
from keepwarm.core.block import BlockHash, child_hash
from keepwarm.core.layout import BLOCK_TOKENS, whole_blocks
from keepwarm.core.policies import EngineConfig, RestoreCost
from keepwarm.core.prefill_policies import (
    BACKGROUND_TOKENS,
    PrefillThrottle,
    next_chunk,
    prefill_order,
)
from keepwarm.core.sequence import Phase, TokenSequence
from keepwarm.kv.rows import Rows
from keepwarm.kv.tiers import Tiers


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """The next ids of a prompt, which one step computes."""

    sequence: TokenSequence
    token_ids: Sequence[int]


class Prefill:
    """Owns whose prompt is computed next, and how many tokens a step may compute beside decode."""

    def __init__(
        self,
        rows: Rows,
        tiers: Tiers,
        cost: RestoreCost,
        config: EngineConfig,
        *,
        least_tokens: int,
    ) -> None:
        self.num_tokens = 0
        """How many tokens were prefilled so far."""
        self._rows = rows
        self._tiers = tiers
        self._cost = cost
        self._config = config
        self._least_tokens = least_tokens
        self._throttle = PrefillThrottle(config.max_step_stretch, least_tokens)

    @property
    def spare_tokens(self) -> int:
        """How many tokens other work may compute in this step: none beside a prefill."""
        if self._rows.in_phase(Phase.PREFILLING):
            return 0
        num_rows = len(self._rows.in_phase(Phase.DECODING))
        limit = self._throttle.spare_tokens(num_rows) if num_rows else BACKGROUND_TOKENS
        return min(limit, self._config.prefill_chunk_tokens)

    def next_chunks(self, num_decoding: int) -> list[Chunk]:
        """Choose the chunks that the next step computes beside `num_decoding` rows that decode.

        A sequence whose next blocks another row has computed goes back to copy them instead.
        """
        chunks: list[Chunk] = []
        budget = self._limit(num_decoding)
        for sequence in self._workers() if budget else ():
            if self._adopt(sequence):
                continue
            limit = min(budget, self._config.prefill_chunk_tokens)
            chunks.append(Chunk(sequence, next_chunk(sequence, limit)))
            budget -= len(chunks[-1].token_ids)
            if budget < self._least_tokens:
                break
        return chunks

    def finish(self, chunk: Chunk) -> None:
        """Note that the chunk was computed; its sequence decodes next if its prompt is complete."""
        sequence, num_tokens = chunk.sequence, len(chunk.token_ids)
        self._tiers.advance(sequence.blocks, chunk.token_ids)
        self.num_tokens += num_tokens
        for other in self._rows.in_phase(Phase.PREFILLING):
            other.num_overtaken += num_tokens if other.arrival < sequence.arrival else 0
        if sequence.is_fetched:
            self._rows.end_prefetch(sequence)
        else:
            self._rows.end_chunk(sequence)

    def observe(self, *, num_decoding: int, num_tokens: int, step_s: float) -> None:
        """Learn from how long a step took in which these rows decoded and tokens were prefilled."""
        if num_decoding:
            self._throttle.observe(num_rows=num_decoding, num_tokens=num_tokens, step_s=step_s)
            return
        self._throttle.observe_alone(num_tokens=num_tokens, step_s=step_s)
        if num_tokens >= BLOCK_TOKENS:
            self._cost.observe_prefill(num_tokens, step_s)

    def _limit(self, num_decoding: int) -> int:
        """Return how many tokens the next step may compute.

        Where only prefetches run, a request that comes in the middle of the step waits for its end.
        """
        if num_decoding:
            return self._throttle.num_tokens(num_decoding)
        if all(sequence.is_prefetch for sequence in self._rows):
            return BACKGROUND_TOKENS
        return self._config.idle_prefill_tokens

    def _adopt(self, sequence: TokenSequence) -> bool:
        """Take blocks that another row has computed. Returns whether there were any."""
        target = sequence.token_ids[: sequence.target_tokens]
        adopted = self._tiers.adopt_computed(sequence.blocks, target)
        if adopted:
            self._rows.back_to_restoring(sequence)
            sequence.note_cached(adopted, Tier.WARM)
        return bool(adopted)

    def _workers(self) -> Iterator[TokenSequence]:
        """Yield the sequences in their order, each once.

        A block that another row has begun is waited for and copied: that row comes in the place of
        the one that waits for it.
        """
        prefilling = self._rows.in_phase(Phase.PREFILLING)
        begun = {
            self._next_hash(sequence): sequence
            for sequence in prefilling
            if sequence.blocks.num_tokens % BLOCK_TOKENS
        }
        yielded: set[int] = set()
        for sequence in prefill_order(prefilling):
            block_hash = self._next_hash(sequence)
            is_at_boundary = sequence.blocks.num_tokens % BLOCK_TOKENS == 0
            worker = sequence
            if is_at_boundary and block_hash is not None:
                worker = begun.setdefault(block_hash, sequence)
            if worker.arrival not in yielded:
                yielded.add(worker.arrival)
                yield worker

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
