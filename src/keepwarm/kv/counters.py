"""What tiers and batch have done so far, in numbers."""

from dataclasses import dataclass


@dataclass(slots=True)
class TierCounters:
    """How often each move happened."""

    demotions: int = 0
    evicted_blocks: int = 0
    restored_blocks: int = 0
    fetched_tokens: int = 0
    slab_growths: int = 0


@dataclass(slots=True)
class BatchCounters:
    """What the batch has done so far."""

    steps: int = 0
    decoded_tokens: int = 0
    prefilled_tokens: int = 0
    preemptions: int = 0
    generator_failures: int = 0
