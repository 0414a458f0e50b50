"""Each column of each table of the catalogue is changed in turn: one agent suffers at the most.

Always with a message; the store opens, lists and deletes the damaged agent, and the others answer
as before.
"""

import logging
import shutil
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from engines import completed, drain, user
from keepwarm.core.errors import DamagedAgent, InvalidRequest
from keepwarm.store.catalog import schema, seals
from keepwarm.store.catalog.catalog import Catalog
from keepwarm.store.disk.disk_store import CATALOG_NAME
from stores import Setup, opened

NAMES = ("ada", "bob", "eve", "pinned")
CHANGES: tuple[Any, ...] = (
    0,
    1,
    -5,
    7,
    1 << 62,
    -(1 << 63),
    "",
    "other",
    "\x00\x01",
    b"",
    b"{",
    None,
)
FORK = "fork"


@dataclass(frozen=True)
class Home:
    """A folder with four agents, what each said, and its columns."""

    folder: Path
    said: dict[str, tuple[Any, ...]]

    def copy_to(self, folder: Path) -> Path:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.folder, folder)
        return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    folder = tmp_path_factory.mktemp("whole") / "store"
    with opened(folder) as setup:
        for name in NAMES:
            setup.engine.create(name, system=f"You are {name}.")
            for content in (f"{name} " * 80, "Go on.", "And then?"):
                say(setup, name, content)
        setup.engine.pin("pinned")
        setup.engine.pin("bob")
        setup.run(agent_id="bob", messages=[user("A title")], max_tokens=2)
        assert setup.engine.flush()
        assert setup.engine.close()
        said = {name: turns_of(setup, name) for name in NAMES}
    return Home(folder, said)


def say(setup: Setup, name: str, content: str) -> Any:
    request = setup.engine.submit(agent_id=name, append=[user(content)], max_tokens=4)
    return completed(drain(setup.engine), request)


def turns_of(setup: Setup, name: str) -> tuple[Any, ...]:
    return tuple(turn.messages for turn in setup.engine.turns(name))


def columns() -> Iterator[tuple[str, str]]:
    db = sqlite3.connect(":memory:")
    for step in schema.STEPS:
        step(db)
    tables = [row[0] for row in db.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")]
    for table in tables:
        for row in db.execute(f"PRAGMA table_info({table})"):
            yield table, row[1]
    db.close()


COLUMNS = sorted(columns())


def change(path: Path, table: str, column: str, value: Any) -> bool:
    """One row of the table, bob's where it has some. Returns whether that could be done."""
    db = sqlite3.connect(path)
    seals.install(db)
    db.execute("PRAGMA foreign_keys=OFF")
    where = {
        "agents": "name = 'bob'",
        "families": "true",
        "records": "maker = 'bob'",
        "chores": "true",
    }.get(
        table, "line = (SELECT min(line) FROM lines JOIN agents USING (agent) WHERE name = 'bob')"
    )
    key = f"rowid = (SELECT min(rowid) FROM {table} WHERE {where})"
    if table in ("spans", "messages", "turns", "line_blocks"):
        second = {"messages": "node", "line_blocks": "depth"}.get(table, "position")
        key = f"{where} AND {second} = (SELECT max({second}) / 2 FROM {table} WHERE {where})"
    elif table == "chores":
        key = "true"
    try:
        with db:
            (before,) = db.execute(
                f"SELECT count(*) FROM {table} WHERE {column} IS ?", (value,)
            ).fetchone()
            db.execute(f"UPDATE {table} SET {column} = ? WHERE {key}", (value,))
            (after,) = db.execute(
                f"SELECT count(*) FROM {table} WHERE {column} IS ?", (value,)
            ).fetchone()
        return bool(after > before)
    except (sqlite3.IntegrityError, sqlite3.OperationalError):
        return False  # the table takes no such value; a damaged page could have it all the same
    finally:
        db.close()


def test_all_columns_are_known() -> None:
    assert {table for table, _ in COLUMNS} == {*seals.COLUMNS, "line_blocks", "chores"}
    assert len(COLUMNS) > 50


@pytest.mark.parametrize(("table", "column"), COLUMNS)
def test_one_agent_suffers_at_the_most(
    home: Home, tmp_path: Path, caplog: pytest.LogCaptureFixture, table: str, column: str
) -> None:
    num_changed = num_saved = 0
    for value in CHANGES:
        folder = home.copy_to(tmp_path / "store")
        if not change(folder / CATALOG_NAME, table, column, value):
            continue
        num_changed += 1
        caplog.clear()
        with opened(folder) as setup:
            suffers = check_agents(home, setup, (table, column, value))
            said = [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR]
            if suffers:
                assert any("damaged" in text for text in said), (value, said)
                assert setup.store.health().notices
                num_saved += check_rest(setup, suffers, tmp_path / "rest.keepwarm")
                check_it_can_go(setup, suffers)
            setup.engine.check()
        with opened(folder) as setup:  # and it stays so
            left = {view.agent_id for view in setup.engine.agents()}
            assert left >= {"ada", "eve", "pinned"}
            assert not [view for view in setup.engine.agents() if view.damage]
    assert num_changed or (table, column) == ("chores", "chore"), "nothing could be changed"
    if table in ("spans", "messages", "turns", "lines") and column not in ("line", "agent"):
        assert num_saved, "nothing could be exported"


def check_agents(home: Home, setup: Setup, where: Any) -> set[str]:
    """Others answer as before. Returns the damaged ones: bob, or what his name has become."""
    listed = {view.agent_id: view for view in setup.engine.agents()}
    for name in ("ada", "eve", "pinned"):
        assert turns_of(setup, name) == home.said[name], (where, name)
        assert say(setup, name, "More.").turn == 4, (where, name)
        assert not listed[name].damage, where
    suffers: set[str] = set()
    for name in listed.keys() - {"ada", "eve", "pinned"}:
        try:
            said = turns_of(setup, name)
        except DamagedAgent as error:
            suffers.add(name)
            assert repr(name) in str(error)
            assert "export" in str(error)
            continue
        assert (name, said) == ("bob", home.said["bob"]), where
        assert say(setup, name, "More.").turn == 4
    assert len(suffers) <= 1, where
    return suffers


def check_rest(setup: Setup, suffers: set[str], path: Path) -> bool:
    """What can be read is a bundle that anyone can import. Returns whether that is anything."""
    (name,) = suffers
    path.unlink(missing_ok=True)
    try:
        assert setup.engine.export(name, path).damage
    except DamagedAgent as error:
        assert "nothing of it" in str(error)
        return False
    rest = setup.engine.import_agent(path, "rest")
    assert rest.is_durable
    assert rest.num_turns <= 3
    said = turns_of(setup, "rest")
    assert say(setup, "rest", "Are you there?").turn == len(said) + 1
    setup.engine.delete("rest")
    assert setup.engine.flush()
    return True


def check_it_can_go(setup: Setup, suffers: set[str]) -> None:
    (name,) = suffers
    assert {v.agent_id: v for v in setup.engine.agents()}[name].damage
    for act in (
        lambda: setup.engine.fork(name, FORK),
        lambda: setup.engine.configure(name, priority=1),
        lambda: setup.engine.create(name),
        lambda: setup.engine.submit(agent_id=name, text="Hello", max_tokens=1),
    ):
        with pytest.raises((DamagedAgent, InvalidRequest)):  # it may have become no name
            act()
    gone = setup.engine.delete(name)
    assert setup.engine.flush()
    assert gone.durable
    assert name not in {view.agent_id for view in setup.engine.agents()}
    assert not setup.store.health().notices


def test_a_damaged_agent_leaves_nothing_behind_when_it_is_deleted(
    home: Home, tmp_path: Path
) -> None:
    for table, column in (("lines", "line"), ("agents", "agent"), ("lines", "agent")):
        folder = home.copy_to(tmp_path / "store")
        assert change(folder / CATALOG_NAME, table, column, 1 << 30)
        with opened(folder) as setup:
            setup.engine.delete("bob")
            assert setup.engine.flush()
        for path in folder.glob("catalog*"):
            assert b"bob bob bob" not in path.read_bytes(), (table, column)


class TestWithoutACatalogue:
    @pytest.mark.parametrize("harm", ["empty", "gone"])
    def test_it_is_said_loudly(
        self, home: Home, tmp_path: Path, caplog: pytest.LogCaptureFixture, harm: str
    ) -> None:
        folder = home.copy_to(tmp_path / "store")
        for suffix in ("-wal", "-shm"):
            (folder / f"{CATALOG_NAME}{suffix}").unlink(missing_ok=True)
        if harm == "empty":
            (folder / CATALOG_NAME).write_bytes(b"")
        else:
            (folder / CATALOG_NAME).unlink()
        with opened(folder) as setup:
            assert setup.engine.agents() == ()
            (notice,) = setup.store.health().notices
            assert "damaged or gone" in notice
        errors = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
        assert any(harm in text and "begun" in text for text in errors), errors
        assert (folder / f"{CATALOG_NAME}.aside-1").exists() == (harm == "empty")

    def test_a_new_home_is_no_loss(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        with opened(tmp_path / "new") as setup:
            assert setup.store.health().notices == ()
        assert not caplog.records

    def test_what_can_be_read_of_a_file_that_was_cut_is_taken_over(
        self, home: Home, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        folder = home.copy_to(tmp_path / "store")
        with Catalog.open(folder / CATALOG_NAME) as catalog:
            catalog.scrub()
        path = folder / CATALOG_NAME
        path.write_bytes(path.read_bytes()[:-4096])
        with opened(folder) as setup:
            there = {view.agent_id for view in setup.engine.agents()}
            assert len(there) >= len(NAMES) - 1
            for name in there:
                assert turns_of(setup, name) == home.said[name]
            assert "were taken over" in setup.store.health().notices[0]
