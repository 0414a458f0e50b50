"""Disks that are full, read-only or broken: serving goes on from memory, and writing comes back."""

import errno
import logging
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from benchmarks.chaos.world import FAKE, load_world, new_engine
from engines import fresh_reply, ids, step
from keepwarm import AgentCacheStore
from keepwarm.core.errors import KeepwarmError
from keepwarm.core.events import Completed
from keepwarm.store.agent_cache_store import StoreConfig
from keepwarm.store.catalog.catalog import Catalog
from keepwarm.store.catalog.errors import CatalogUnavailable
from keepwarm.store.disk import files as record_files
from stores import MEGABYTE, Setup, opened, set_aside_files

REFUSES = "the disk refuses writes"
TAKES = "the disk takes writes again"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of six megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    _mount("-t", "tmpfs", "-o", "size=6m,mode=700", "tmpfs", str(folder))
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def _mount(*arguments: str) -> None:
    try:
        mounted = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        pytest.skip(f"A FULL DISK IS NOT TESTED HERE: {error}")
    if mounted.returncode:
        pytest.skip(f"A FULL DISK IS NOT TESTED HERE: mounting failed: {mounted.stderr.strip()}")


def fill(folder: Path) -> Path:
    """Take every byte that is left."""
    ballast = folder / "ballast"
    with ballast.open("ab", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError as error:
                assert error.errno == errno.ENOSPC
    return ballast


def say(setup: Setup, agent_id: str) -> Completed:
    """A turn of 300 new tokens, whose answer is compared with a cold engine's."""
    known: list[int] = []
    if agent_id in setup.engine.book:
        known = list(setup.engine.book.get(agent_id).main.transcript.token_ids)
    prompt = [*known, *ids(300, len(known) + sum(agent_id.encode()))]
    turn = setup.run(agent_id=agent_id, token_ids=prompt, max_tokens=4)
    assert turn.token_ids == fresh_reply(prompt, max_tokens=4)
    return turn


def is_about_space(fault: str | None) -> bool:
    return any(word in str(fault) for word in ("full", "space", "are free on the disk"))


def errors(caplog: pytest.LogCaptureFixture, text: str) -> int:
    return sum(text in record.getMessage() for record in caplog.records)


def wait_a_minute(setup: Setup) -> None:
    """Longer than the store pauses before it tries again; then it is heard."""
    setup.clock.advance(60)
    for _ in range(200):
        step(setup.engine)
        setup.store.wait(0.01)
        if setup.store.health().fault is None:
            return


@pytest.fixture
def says_it_has_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other programs fill the disk between the question and the write: the kernel refuses it."""
    roomy = os.statvfs("/")
    monkeypatch.setattr("keepwarm.store.disk.budget.os.statvfs", lambda _folder: roomy)


@pytest.fixture(params=["asked", "not asked"])
def is_asked(request: pytest.FixtureRequest) -> None:
    """Whether the free space is known before the write."""
    if request.param == "not asked":
        request.getfixturevalue("says_it_has_room")


@pytest.mark.usefixtures("is_asked")
class TestFullDisk:
    def test_serving_goes_on_and_writing_resumes(
        self, small_disk: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.WARNING)
        home = small_disk / "store"
        with opened(home) as setup:
            assert say(setup, "ada").durable
            setup.settle()
            assert setup.store.health().fault is None
            ballast = fill(small_disk)
            turns = self._until_refused(setup)
            health = setup.store.health()
            assert is_about_space(health.fault)
            assert health.num_faults
            assert not setup.engine.flush()
            assert errors(caplog, REFUSES) == 1
            ballast.unlink()
            wait_a_minute(setup)
            setup.settle()
            assert setup.store.health().fault is None
            assert errors(caplog, TAKES) == 1
            assert say(setup, "ada").durable
            assert setup.engine.flush()
        with opened(home) as setup:
            assert setup.engine.agent("ada").num_turns == turns + 2
            assert setup.engine.agent("bob").num_turns == turns
            turn = say(setup, "ada")
            assert turn.cache.cached_tokens >= 300
            assert turn.durable

    def _until_refused(self, setup: Setup) -> int:
        """Turns of two agents until neither is durable; SQLite's log has some room of its own."""
        for number in range(1, 60):
            setup.clock.advance(60)
            durable = [say(setup, agent_id).durable for agent_id in ("ada", "bob")]
            if not any(durable):
                return number
        raise AssertionError("a full disk took a hundred turns")

    def test_what_was_refused_is_written_when_the_store_closes(self, small_disk: Path) -> None:
        home = small_disk / "store"
        with opened(home) as setup:
            say(setup, "ada")
            ballast = fill(small_disk)
            turns = self._until_refused(setup)
            ballast.unlink()
        with opened(home) as setup:
            assert setup.engine.agent("ada").num_turns == turns + 1

    def test_a_kill_while_it_is_full_loses_only_what_was_not_durable(
        self, small_disk: Path, tmp_path: Path
    ) -> None:
        home, left = small_disk / "store", tmp_path / "left"
        with opened(home) as setup:
            assert say(setup, "ada").durable
            fill(small_disk)
            turns = self._until_refused(setup)
            shutil.copytree(home, left)  # as the killed process would leave it
        with opened(left) as setup:
            assert 1 <= setup.engine.agent("ada").num_turns <= turns
            assert say(setup, "ada").durable

    def test_a_full_disk_opens_or_says_why_not(self, small_disk: Path) -> None:
        home = small_disk / "store"
        with opened(home) as setup:
            say(setup, "ada")
            setup.settle()
        ballast = fill(small_disk)
        try:
            with opened(home) as setup:
                assert say(setup, "ada").cache.cached_tokens >= 256
        except (CatalogUnavailable, OSError) as error:
            assert is_about_space(str(error))
        ballast.unlink()
        with opened(home) as setup:
            assert setup.engine.agent("ada").num_turns >= 1
            assert say(setup, "ada").durable


def test_the_free_floor_is_left_to_others(small_disk: Path) -> None:
    floor_bytes = 3 * MEGABYTE
    config = StoreConfig(free_floor_bytes=floor_bytes)
    with AgentCacheStore(small_disk / "store", config=config) as store:
        engine = new_engine(load_world(FAKE), store, ram_blocks=40)
        for salt in range(12):
            engine.submit(token_ids=ids(2000, salt), max_tokens=1)
            while engine.has_work or store.health().num_queued:
                if not engine.has_work:
                    store.wait(0.05)
                engine.step()
            free = os.statvfs(small_disk)
            assert free.f_bavail * free.f_frsize >= floor_bytes - (256 << 10)
        assert "must stay free" in str(store.health().fault)


def test_a_read_only_disk_is_refused_at_the_start_and_left_alone(small_disk: Path) -> None:
    home = small_disk / "store"
    with opened(home) as setup:
        say(setup, "ada")
    _mount("-o", "remount,ro", str(small_disk))
    for _ in range(2):
        with pytest.raises((KeepwarmError, OSError), match="[Rr]ead-only|readonly|EROFS"):
            AgentCacheStore(home)
    _mount("-o", "remount,rw", str(small_disk))
    with opened(home) as setup:
        assert setup.engine.agent("ada").num_turns == 1


def refuse(code: int) -> Callable[..., NoReturn]:
    def refused(*_arguments: Any, **_more: Any) -> NoReturn:
        raise OSError(code, os.strerror(code))

    return refused


class TestBrokenDisk:
    @pytest.mark.parametrize("code", [errno.EIO, errno.EROFS, errno.EDQUOT, errno.EACCES])
    @pytest.mark.parametrize("place", ["_write_all", "_move_into_place"])
    def test_records_that_cannot_be_written(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
        code: int,
        place: str,
    ) -> None:
        caplog.set_level(logging.WARNING)
        with opened(tmp_path) as setup:
            monkeypatch.setattr(record_files, place, refuse(code))
            for _ in range(6):
                assert say(setup, "ada").durable
                setup.settle_or_refused()
                setup.clock.advance(60)
            assert os.strerror(code) in str(setup.store.health().fault)
            assert setup.store.health().num_records == 0
            assert not list((tmp_path / "tmp").iterdir())
            assert errors(caplog, REFUSES) == 1
            monkeypatch.undo()
            wait_a_minute(setup)
            setup.settle()
            assert setup.store.health().fault is None
            assert errors(caplog, TAKES) == 1
            assert setup.store.health().num_records

    def test_a_catalogue_that_cannot_be_written(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refused(*_arguments: Any) -> NoReturn:
            raise CatalogUnavailable(
                tmp_path, operation="commit", message="disk I/O error", errorname="SQLITE_IOERR"
            )

        with opened(tmp_path) as setup:
            assert say(setup, "ada").durable
            monkeypatch.setattr(Catalog, "commit", refused)
            assert not say(setup, "ada").durable
            assert not say(setup, "bob").durable
            assert not setup.engine.flush()
            monkeypatch.undo()
            wait_a_minute(setup)
            assert say(setup, "ada").durable
        with opened(tmp_path) as setup:
            assert setup.engine.agent("ada").num_turns == 3
            assert setup.engine.agent("bob").num_turns == 1

    def test_records_that_cannot_be_read_are_computed_and_kept(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with opened(tmp_path) as setup:
            for _ in range(3):
                say(setup, "ada")
            assert setup.engine.close()
        with opened(tmp_path) as setup:
            monkeypatch.setattr(record_files, "_read_whole", refuse(errno.EIO))
            assert say(setup, "ada").cache.cached_tokens == 0
            assert setup.store.health().num_faults >= 1
            assert setup.store.health().num_damaged == 0
            assert not set_aside_files(tmp_path)
            assert setup.engine.close()
        monkeypatch.undo()
        with opened(tmp_path) as setup:
            assert say(setup, "ada").cache.cached_tokens >= 700

    def test_folders_that_cannot_be_compared_with_the_catalogue_lose_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with opened(tmp_path) as setup:
            for _ in range(3):
                say(setup, "ada")
            assert setup.engine.close()
            num_records = setup.store.health().num_records
        monkeypatch.setattr(os, "scandir", refuse(errno.EIO))
        with opened(tmp_path) as setup:
            turn = say(setup, "ada")
            for _ in range(5):
                step(setup.engine)
                setup.store.wait(0.02)
            assert turn.cache.cached_tokens >= 256
            assert setup.store.health().num_records >= num_records
