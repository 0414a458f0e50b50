"""Long work on the I/O thread, in units of at most a record: what has come meanwhile goes first."""

from collections.abc import Callable, Generator
from typing import Generic, TypeVar

T = TypeVar("T")
Outcome = TypeVar("Outcome")

Units = Generator[None, None, T]
"""Work that pauses after each unit, and ends with a value. Closing it undoes what it has begun."""


class UnitWork(Generic[Outcome]):
    """A command that does one unit each time it runs, and has itself run `again` until it ends.

    `call_off` may be called by another thread; the work is closed then instead of its next unit,
    and ends with what `called_off` says.
    """

    def __init__(
        self,
        units: Units[Outcome],
        *,
        called_off: Callable[[], Outcome],
        again: Callable[["UnitWork[Outcome]"], None],
    ) -> None:
        self._units = units
        self._called_off = called_off
        self._again = again
        self._is_called_off = False

    def call_off(self) -> None:
        self._is_called_off = True

    def __call__(self) -> Outcome | None:
        if self._is_called_off:
            self._units.close()
            return self._called_off()
        try:
            next(self._units)
        except StopIteration as end:
            outcome: Outcome = end.value
            return outcome
        self._again(self)
        return None


def finish(units: Units[T]) -> T:
    """Do all of it at once."""
    try:
        while True:
            next(units)
    except StopIteration as end:
        result: T = end.value
        return result
