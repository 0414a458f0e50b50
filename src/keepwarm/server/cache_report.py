"""What was reused of a prompt, and why not more, in every response."""

from keepwarm.core.events import CacheReport

HEADER = "X-Keepwarm-Cache"


def header_of(cache: CacheReport) -> str:
    """For a header, or a comment in a stream of events."""
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


def fields_of(cache: CacheReport) -> dict[str, object]:
    """For the agents API, which has a field for it."""
    return {
        "tier": cache.tier.value,
        "cached_tokens": cache.cached_tokens,
        "prompt_tokens": cache.prompt_tokens,
        "restored_ms": round(1e3 * cache.restored_s, 3),
        "diverged_at": cache.diverged_at,
        "reason": cache.reason,
        "message": cache.message,
    }
