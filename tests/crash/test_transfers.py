"""Exports and imports that are killed, or that a disk refuses: whole, or nothing."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engines import fake_engine, run, settle, step, user
from keepwarm import AgentCacheStore, BlockPoolBatchEngine
from keepwarm.core.errors import BundleFailed
from keepwarm.store.agent_cache_store import StoreConfig
from keepwarm.store.bundle import archive
from keepwarm.store.disk.files import RecordFiles
from stores import record_files
from waiting import wait_until

NUM_TOKENS = 900
HELPERS = Path(__file__).parents[1] / "helpers"

CHILD = """
import os, signal, sys
from pathlib import Path
from engines import fake_engine
from keepwarm import AgentCacheStore
from keepwarm.store.catalog.catalog import Catalog
from keepwarm.store.disk.files import RecordFiles

home, path, place, visit = sys.argv[1:]
owner, name, moment = {
    "before a file": (RecordFiles, "publish", "before"),
    "after a file": (RecordFiles, "publish", "after"),
    "after its row": (Catalog, "add_records", "after"),
    "before the commit": (Catalog, "commit", "before"),
    "after the commit": (Catalog, "commit", "after"),
}[place]
store = AgentCacheStore(Path(home))
engine = fake_engine(store=store)
inner, visits = getattr(owner, name), iter(range(int(visit), -1, -1))

def trapped(*arguments, **more):
    is_last = not next(visits)
    if is_last and moment == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    result = inner(*arguments, **more)
    if is_last:
        os.kill(os.getpid(), signal.SIGKILL)
    return result

setattr(owner, name, trapped)
engine.import_agent(Path(path), "eve")
"""


def opened(home: Path) -> AgentCacheStore:
    return AgentCacheStore(home, config=StoreConfig(free_floor_bytes=0))


def talk(engine: BlockPoolBatchEngine) -> None:
    run(engine, agent_id="ada", messages=[user("x" * NUM_TOKENS)], max_tokens=5)
    settle(engine)


@pytest.fixture
def bundle_path(tmp_path: Path) -> Path:
    path = tmp_path / "ada.keepwarm"
    with opened(tmp_path / "origin") as store:
        engine = fake_engine(store=store)
        talk(engine)
        assert engine.export("ada", path).num_left_out == 0
    return path


def go_on(engine: BlockPoolBatchEngine) -> None:
    engine._store.wait(0.02)
    step(engine)


@pytest.mark.parametrize(
    ("place", "visit"),
    [
        ("before a file", 0),
        ("after a file", 0),
        ("after its row", 0),
        ("before a file", 2),
        ("after a file", 2),
        ("after its row", 2),
        ("before the commit", 0),
        ("after the commit", 0),
    ],
)
def test_a_kill_in_mid_import_leaves_an_agent_or_nothing(
    tmp_path: Path, bundle_path: Path, place: str, visit: int
) -> None:
    home = tmp_path / "home"
    killed = subprocess.run(
        [sys.executable, "-c", CHILD, str(home), str(bundle_path), place, str(visit)],
        env={**os.environ, "PYTHONPATH": str(HELPERS)},
        capture_output=True,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    is_whole = place == "after the commit"
    with opened(home) as store:
        engine = fake_engine(store=store)
        assert engine.knows("eve") == is_whole
        num_files = 4 if is_whole else 0
        wait_until(lambda: len(record_files(home)) == num_files, lambda: go_on(engine))
        wait_until(
            lambda: store._disk._scan is not None and not store._thread._queue,
            lambda: go_on(engine),
        )
        assert len(record_files(home)) == store.health().num_records == num_files
        store.check()
        if not is_whole:
            assert engine.import_agent(bundle_path, "eve").num_records == 4
        assert run(engine, agent_id="eve", append=[user("And?")], max_tokens=3).turn == 2


def refusing(function: Callable[..., Any], num_good: int, code: int) -> Callable[..., Any]:
    """A function that works so many times and then fails as a full disk does."""
    visits = iter(range(num_good))

    def refused(*arguments: Any, **more: Any) -> Any:
        if next(visits, None) is None:
            raise OSError(code, os.strerror(code), "/secret/place")
        return function(*arguments, **more)

    return refused


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("num_good", range(6))
def test_a_disk_that_refuses_an_export_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_good: int, code: int
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with opened(tmp_path / "home") as store:
        engine = fake_engine(store=store)
        talk(engine)
        writing = refusing(archive._write_member, num_good, code)
        monkeypatch.setattr(archive, "_write_member", writing)
        with pytest.raises(BundleFailed) as caught:
            engine.export("ada", out / "ada")
        assert caught.value.problem == os.strerror(code)
        assert not list(out.iterdir())
        monkeypatch.undo()
        assert run(engine, agent_id="ada", append=[user("And?")], max_tokens=3).durable
        assert engine.export("ada", out / "ada").num_left_out == 0


@pytest.mark.parametrize("num_good", range(4))
def test_what_the_disk_refuses_of_an_import_is_left_out(
    tmp_path: Path, bundle_path: Path, monkeypatch: pytest.MonkeyPatch, num_good: int
) -> None:
    with opened(tmp_path / "home") as store:
        engine = fake_engine(store=store)
        publish = refusing(RecordFiles.publish, num_good, errno.ENOSPC)
        monkeypatch.setattr(RecordFiles, "publish", publish)
        imported = engine.import_agent(bundle_path)
        assert (imported.num_records, imported.num_left_out) == (num_good, 4 - num_good)
        monkeypatch.undo()
        assert len(record_files(tmp_path / "home")) == num_good
        turn = run(engine, agent_id="ada", append=[user("And?")], max_tokens=3)
        assert turn.turn == 2
        assert turn.cache.cached_tokens >= 256 * num_good - 1


def test_an_export_beside_the_store_leaves_the_free_floor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(tmp_path / "home") as store:
        engine = fake_engine(store=store)
        talk(engine)
        engine.tiers.saves.offer_tails()
        engine.tiers.save_some()
        settle(engine)
        monkeypatch.setattr(store._disk._budget, "free_floor_bytes", 1 << 60)
        with pytest.raises(BundleFailed, match="must stay free"):
            engine.export("ada", tmp_path / "ada")
        assert not (tmp_path / "ada").exists()
