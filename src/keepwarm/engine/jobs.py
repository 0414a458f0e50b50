"""Work that goes on between the engine's steps: for what takes longer than a step may."""

from concurrent.futures import Future
from typing import Any, Generic, TypeVar

from keepwarm.core.errors import InvariantBroken
from keepwarm.core.steps import Pause, Steps

T = TypeVar("T")


class Job(Generic[T]):
    """Runs steps on the engine's thread, for an answer that any thread may wait for.

    Cancelling the answer ends the job.
    """

    def __init__(self, steps: Steps[T], answer: "Future[T]") -> None:
        self._steps = steps
        self._answer = answer
        self.is_ready = False
        """Whether it has nothing to wait for."""

    def advance(self) -> bool:
        """Do what can be done now. Returns whether the job has ended."""
        if self._answer.cancelled():
            self._steps.close()
            return True
        try:
            self.is_ready = next(self._steps) is Pause.READY
        except StopIteration as end:
            if self._answer.set_running_or_notify_cancel():
                self._answer.set_result(end.value)
        except InvariantBroken:
            raise
        except Exception as error:  # noqa: BLE001 - it is raised where it was asked for
            if self._answer.set_running_or_notify_cancel():
                self._answer.set_exception(error)
        else:
            return False
        return True

    def fail(self, error: Exception) -> None:
        self._steps.close()
        if self._answer.set_running_or_notify_cancel():
            self._answer.set_exception(error)


class Jobs:
    """Owns the jobs that have not ended. Belongs to the engine's thread."""

    def __init__(self) -> None:
        self._jobs: list[Job[Any]] = []

    def __repr__(self) -> str:
        return f"Jobs({len(self._jobs)} under way)"

    def __bool__(self) -> bool:
        return bool(self._jobs)

    @property
    def is_ready(self) -> bool:
        """Whether `advance` would bring one of them on, whatever the store says."""
        return any(job.is_ready for job in self._jobs)

    def begin(self, steps: Steps[T], answer: "Future[T]") -> None:
        """Begin a job and do its first step at once."""
        job = Job(steps, answer)
        if not job.advance():
            self._jobs.append(job)

    def advance(self) -> None:
        """Do what can be done now of each."""
        self._jobs = [job for job in self._jobs if not job.advance()]

    def abandon(self, error: Exception) -> None:
        """End all jobs with the error."""
        jobs, self._jobs = self._jobs, []
        for job in jobs:
            job.fail(error)
