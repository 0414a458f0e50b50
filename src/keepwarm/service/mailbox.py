"""Commands from other threads to the engines' thread, in order, and their answers."""

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
        """Make the call, unless its caller has cancelled it. On the engines' thread."""
        if not self.answer.set_running_or_notify_cancel():
            return
        try:
            self.answer.set_result(self.call(fleet))
        except Exception as error:  # noqa: BLE001 - it is raised where it was asked for
            self.answer.set_exception(error)

    def refuse(self, error: Exception) -> None:
        """Fail the command without making its call."""
        if self.answer.set_running_or_notify_cancel():
            self.answer.set_exception(error)


class Mailbox:
    """A queue of commands: any thread puts them in, only the engines' takes them out."""

    def __init__(self) -> None:
        self._commands: SimpleQueue[Command] = SimpleQueue()

    def put(self, command: Command) -> None:
        """Put the command behind all others, and wake the engines' thread."""
        self._commands.put(command)

    def drain(self, *, wait_s: float) -> Iterator[Command]:
        """Take out all commands, waiting up to `wait_s` seconds for the first."""
        try:
            yield self._commands.get(timeout=wait_s) if wait_s else self._commands.get_nowait()
            while True:
                yield self._commands.get_nowait()
        except Empty:
            return
