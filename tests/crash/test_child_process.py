"""The launcher of processes that benchmarks and tests kill: told, heard, ended."""

import os
import signal

import pytest

from keepwarm.bench.child_process import ChildProcess
from waiting import PATIENCE_S

ECHO = "import sys; print(sys.stdin.read().upper()); sys.stderr.write('oh'); sys.exit(3)"
CUT = "import os; os.write(1, b'whole\\nhal'); os.kill(os.getpid(), 9)"
WAIT = "import time; print('up', flush=True); time.sleep(1000)"


def test_it_is_told_and_heard_and_ends_with_its_code() -> None:
    with ChildProcess("-c", ECHO) as child:
        child.tell("hello")
        assert child.read_line() == "HELLO"
        assert child.read_line() == ""
        assert child.wait(PATIENCE_S) == 3
        assert child.complaints() == "oh"


def test_a_line_that_was_cut_is_left_out() -> None:
    with ChildProcess("-c", CUT) as child:
        assert list(child.lines()) == ["whole"]
        assert child.wait(PATIENCE_S) == -signal.SIGKILL


def test_it_does_not_outlive_its_block() -> None:
    with ChildProcess("-c", WAIT) as child:
        assert child.read_line() == "up"
        os.kill(child.pid, 0)
    with pytest.raises(ProcessLookupError):
        os.kill(child.pid, 0)


def test_it_is_killed_after_a_time() -> None:
    with ChildProcess("-c", WAIT) as child:
        child.kill_after(0.0)
        assert child.wait(PATIENCE_S) == -signal.SIGKILL


def test_it_finds_the_benchmarks_from_any_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    with ChildProcess("-c", "import benchmarks; print('found')") as child:
        assert child.read_line() == "found", child.complaints()
