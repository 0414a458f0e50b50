"""Gives the memory of large bodies back to the system when they have gone."""

import asyncio
import ctypes
import sys
from collections.abc import Callable
from contextlib import suppress

LARGE_BYTES = 4 << 20
AFTER_S = 1.0
"""How many seconds after a large body memory is given back: a refused request has ended by then."""


def give_back() -> None:
    """Make glibc give back what was freed, all of which it keeps where MLX computes on the CPU.

    Without it, bodies of 32 MiB, one after the other, left holes of hundreds of MiB.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


class MemoryReturn:
    """Calls `give_back` `after_s` seconds after a large body, once for all that came meanwhile."""

    def __init__(
        self, give_back: Callable[[], None] = give_back, *, after_s: float = AFTER_S
    ) -> None:
        self._give_back = give_back
        self._after_s = after_s
        self._is_due = False

    def came(self, num_bytes: int) -> None:
        """Note that a body of this size is in memory. On the event loop."""
        if num_bytes >= LARGE_BYTES and not self._is_due:
            self._is_due = True
            asyncio.get_running_loop().call_later(self._after_s, self._start)

    def _start(self) -> None:
        """Give back on another thread: it takes milliseconds per GiB, without Python's lock."""
        self._is_due = False
        asyncio.get_running_loop().run_in_executor(None, self._give_back)
