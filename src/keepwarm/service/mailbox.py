"""What other threads ask of the engine's thread, in order, and what it answers."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from keepwarm.fleet.fleet import Fleet

T = TypeVar("T")

Call = Callable[[Fleet], T]


@dataclass(frozen=True, slots=True)
class Command:
    """A call and the future of its result."""

    call: Call[Any]
    answer: "Future[Any]" = field(default_factory=Future)

    def run(self, fleet: Fleet) -> None:
        if not self.answer.set_running_or_notify_cancel():
            return
        try:
            self.answer.set_result(self.call(fleet))
        except Exception as error:  # noqa: BLE001 - it is raised where it was asked for
            self.answer.set_exception(error)

    def refuse(self, error: Exception) -> None:
        if self.answer.set_running_or_notify_cancel():
            self.answer.set_exception(error)


class Mailbox:
    """Any thread may put something in; only the engine's takes it out."""

    def __init__(self) -> None:
        self._commands: SimpleQueue[Command] = SimpleQueue()

    def put(self, command: Command) -> None:
        self._commands.put(command)

    def drain(self, *, wait_s: float) -> Iterator[Command]:
        """All that is there; waits so long for the first one."""
        try:
            yield self._commands.get(timeout=wait_s) if wait_s else self._commands.get_nowait()
            while True:
                yield self._commands.get_nowait()
        except Empty:
            return
