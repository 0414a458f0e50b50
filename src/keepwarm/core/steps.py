"""Work in steps: what takes longer than one step of the engines' thread may, and pauses for it."""

from collections.abc import Generator
from enum import Enum, auto
from typing import TypeVar

T = TypeVar("T")


class Pause(Enum):
    """Why work pauses: it waits for the store, or has had the thread for long enough."""

    WAITING = auto()
    READY = auto()


Steps = Generator[Pause, None, T]
"""Work that pauses after each step and ends with a value. Closing it gives up."""
