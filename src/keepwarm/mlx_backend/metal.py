"""Memory limits on Apple's GPUs. Untested here: written on Linux."""

import threading
from collections.abc import Callable

import mlx.core as mx

# Of the recommended working set, kept by MLX for reuse between steps.
_CACHE_SHARE = 8

_users: list[tuple[int, int]] = []
"""One for each loaded model: the limits that there were before the first."""
_users_lock = threading.Lock()


def raise_metal_limits() -> Callable[[], None]:
    """Let MLX wire its recommended working set and bound its buffer cache; returns the undoing.

    With several models the limits are raised with the first and restored with the last.
    """
    if not mx.metal.is_available() or mx.default_device() != mx.gpu:
        return lambda: None
    with _users_lock:
        _users.append(_raise() if not _users else _users[0])
    return _leave


def _raise() -> tuple[int, int]:
    """Returns the limits that there were."""
    recommended_bytes = int(mx.device_info()["max_recommended_working_set_size"])
    wired_before = mx.set_wired_limit(recommended_bytes)
    return wired_before, mx.set_cache_limit(recommended_bytes // _CACHE_SHARE)


def _leave() -> None:
    with _users_lock:
        wired_before, cache_before = _users.pop()
        if not _users:
            mx.set_wired_limit(wired_before)
            mx.set_cache_limit(cache_before)
