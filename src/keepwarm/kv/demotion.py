"""Demotion: a resting line's slab becomes blocks and a tail, and the slab a spare."""

import logging
from collections.abc import Sequence

from keepwarm.core.agent import AgentBlocks
from keepwarm.core.errors import InvariantBroken
from keepwarm.core.layout import BLOCK_TOKENS
from keepwarm.core.ports import Payload
from keepwarm.kv.line_table import lives_only_in, slab_of
from keepwarm.kv.loss import Loss
from keepwarm.kv.memory import Memory
from keepwarm.kv.save_queue import SaveQueue

_log = logging.getLogger(__name__)


class Demotion:
    """Moves KV out of slabs, for memory that is short and for lines that are saved."""

    def __init__(self, memory: Memory, loss: Loss, saves: SaveQueue) -> None:
        self.num_demotions = 0
        self._memory = memory
        self._loss = loss
        self._saves = saves

    def __repr__(self) -> str:
        return f"Demotion({self.num_demotions} so far)"

    def demote(self, line: AgentBlocks) -> None:
        """Turn the line's slab into blocks and a tail; what exists elsewhere is not copied.

        A slab that the device does not give back is given up: parts of it may be gone already. Its
        memory is free then as well, and the line's next turn computes what is missing.
        """
        slab = slab_of(line)
        homeless = [block for block in line.blocks if lives_only_in(block, line)]
        spans = [(b.depth * BLOCK_TOKENS, (b.depth + 1) * BLOCK_TOKENS) for b in homeless]
        tail_start = len(line.blocks) * BLOCK_TOKENS
        if slab.num_tokens > tail_start:
            spans.append((tail_start, slab.num_tokens))
        try:
            payloads = self._payloads_out_of(line, spans)
        except InvariantBroken:
            raise
        except Exception as error:  # noqa: BLE001 - whatever the device raises, as in decision 14
            _log.warning(
                "agent %s: KV of %d tokens is given up, its slab could not be read: %r",
                line.agent_id,
                line.num_in_slab,
                error,
            )
            self._loss.discard_slab(line)
            return
        for block, payload in zip(homeless, payloads, strict=False):
            self._memory.index.attach_payload(block, payload)
        if len(payloads) > len(homeless):
            self._memory.lines.set_tail(line, payloads[-1], line.token_ids)
            self._saves.offer_tail(line)
        self.num_demotions += 1

    def _payloads_out_of(
        self, line: AgentBlocks, spans: Sequence[tuple[int, int]]
    ) -> list[Payload]:
        """Copy the spans out of the slab; it becomes a spare where there is room for both."""
        slab, generator = slab_of(line), self._memory.model.generator
        num_tokens = sum(stop - start for start, stop in spans)
        if num_tokens * self._memory.token_bytes <= self._memory.pool.free_bytes:
            payloads = [generator.extract(slab, start, stop) for start, stop in spans]
            self._memory.spares.keep(self._memory.lines.take_slab(line))
            return payloads
        payloads = generator.dismantle(slab, spans)
        self._memory.pool.release(self._memory.lines.take_slab(line).allocation)
        return payloads
