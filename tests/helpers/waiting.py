"""Waiting for a condition: a test waits for what it needs, never for a time."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

PATIENCE_S = 120.0
"""How many seconds a test waits for what takes one on an idle machine, before it fails."""


def _pause() -> None:
    time.sleep(0.002)


def wait_until(
    condition: Callable[[], T],
    pause: Callable[[], object] = _pause,
    *,
    explain: Callable[[], str] = str,
) -> T:
    """Call `pause` until `condition` holds; return its value.

    Raises AssertionError with what `explain` says after PATIENCE_S seconds.
    """
    until = time.monotonic() + PATIENCE_S
    while not (value := condition()):
        assert time.monotonic() < until, explain()
        pause()
    return value
