"""The store's thread: priorities, long work in units, and what becomes of a bug."""

import threading
from collections.abc import Callable

import pytest

from keepwarm.core.errors import EngineStopped
from keepwarm.store.disk.io_thread import CommandBroke, IOThread, Priority, Units


class Held:
    """A thread that does nothing before `go`, and what it has said."""

    def __init__(self) -> None:
        self.thread = IOThread("test")
        self.go = threading.Event()
        self.heard: list[str] = []
        self.thread.start()
        self.thread.post(Priority.COMMIT, lambda: self.go.wait(10))

    def ask(self, priority: Priority, command: Callable[[], str]) -> None:
        self.thread.ask(priority, command, self.heard.append, lost=self.lose)

    def lose(self) -> None:
        self.heard.append("lost")

    def say(self, priority: Priority, word: str) -> None:
        self.ask(priority, lambda: word)

    def end(self) -> list[str]:
        """Let it do all that is queued; return what was delivered."""
        self.go.set()
        assert self.thread.stop(10)
        assert self.heard == [], "nothing is delivered by another thread"
        self.thread.deliver()
        return self.heard


def test_commits_go_before_restores_and_these_before_saves() -> None:
    held = Held()
    for priority in (Priority.SAVE, Priority.RESTORE, Priority.COMMIT, Priority.SAVE):
        held.say(priority, priority.name)
    assert held.end() == ["COMMIT", "RESTORE", "SAVE", "SAVE"]


def test_equal_ones_in_their_order() -> None:
    held = Held()
    for number in range(20):
        held.say(Priority.SAVE, str(number))
    assert held.end() == [str(number) for number in range(20)]


def test_a_long_command_lets_commits_through() -> None:
    held = Held()

    def posting() -> str:
        held.say(Priority.COMMIT, "committed")
        held.say(Priority.RESTORE, "restored")
        held.thread.run_commits()
        return "saved"

    held.ask(Priority.SAVE, posting)
    assert held.end() == ["committed", "saved", "restored"]


def test_what_is_delivered_may_ask_again() -> None:
    held = Held()
    held.thread.ask(Priority.SAVE, lambda: "one", lambda word: held.say(Priority.SAVE, word))
    held.go.set()
    while not held.heard:
        held.thread.wait(1)
        held.thread.deliver()
    assert held.heard == ["one"]


class TestUnits:
    """Long work: what has come meanwhile goes first, and it can be ended."""

    def counting(self, number: int, ended: list[int]) -> Units[str]:
        done = 0
        try:
            for _ in range(number):
                done += 1
                yield
            return f"{number} units"
        finally:
            ended.append(done)

    def begin(self, held: Held, units: Units[str]) -> Callable[[], None]:
        return held.thread.ask_units(Priority.SAVE, units, held.heard.append, lost=held.lose)

    @pytest.mark.parametrize("num_units", [0, 1, 5])
    def test_a_unit_at_a_time_behind_what_was_posted(self, num_units: int) -> None:
        held, ended = Held(), list[int]()
        self.begin(held, self.counting(num_units, ended))
        held.say(Priority.SAVE, "saved")
        words = held.end()
        assert ended == [num_units]
        assert words == (["saved", f"{num_units} units"] if num_units else ["0 units", "saved"])

    def test_cancelled_before_it_begins(self) -> None:
        held, ended = Held(), list[int]()
        self.begin(held, self.counting(3, ended))()
        assert held.end() == ["lost"]
        assert ended == []

    def test_cancelled_in_the_middle_it_is_closed(self) -> None:
        held, ended = Held(), list[int]()
        cancel = self.begin(held, self.counting(3, ended))
        held.thread.post(Priority.SAVE, cancel)
        assert held.end() == ["lost"]
        assert ended == [1]

    def test_cancelled_after_its_end_it_has_ended(self) -> None:
        held = Held()
        cancel = self.begin(held, self.counting(3, []))
        assert held.end() == ["3 units"]
        cancel()
        held.thread.deliver()
        assert held.heard == ["3 units"]


class TestCalls:
    def test_a_value(self) -> None:
        held = Held()
        held.go.set()
        assert held.thread.call(lambda: 3) == 3
        assert held.thread.stop(10)

    def test_an_error_is_raised_here_and_the_thread_goes_on(self) -> None:
        held = Held()
        held.go.set()

        def refuse() -> None:
            raise EngineStopped

        with pytest.raises(EngineStopped):
            held.thread.call(refuse)
        assert held.thread.call(lambda: "well") == "well"
        assert held.thread.stop(10)

    def test_a_bug_is_raised_as_well(self) -> None:
        held = Held()
        held.go.set()
        with pytest.raises(ZeroDivisionError):
            held.thread.call(lambda: 1 // 0)
        assert held.thread.failure is not None


def test_a_bug_ends_the_thread_and_what_is_not_done_is_lost() -> None:
    held = Held()
    held.say(Priority.COMMIT, "done")

    def broken() -> str:
        raise ZeroDivisionError

    held.ask(Priority.SAVE, broken)
    held.say(Priority.SAVE, "never")
    assert held.end() == ["done", "lost", "lost"]
    assert isinstance(held.thread.failure, ZeroDivisionError)
    held.say(Priority.SAVE, "too late")
    held.thread.deliver()
    assert held.heard == ["done", "lost", "lost", "lost"]


def test_a_commit_that_breaks_inside_a_long_command_is_no_fault_of_the_disk() -> None:
    """The command would take an OSError for its own, and the commit would have no answer."""
    held = Held()

    def nested() -> str:
        raise OSError("a bug, wherever it came from")

    def long_command() -> str:
        held.ask(Priority.COMMIT, nested)
        try:
            held.thread.run_commits()
        except OSError:
            return "refused"
        return "saved"

    held.ask(Priority.SAVE, long_command)
    assert held.end() == ["lost", "lost"]
    assert isinstance(held.thread.failure, CommandBroke)
