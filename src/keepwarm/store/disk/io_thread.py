"""The store's I/O thread: owns every file and the catalogue, and does one command at a time."""

import heapq
import itertools
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Generic, TypeVar

Outcome = TypeVar("Outcome")


class Priority(IntEnum):
    """What goes first. A command handles at most one record, so nobody waits long."""

    COMMIT = 0
    RESTORE = 1
    SAVE = 2
    HOUSEKEEPING = 3
    STOP = 4


@dataclass(order=True, slots=True)
class _Queued(Generic[Outcome]):
    priority: Priority
    number: int
    command: Callable[[], Outcome | None] = field(compare=False)


class IOThread(Generic[Outcome]):
    """Runs commands in the order of their priorities; of equal ones, first come first.

    `post`, `take` and `wait` are for one other thread. A command that raises ends the thread:
    what a disk may do is its commands' affair, and anything else is a bug that `failure` shows.
    """

    def __init__(self, name: str) -> None:
        self._queue: list[_Queued[Outcome]] = []
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._outcomes: deque[Outcome] = deque()
        self._arrived = threading.Event()
        self._stopping = False
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def post(self, priority: Priority, command: Callable[[], Outcome | None]) -> None:
        with self._changed:
            heapq.heappush(self._queue, _Queued(priority, next(self._numbers), command))
            self._changed.notify()

    def take(self) -> list[Outcome]:
        """The outcomes that have come, in order."""
        self._arrived.clear()
        taken: list[Outcome] = []
        while self._outcomes:
            taken.append(self._outcomes.popleft())
        return taken

    def wait(self, timeout_s: float) -> None:
        """Until an outcome is there or the thread has died, at most so long."""
        if not self._outcomes and self.failure is None:
            self._arrived.wait(timeout_s)

    def stop(self, timeout_s: float | None) -> bool:
        """End after all that is queued. Returns whether it has ended."""
        self.post(Priority.STOP, self._note_stop)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _note_stop(self) -> None:
        self._stopping = True

    def run_commits(self) -> None:
        """For a long command, on the thread itself: do the commits that have come meanwhile."""
        while (queued := self._next_commit()) is not None:
            self._do(queued)

    def _next_commit(self) -> _Queued[Outcome] | None:
        with self._changed:
            if self._queue and self._queue[0].priority is Priority.COMMIT:
                return heapq.heappop(self._queue)
        return None

    def _do(self, queued: _Queued[Outcome]) -> None:
        outcome = queued.command()
        if outcome is not None:
            self._outcomes.append(outcome)
            self._arrived.set()

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._do(self._next())
        except BaseException as error:  # noqa: BLE001 - the top of the thread: say why it ended
            self.failure = error
            self._arrived.set()

    def _next(self) -> _Queued[Outcome]:
        with self._changed:
            while not self._queue:
                self._changed.wait()
            return heapq.heappop(self._queue)
