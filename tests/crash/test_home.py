"""One process for each home, whatever became of the last one; and nobody else reads its files."""

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from engines import ids
from keepwarm import AgentCacheStore
from keepwarm.bench.child_process import ChildProcess
from keepwarm.store.disk.home_lock import HomeInUse
from stores import opened, record_files
from waiting import PATIENCE_S

HOLD = """
import sys
from keepwarm import AgentCacheStore

store = AgentCacheStore(sys.argv[1])
print("held", flush=True)
sys.stdin.read()
store.close()
"""
OPEN = """
import sys
from keepwarm import AgentCacheStore

AgentCacheStore(sys.argv[1]).close()
"""


@contextmanager
def holder(folder: Path) -> Iterator[ChildProcess]:
    """A process that has the home open."""
    with ChildProcess("-c", HOLD, str(folder)) as process:
        assert process.read_line() == "held", process.complaints()
        yield process


def test_a_second_process_is_refused_and_told_who_has_it(tmp_path: Path) -> None:
    with AgentCacheStore(tmp_path):
        refused = subprocess.run(
            [sys.executable, "-c", OPEN, str(tmp_path)], capture_output=True, text=True, check=False
        )
    assert refused.returncode == 1
    assert f"{tmp_path} is in use by process {os.getpid()}" in refused.stderr


def test_this_process_is_refused_and_told_who_has_it(tmp_path: Path) -> None:
    with holder(tmp_path) as other, pytest.raises(HomeInUse) as refused:
        AgentCacheStore(tmp_path)
    assert refused.value.holder == str(other.pid)


def test_a_refusal_leaves_the_holder_alone(tmp_path: Path) -> None:
    with opened(tmp_path) as setup:
        with pytest.raises(HomeInUse):
            AgentCacheStore(tmp_path)
        assert setup.run(agent_id="ada", token_ids=ids(300), max_tokens=2).durable
        with pytest.raises(HomeInUse):
            AgentCacheStore(tmp_path)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_that_died_holds_nothing(tmp_path: Path, how: signal.Signals) -> None:
    with holder(tmp_path) as other:
        other.send_signal(how)
        other.wait(PATIENCE_S)
        AgentCacheStore(tmp_path).close()


def test_a_process_that_closed_holds_nothing(tmp_path: Path) -> None:
    AgentCacheStore(tmp_path).close()
    AgentCacheStore(tmp_path).close()


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_everything_in_it_is_its_owners_alone(tmp_path: Path, umask: int) -> None:
    home = tmp_path / "a" / "home"
    before = os.umask(umask)
    try:
        with opened(home) as setup:
            setup.run(agent_id="ada", token_ids=ids(900), max_tokens=2)
            setup.settle()
        damaged = record_files(home)[0]
        damaged.write_bytes(b"damaged")
        with opened(home) as setup:
            setup.run(agent_id="ada", token_ids=ids(1000), max_tokens=2)
            setup.settle()
            modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (home, *home.rglob("*"))}
            kinds = {path: path.is_dir() for path in modes}
    finally:
        os.umask(before)
    names = {path.name for path in modes}
    assert {"lock", "catalog.sqlite3", "catalog.sqlite3-wal", "catalog.sqlite3-shm"} <= names
    assert list((home / "set-aside").glob("*.json"))
    wrong = {
        path: oct(mode) for path, mode in modes.items() if mode != (0o700 if kinds[path] else 0o600)
    }
    assert not wrong


def test_an_older_homes_permissions_are_mended(tmp_path: Path) -> None:
    with opened(tmp_path) as setup:
        setup.run(agent_id="ada", token_ids=ids(300), max_tokens=2)
        setup.settle()
    for path in (tmp_path, tmp_path / "blocks", tmp_path / "tmp", tmp_path / "set-aside"):
        path.chmod(0o755)
    AgentCacheStore(tmp_path).close()
    for path in (tmp_path, tmp_path / "blocks", tmp_path / "tmp", tmp_path / "set-aside"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
