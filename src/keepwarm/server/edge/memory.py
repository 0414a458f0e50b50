"""Memory that large bodies took goes back to the system when they have gone."""

import asyncio
import ctypes
import sys
from collections.abc import Callable
from contextlib import suppress

LARGE_BYTES = 4 << 20
AFTER_S = 1.0
"""A request that is refused has ended by then; one that is not is small in comparison."""


def give_back() -> None:
    """glibc keeps what was freed, and where MLX computes on the CPU it is told to keep all of it.

    Bodies of 32 MiB, one after the other, left holes of hundreds of MiB.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


class MemoryReturn:
    """Calls `give_back` some time after a large body, once for all that come until then."""

    def __init__(
        self, give_back: Callable[[], None] = give_back, *, after_s: float = AFTER_S
    ) -> None:
        self._give_back = give_back
        self._after_s = after_s
        self._is_due = False

    def came(self, num_bytes: int) -> None:
        """A body of this size is in memory. On the event loop."""
        if num_bytes >= LARGE_BYTES and not self._is_due:
            self._is_due = True
            asyncio.get_running_loop().call_later(self._after_s, self._start)

    def _start(self) -> None:
        """On another thread: it takes milliseconds for each GiB, without the interpreter's lock."""
        self._is_due = False
        asyncio.get_running_loop().run_in_executor(None, self._give_back)
