"""What the tiers have done so far, in numbers."""

from dataclasses import dataclass


@dataclass(slots=True)
class TierCounters:
    """How often each move happened."""

    demotions: int = 0
    evicted_blocks: int = 0
    restored_blocks: int = 0
    fetched_tokens: int = 0
    slab_growths: int = 0
