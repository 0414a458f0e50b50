"""Passes of the model: a token for every row that decodes, and chunks of prompts beside them."""

from collections.abc import Callable, Sequence

from keepwarm.core.ports import Draw, RowInput
from keepwarm.core.sequence import Phase, TokenSequence
from keepwarm.kv.generator_source import GeneratorSource
from keepwarm.kv.outcomes import Sampled
from keepwarm.kv.prefill import Chunk, Prefill
from keepwarm.kv.rows import Rows, row_of
from keepwarm.kv.tiers import Tiers


class Passes:
    """Makes the one call of the generator that each step has, and notes what it brought."""

    def __init__(
        self,
        rows: Rows,
        prefill: Prefill,
        tiers: Tiers,
        model: GeneratorSource,
        clock: Callable[[], float],
    ) -> None:
        self.num_decoded = 0
        """How many tokens were sampled so far."""
        self._rows = rows
        self._prefill = prefill
        self._tiers = tiers
        self._model = model
        self._clock = clock

    def make(self) -> None:
        """Sample a token for every row that is ready, and compute some prefill in the same call."""
        self._rows.make_room_for_next_tokens()
        decoding = self._rows.in_phase(Phase.DECODING)
        chunks = self._prefill.next_chunks(len(decoding))
        inputs = [*map(_next_token, decoding), *map(_ids_of, chunks)]
        if not inputs:
            return
        involved = [*decoding, *(chunk.sequence for chunk in chunks)]
        sampled: list[list[int]] = []
        started = self._clock()
        if not self._rows.attempt(
            involved, lambda: sampled.extend(self._model.generator.step(inputs))
        ):
            return
        self._prefill.observe(
            num_decoding=len(decoding),
            num_tokens=sum(len(chunk.token_ids) for chunk in chunks),
            step_s=self._clock() - started,
        )
        for sequence, tokens in zip(decoding, sampled, strict=False):
            self._take_token(sequence, tokens)
        for chunk in chunks:
            self._prefill.finish(chunk)

    def _take_token(self, sequence: TokenSequence, tokens: Sequence[int]) -> None:
        (token_id,) = tokens
        self._tiers.advance(sequence.blocks, sequence.token_ids[-1:])
        sequence.append(token_id)
        self._rows.report(Sampled(sequence, token_id))
        self.num_decoded += 1


def _next_token(sequence: TokenSequence) -> RowInput:
    """Feed the last id, and sample what follows it."""
    draw = Draw(sequence.sampling, sequence.num_reply_tokens)
    return RowInput(row_of(sequence), sequence.token_ids[-1:], (draw,))


def _ids_of(chunk: Chunk) -> RowInput:
    return RowInput(row_of(chunk.sequence), chunk.token_ids)
