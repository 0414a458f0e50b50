"""The store's I/O thread: owns every file and the catalogue, and does one command at a time."""

import heapq
import itertools
import threading
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from enum import IntEnum
from functools import partial
from typing import NoReturn, TypeVar

from keepwarm.core.errors import KeepwarmError

T = TypeVar("T")

Units = Generator[None, None, T]
"""Long work that pauses after each unit, at most a record, and ends with a value.

Closing it undoes what it has begun.
"""

Delivery = Callable[[], object]


class Priority(IntEnum):
    """What goes first. A command handles at most one record, so the next one never waits long."""

    COMMIT = 0
    RESTORE = 1
    SAVE = 2
    HOUSEKEEPING = 3
    STOP = 4


class CommandBroke(RuntimeError):
    """A command raised in the middle of another one: a bug."""


@dataclass(order=True, slots=True)
class _Command:
    """`run` returns what `deliver` is to call, if anything; `lost` is called instead of that."""

    priority: Priority
    number: int
    run: Callable[[], Delivery | None] = field(compare=False)
    lost: Delivery = field(compare=False)


class IOThread:
    """Runs commands in the order of their priorities, equal ones in the order of their posting.

    One other thread posts, and `deliver` calls there what each command's value goes to. A command
    that raises ends the thread, for what a disk may do is a value: anything else is a bug, which
    `failure` shows, and every command that is not done is lost.
    """

    def __init__(self, name: str) -> None:
        self._queue: list[_Command] = []
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._running: list[_Command] = []
        self._done: deque[Delivery] = deque()
        self._arrived = threading.Event()
        self._is_stopping = False
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def post(self, priority: Priority, command: Callable[[], object]) -> None:
        """Run a command whose end nothing waits for."""

        def run() -> None:
            command()

        self._push(priority, run)

    def ask(
        self,
        priority: Priority,
        command: Callable[[], T],
        then: Callable[[T], object],
        *,
        lost: Delivery = lambda: None,
    ) -> None:
        """Run the command; `deliver` calls `then` with its value, or `lost` after a failure."""
        self._push(priority, lambda: partial(then, command()), lost)

    def ask_units(
        self, priority: Priority, units: Units[T], then: Callable[[T], object], *, lost: Delivery
    ) -> Callable[[], None]:
        """Run long work a unit at a time, each behind what was posted before its turn.

        Returns what cancels it: the work is closed then, and `deliver` calls `lost`.
        """
        cancelled = threading.Event()

        def run() -> Delivery | None:
            if cancelled.is_set():
                units.close()
                return lost
            try:
                next(units)
            except StopIteration as end:
                return partial(then, end.value)
            self._push(priority, run, lost)
            return None

        self._push(priority, run, lost)
        return cancelled.set

    def call(self, command: Callable[[], T]) -> T:
        """Run the command before all others and wait for it.

        A KeepwarmError or OSError of it is raised here, and the thread goes on.
        """
        ends: list[Callable[[], T]] = []

        def run() -> Callable[[], T]:
            try:
                value = command()
            except (KeepwarmError, OSError) as error:
                return partial(_raise, error)
            return lambda: value

        self.ask(Priority.COMMIT, run, ends.append)
        while not ends and self.failure is None:
            self.wait(1.0)
            self.deliver()
        if self.failure is not None:
            raise self.failure
        return ends[0]()

    def deliver(self) -> None:
        """Call, on this thread and in order, what the values go to that have come."""
        self._arrived.clear()
        has_failed = self.failure is not None  # looked at first: what was done before is delivered
        while self._done:
            self._done.popleft()()
        if has_failed:
            for command in self._take_undone():
                command.lost()

    def wait(self, timeout_s: float) -> None:
        """Wait until there is something to deliver or the thread has died, at most `timeout_s`."""
        if not self._done and self.failure is None:
            self._arrived.wait(timeout_s)

    def stop(self, timeout_s: float | None) -> bool:
        """End after all that is queued. Returns whether it has ended."""
        self.post(Priority.STOP, self._note_stop)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def run_commits(self) -> None:
        """Do the commits that have come meanwhile: for a long command, on the thread itself.

        One that raises ends the thread as elsewhere: CommandBroke is no fault of a disk that the
        long command would take for its own.
        """
        while (command := self._next_commit()) is not None:
            try:
                self._do(command)
            except Exception as error:
                raise CommandBroke(f"a commit raised {error!r}") from error

    # -- inside ----------------------------------------------------------------------------------

    def _push(
        self,
        priority: Priority,
        run: Callable[[], Delivery | None],
        lost: Delivery = lambda: None,
    ) -> None:
        with self._changed:
            heapq.heappush(self._queue, _Command(priority, next(self._numbers), run, lost))
            self._changed.notify()

    def _note_stop(self) -> None:
        self._is_stopping = True

    def _next_commit(self) -> _Command | None:
        with self._changed:
            if self._queue and self._queue[0].priority is Priority.COMMIT:
                return heapq.heappop(self._queue)
        return None

    def _do(self, command: _Command) -> None:
        self._running.append(command)
        delivery = command.run()
        self._running.pop()
        if delivery is not None:
            self._done.append(delivery)
            self._arrived.set()

    def _run(self) -> None:
        try:
            while not self._is_stopping:
                self._do(self._next())
        except BaseException as error:  # noqa: BLE001 - the top of the thread: say why it ended
            self.failure = error
            self._arrived.set()

    def _next(self) -> _Command:
        with self._changed:
            while not self._queue:
                self._changed.wait()
            return heapq.heappop(self._queue)

    def _take_undone(self) -> list[_Command]:
        with self._changed:
            undone = [*self._running, *sorted(self._queue)]
            self._running.clear()
            self._queue.clear()
        return undone


def _raise(error: Exception) -> NoReturn:
    raise error
