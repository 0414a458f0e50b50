"""Writes what was reused of a prompt, and why not more, for a header and for documents."""

from dataclasses import dataclass

from keepwarm.core.agent import Tier
from keepwarm.core.events import CacheReport

HEADER = "X-Keepwarm-Cache"


def header_of(cache: CacheReport) -> str:
    """Write the report as the value of `X-Keepwarm-Cache`."""
    parts = {
        "tier": cache.tier.value,
        "cached": cache.cached_tokens,
        "prompt": cache.prompt_tokens,
        "restored_ms": round(1e3 * cache.restored_s, 1),
        "diverged_at": cache.diverged_at,
        "reason": cache.reason,
        "message": cache.message,
    }
    return "; ".join(f"{key}={value}" for key, value in parts.items() if value is not None)


@dataclass(frozen=True, slots=True)
class CacheFields:
    """What was reused of a prompt, and why it was not from its token `diverged_at` on.

    `message`: the number of the message in which this token lies.
    """

    tier: Tier
    cached_tokens: int
    prompt_tokens: int
    restored_ms: float
    diverged_at: int
    reason: str
    message: int | None

    @classmethod
    def of(cls, cache: CacheReport) -> "CacheFields":
        return cls(
            tier=cache.tier,
            cached_tokens=cache.cached_tokens,
            prompt_tokens=cache.prompt_tokens,
            restored_ms=round(1e3 * cache.restored_s, 3),
            diverged_at=cache.diverged_at,
            reason=cache.reason,
            message=cache.message,
        )
