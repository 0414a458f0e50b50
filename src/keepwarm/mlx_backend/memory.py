"""The device's memory: how much there is, MLX's limits on it, and giving it back."""

import ctypes
import gc
import os
import resource
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlx.core as mx

from keepwarm.mlx_backend.device import current_device

SHARE_OF_RAM = 0.9
"""How much of the machine's memory a device without memory of its own may take."""

METAL_CACHE_SHARE = 8
"""MLX keeps one part in this many of Metal's recommended working set for reuse between steps."""

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")

_metal_users: list[tuple[int, int]] = []
"""For each loaded model, the wired and cache limits that there were before the first."""
_metal_users_lock = threading.Lock()


def device_bytes() -> int:
    """Return how many bytes weights and KV together may take on this device.

    Metal's recommended working set, a CUDA device's own free memory, or most of the RAM that the
    machine, its control group and its limits give this process.
    """
    facts: dict[str, Any] = dict(mx.device_info())
    device = current_device()
    if device.kind == "metal":
        return int(facts["max_recommended_working_set_size"])
    if device.kind == "cuda" and device.memory_bytes:
        return int(facts.get("free_memory") or device.memory_bytes)
    return int(SHARE_OF_RAM * _ram_bytes())


def release_memory() -> None:
    """Free what a released model leaves: its arrays, MLX's cache of buffers, and malloc's pages."""
    gc.collect()
    mx.clear_cache()
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def leave_thread() -> None:
    """Drop the streams, compiled functions and random state that MLX keeps for this thread.

    The last act of a thread that has computed. Otherwise MLX frees their Python objects when the
    system's thread ends, which before Python 3.13 may be later than `Thread.join`: where the
    interpreter has begun to finalise by then, the process aborts (MLX 0.32.4).
    """
    mx.clear_streams()


def _ram_bytes() -> int:
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    with suppress(OSError, ValueError):  # "max", or no such file
        sizes.append(int(_CGROUP_LIMIT.read_text()))
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        sizes.append(soft)
    return min(sizes)


# -- Metal, untested here: written on Linux --------------------------------------------------------


def raise_metal_limits() -> Callable[[], None]:
    """Let MLX wire its recommended working set, and bound its buffer cache.

    Returns what undoes it. With several models the limits are raised with the first and restored
    with the last. Does nothing where MLX does not compute on Metal.
    """
    if not mx.metal.is_available() or mx.default_device() != mx.gpu:
        return lambda: None
    with _metal_users_lock:
        _metal_users.append(_raise_limits() if not _metal_users else _metal_users[0])
    return _restore_metal_limits


def _raise_limits() -> tuple[int, int]:
    """Raise the limits, and return what they were."""
    recommended_bytes = int(mx.device_info()["max_recommended_working_set_size"])
    wired_before = mx.set_wired_limit(recommended_bytes)
    return wired_before, mx.set_cache_limit(recommended_bytes // METAL_CACHE_SHARE)


def _restore_metal_limits() -> None:
    with _metal_users_lock:
        wired_before, cache_before = _metal_users.pop()
        if not _metal_users:
            mx.set_wired_limit(wired_before)
            mx.set_cache_limit(cache_before)
