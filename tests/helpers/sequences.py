"""Sequences as the policies see them, without an engine."""

from typing import Any

from keepwarm.core.block import LineId
from keepwarm.core.ports import GREEDY
from keepwarm.core.sequence import TokenSequence
from keepwarm.kv.line_table import LineBlocks
from keepwarm.testing.generator import FakePayload


def sequence(arrival: int, *, priority: int = 0, num_tokens: int = 2, held: int = 0) -> Any:
    """Return a sequence of `num_tokens` ids whose line holds the KV of the first `held`."""
    blocks = LineBlocks(LineId(arrival), token_ids=list(range(held)))
    if held:
        blocks.tail = FakePayload(tuple(range(held)), 8)
    return TokenSequence(
        request_id=f"req-{arrival}",
        agent_id=None,
        arrival=arrival,
        prompt_ids=range(num_tokens),
        max_tokens=8,
        sampling=GREEDY,
        priority=priority,
        blocks=blocks,
    )
