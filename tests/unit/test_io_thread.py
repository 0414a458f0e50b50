"""The store's thread: priorities, and what becomes of a bug."""

import threading
from collections.abc import Callable

from keepwarm.store.disk.io_thread import IOThread, Priority


def held_thread() -> tuple[IOThread[str], threading.Event]:
    """A thread that does nothing before the event."""
    thread: IOThread[str] = IOThread("test")
    go = threading.Event()
    thread.start()

    def hold() -> None:
        go.wait(10)

    thread.post(Priority.COMMIT, hold)
    return thread, go


def saying(word: str) -> Callable[[], str]:
    return lambda: word


def test_commits_go_before_restores_and_these_before_saves() -> None:
    thread, go = held_thread()
    for priority in (Priority.SAVE, Priority.RESTORE, Priority.COMMIT, Priority.SAVE):
        thread.post(priority, saying(priority.name))
    go.set()
    assert thread.stop(10)
    assert thread.take() == ["COMMIT", "RESTORE", "SAVE", "SAVE"]


def test_equal_ones_in_their_order() -> None:
    thread, go = held_thread()
    for number in range(20):
        thread.post(Priority.SAVE, saying(str(number)))
    go.set()
    assert thread.stop(10)
    assert thread.take() == [str(number) for number in range(20)]


def test_a_long_command_lets_commits_through() -> None:
    thread, go = held_thread()

    def long() -> str:
        thread.run_commits()
        return "saved"

    thread.post(Priority.SAVE, long)
    thread.post(Priority.RESTORE, saying("restored"))
    go.set()
    thread.wait(10)
    thread.stop(10)
    assert thread.take() == ["restored", "saved"]

    thread, go = held_thread()

    def posting() -> str:
        thread.post(Priority.COMMIT, saying("committed"))
        thread.post(Priority.RESTORE, saying("restored"))
        thread.run_commits()
        return "saved"

    thread.post(Priority.SAVE, posting)
    go.set()
    assert thread.stop(10)
    assert thread.take() == ["committed", "saved", "restored"]


def test_a_bug_ends_the_thread_and_is_shown() -> None:
    thread, go = held_thread()

    def broken() -> str:
        raise ZeroDivisionError

    thread.post(Priority.SAVE, broken)
    thread.post(Priority.SAVE, saying("never"))
    go.set()
    for _ in range(100):
        thread.wait(0.1)
        if thread.failure is not None:
            break
    assert isinstance(thread.failure, ZeroDivisionError)
    assert thread.take() == []
