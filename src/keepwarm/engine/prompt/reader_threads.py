"""The threads on which long prompts are read, beside the engine's."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Generic, TypeVar

from keepwarm.core.errors import QueueFull
from keepwarm.engine.prompt.prompt_encoder import Cancelled, Guard

T = TypeVar("T")

NUM_READERS = 2


class ReadingJob(Generic[T]):
    """Work for a reader's thread, whose result or error is its `answer`."""

    def __init__(self, work: Callable[[Guard], T]) -> None:
        self.answer: Future[T] = Future()
        self._work = work
        self._is_cancelled = threading.Event()

    def cancel(self) -> None:
        """End the work before the next text that it would encode. From any thread.

        Once the work has ended, nothing changes.
        """
        self._is_cancelled.set()
        self.answer.cancel()

    def run(self) -> None:
        """Do the work, unless it was cancelled while it waited."""
        if not self.answer.set_running_or_notify_cancel():
            return
        try:
            self.answer.set_result(self._work(self._guard))
        except Exception as error:  # noqa: BLE001 - it is raised where the work was asked for
            self.answer.set_exception(error)

    def _guard(self, num_characters: int) -> None:
        if self._is_cancelled.is_set():
            raise Cancelled


class Readers:
    """Owns the readers' threads, which start with the first work and do not hold up an exit.

    They run beside the engine's thread because a tokenizer releases the interpreter's lock while it
    encodes. `max_waiting`: how many jobs may wait for a thread.
    """

    def __init__(self, num_threads: int = NUM_READERS, *, max_waiting: int = 1024) -> None:
        self._num_threads = num_threads
        self._max_waiting = max_waiting
        self._jobs: SimpleQueue[ReadingJob[object]] = SimpleQueue()
        self._threads: list[threading.Thread] = []

    def __repr__(self) -> str:
        return f"Readers({len(self._threads)} threads, {self._jobs.qsize()} waiting)"

    def begin(self, work: "Callable[[Guard], T]") -> "ReadingJob[T]":
        """Queue the work for a reader's thread. Raises QueueFull."""
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
