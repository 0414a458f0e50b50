"""How often tiers and batch have done what they do, for people and metrics."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TierCounters:
    """How often KV was moved, in slabs, blocks and tokens."""

    demotions: int = 0
    evicted_blocks: int = 0
    restored_blocks: int = 0
    fetched_tokens: int = 0
    slab_growths: int = 0


@dataclass(frozen=True, slots=True)
class BatchCounters:
    """What the batch has done so far."""

    steps: int = 0
    decoded_tokens: int = 0
    prefilled_tokens: int = 0
    preemptions: int = 0
    generator_failures: int = 0
