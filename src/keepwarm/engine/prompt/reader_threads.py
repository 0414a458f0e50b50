"""The threads on which long prompts are read, beside the engine's."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Generic, TypeVar

from keepwarm.core.errors import QueueFull
from keepwarm.engine.prompt.encoding import Guard, NobodyWaits

T = TypeVar("T")

NUM_READERS = 2


class ReadingJob(Generic[T]):
    """Something to read. `call_off` ends it before the next text that it would encode."""

    def __init__(self, work: Callable[[Guard], T]) -> None:
        self.answer: Future[T] = Future()
        self._work = work
        self._is_called_off = threading.Event()

    def call_off(self) -> None:
        """From any thread; when it has ended, nothing changes."""
        self._is_called_off.set()
        self.answer.cancel()

    def run(self) -> None:
        if not self.answer.set_running_or_notify_cancel():
            return
        try:
            self.answer.set_result(self._work(self._guard))
        except Exception as error:  # noqa: BLE001 - it is raised where it was asked for
            self.answer.set_exception(error)

    def _guard(self, num_characters: int) -> None:
        if self._is_called_off.is_set():
            raise NobodyWaits


class Readers:
    """Owns the threads, which start when there is something to read and do not hold up an exit.

    A tokenizer leaves the interpreter's lock to the others while it encodes. `max_waiting` prompts
    may wait for a thread.
    """

    def __init__(self, num_threads: int = NUM_READERS, *, max_waiting: int = 1024) -> None:
        self._num_threads = num_threads
        self._max_waiting = max_waiting
        self._jobs: SimpleQueue[ReadingJob[object]] = SimpleQueue()
        self._threads: list[threading.Thread] = []

    def __repr__(self) -> str:
        return f"Readers({len(self._threads)} threads, {self._jobs.qsize()} waiting)"

    def begin(self, work: "Callable[[Guard], T]") -> "ReadingJob[T]":
        """Raises QueueFull."""
        num_waiting = self._jobs.qsize()
        if num_waiting >= self._max_waiting:
            raise QueueFull(num_waiting=num_waiting)
        job = ReadingJob(work)
        self._jobs.put(job)  # type: ignore[arg-type]  # a job of any answer
        if len(self._threads) < self._num_threads:
            self._start_thread()
        return job

    def _start_thread(self) -> None:
        name = f"keepwarm-reader-{len(self._threads)}"
        thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _work(self) -> None:
        while True:
            self._jobs.get().run()
