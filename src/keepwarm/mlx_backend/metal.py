"""Memory limits on Apple's GPUs. Untested here: written on Linux."""

from collections.abc import Callable

import mlx.core as mx

# Of the recommended working set, kept by MLX for reuse between steps.
_CACHE_SHARE = 8


def raise_metal_limits() -> Callable[[], None]:
    """Let MLX wire its recommended working set and bound its buffer cache; returns the undoing."""
    if not mx.metal.is_available() or mx.default_device() != mx.gpu:
        return lambda: None
    recommended_bytes = int(mx.device_info()["max_recommended_working_set_size"])
    wired_before = mx.set_wired_limit(recommended_bytes)
    cache_before = mx.set_cache_limit(recommended_bytes // _CACHE_SHARE)

    def restore() -> None:
        mx.set_wired_limit(wired_before)
        mx.set_cache_limit(cache_before)

    return restore
