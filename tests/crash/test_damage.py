"""Damaged files, two thousand of them, and damaged catalogues: found, and never believed."""

import random
import shutil
import sqlite3
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.chaos.world import FAKE, load_world, new_engine, open_store
from engines import completed, drain, fresh_reply, ids
from keepwarm.core.errors import DamagedAgent
from keepwarm.core.events import Completed, Failed
from keepwarm.core.stored import KVFamily, Record
from keepwarm.store.catalog.errors import CatalogTooNew
from keepwarm.store.disk.disk_store import CATALOG_NAME
from keepwarm.testing.generator import FAKE_LAYOUT
from stores import Setup, opened, record_files, set_aside_files

FAMILY = KVFamily("fake", FAKE_LAYOUT)
NUM_AGENTS = 25
NUM_ROUNDS = 80
MEMORY = 400


@dataclass(frozen=True)
class Stored:
    """A record's file, and the position in its line where it ends."""

    path: Path
    end: int


@dataclass(frozen=True)
class Home:
    """A folder that a clean stop left, with the records of each of its agents in order."""

    folder: Path
    prompts: dict[str, list[int]]
    replies: dict[str, tuple[int, ...]]
    records: dict[str, list[Stored]]

    def copy_to(self, folder: Path) -> Path:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.folder, folder)
        return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """Agents of two to four records: a block or two, one of them put away half full, and a tail."""
    folder = tmp_path_factory.mktemp("pristine") / "store"
    prompts: dict[str, list[int]] = {}
    with opened(folder, num_blocks=MEMORY) as setup:
        for number in range(NUM_AGENTS):
            agent_id = f"agent-{number}"
            beginning = ids(100 + 7 * number, number)
            said = setup.run(agent_id=agent_id, token_ids=beginning, max_tokens=9).token_ids
            if number % 2:
                setup.engine.demote(agent_id)
                setup.settle()
            prompt = [*beginning, *said, *ids(300 + 11 * number, number + 1)]
            said = setup.run(agent_id=agent_id, token_ids=prompt, max_tokens=9).token_ids
            prompts[agent_id] = [*prompt, *said, 5, 6, 7]
        assert setup.engine.close()
    replies = {name: fresh_reply(prompt, max_tokens=8) for name, prompt in prompts.items()}
    with opened(folder) as setup:
        records = {
            agent_id: [
                Stored(_path_of(record), record.end_position)
                for record in setup.store.plan(FAMILY, FAMILY.root, prompt)
            ]
            for agent_id, prompt in prompts.items()
        }
    assert {len(paths) for paths in records.values()} >= {2, 3, 4}
    return Home(folder, prompts, replies, records)


def _path_of(record: Record) -> Path:
    """Within the store's folder."""
    name = record.hash.hex()
    return Path("blocks") / name[:2] / f"{name}.safetensors"


def seeded(seed: int) -> random.Random:
    return random.Random(seed)  # noqa: S311 - for reproduction, not for secrets


def flip_bits(draw: random.Random, data: bytearray) -> None:
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)


def flip_in_header(draw: random.Random, data: bytearray) -> None:
    length = 8 + int.from_bytes(data[:8], "little")
    data[draw.randrange(length)] ^= draw.randrange(1, 256)


def flip_in_first_bytes(draw: random.Random, data: bytearray) -> None:
    data[draw.randrange(80)] ^= draw.randrange(1, 256)


def overwrite(draw: random.Random, data: bytearray) -> None:
    start = draw.randrange(len(data))
    size = draw.randint(1, 600)
    data[start : start + size] = draw.choice((bytes(size), draw.randbytes(size)))


def truncate(draw: random.Random, data: bytearray) -> None:
    del data[draw.choice((0, draw.randrange(len(data)), len(data) - 1)) :]


def extend(draw: random.Random, data: bytearray) -> None:
    size = draw.choice((1, 8, 64, 10_000))
    data += draw.choice((bytes(size), b" " * size, draw.randbytes(size)))


def shift(draw: random.Random, data: bytearray) -> None:
    """Move some bytes elsewhere; the length stays."""
    start = draw.randrange(len(data) - 1)
    del data[start]
    data.insert(draw.randrange(len(data)), draw.randrange(256))


DAMAGES: tuple[Callable[[random.Random, bytearray], None], ...] = (
    flip_bits,
    flip_bits,
    flip_in_header,
    flip_in_first_bytes,
    overwrite,
    truncate,
    extend,
    shift,
)


def damage(draw: random.Random, path: Path) -> str | None:
    """What was done to the file; None when its bytes are what they were, which is harmless."""
    before = path.read_bytes()
    data = bytearray(before)
    how = draw.choice(DAMAGES)
    how(draw, data)
    path.write_bytes(data)
    return None if data == before else how.__name__


@pytest.mark.slow
def test_two_thousand_damages_are_found_and_no_answer_changes(home: Home, tmp_path: Path) -> None:
    """Each agent has one damaged record in each round; all speak at once from the disk."""
    found: Counter[str] = Counter()
    num_harmless = 0
    for number in range(NUM_ROUNDS):
        draw = seeded(number)
        folder = home.copy_to(tmp_path / "round")
        damaged: dict[str, int] = {}
        for agent_id, records in home.records.items():
            place = draw.randrange(len(records))
            how = damage(draw, folder / records[place].path)
            if how is None:
                num_harmless += 1
            else:
                damaged[agent_id] = place
                found[how] += 1
        _everybody_answers(home, folder, damaged, f"round {number}")
        if number % 10 == 0:
            _everybody_answers(home, folder, {}, f"round {number}, again")
    assert sum(found.values()) + num_harmless == NUM_ROUNDS * NUM_AGENTS == 2000
    assert num_harmless < 100
    assert set(found) == {how.__name__ for how in DAMAGES}


def _everybody_answers(home: Home, folder: Path, damaged: dict[str, int], where: str) -> None:
    """The reply is a cold engine's; the disk gives all that came before the damage, and no more."""
    with opened(folder, num_blocks=MEMORY) as setup:
        for agent_id, turn in _replies(home, setup).items():
            assert turn.token_ids == home.replies[agent_id], (where, agent_id)
            ends = [0, *(stored.end for stored in home.records[agent_id])]
            if agent_id in damaged:
                assert turn.cache.cached_tokens == ends[damaged[agent_id]], (where, agent_id)
            else:
                assert turn.cache.cached_tokens >= ends[-1], (where, agent_id)
        health = setup.store.health()
        assert (health.num_damaged, health.fault) == (len(damaged), None), where
        assert len(set_aside_files(folder)) == len(damaged), where
        setup.engine.check()
        assert setup.engine.close()
    shutil.rmtree(folder / "set-aside")


def _replies(home: Home, setup: Setup) -> dict[str, Completed]:
    """Everybody speaks at once."""
    engine = setup.engine
    requests = {
        engine.submit(agent_id=agent_id, token_ids=prompt, max_tokens=8): agent_id
        for agent_id, prompt in home.prompts.items()
    }
    replies: dict[str, Completed] = {}
    while engine.has_work:
        for event in engine.step():
            assert not isinstance(event, Failed), event
            if isinstance(event, Completed):
                replies[requests[event.request_id]] = event
    return replies


def assert_all_right(home: Home, folder: Path) -> dict[str, Completed]:
    """Whatever was found on the disk, everybody says what a cold engine would say."""
    with opened(folder, num_blocks=MEMORY) as setup:
        setup.reconcile(folder)
        replies = _replies(home, setup)
        for agent_id, turn in replies.items():
            assert turn.token_ids == home.replies[agent_id], agent_id
        setup.engine.check()
        assert setup.engine.close()
    return replies


# -- files in the wrong place ------------------------------------------------------------------


def test_a_deleted_file_is_computed_again(home: Home, tmp_path: Path) -> None:
    folder = home.copy_to(tmp_path / "store")
    for records in home.records.values():
        (folder / records[0].path).unlink()
    with opened(folder, num_blocks=MEMORY) as setup:
        replies = _replies(home, setup)
        assert {name: r.token_ids for name, r in replies.items()} == home.replies
        assert setup.engine.close()
        setup.reconcile(folder)
    assert_all_right(home, folder)


def test_swapped_files_are_found(home: Home, tmp_path: Path) -> None:
    folder = home.copy_to(tmp_path / "store")
    firsts = [folder / records[0].path for records in home.records.values()]
    contents = [path.read_bytes() for path in firsts]
    for path, data in zip(firsts, [*contents[1:], contents[0]], strict=True):
        path.write_bytes(data)
    with opened(folder, num_blocks=MEMORY) as setup:
        replies = _replies(home, setup)
        assert {name: r.token_ids for name, r in replies.items()} == home.replies
        assert all(r.cache.cached_tokens == 0 for r in replies.values())
        assert setup.store.health().num_damaged == len(firsts)


def test_a_block_that_goes_on_where_the_catalogue_has_a_run_of_it_is_found(
    home: Home, tmp_path: Path
) -> None:
    """A kill between a file's rename and its row leaves a whole block where a run was."""
    folder = home.copy_to(tmp_path / "store")
    other = tmp_path / "other"
    prompt = ids(300)
    with opened(other) as setup:
        setup.run(agent_id="ada", token_ids=prompt, max_tokens=2)
        setup.settle()
        (whole,) = setup.store.plan(FAMILY, FAMILY.root, prompt)
    with opened(folder) as setup:
        setup.run(agent_id="ada", token_ids=prompt[:100], max_tokens=1)
        setup.engine.park("ada")
        setup.settle()
        setup.run(agent_id="ada", token_ids=prompt, max_tokens=2)
        setup.settle()
        first, second, *_ = setup.store.plan(FAMILY, FAMILY.root, prompt)
        assert (first.stop, second.hash) == (second.start, whole.hash)
    shutil.copy(other / _path_of(whole), folder / _path_of(whole))
    with opened(folder) as setup:
        turn = setup.run(agent_id="eve", token_ids=prompt, max_tokens=9)
        assert turn.token_ids == fresh_reply(prompt, max_tokens=9)
        assert turn.cache.cached_tokens == first.stop
        setup.settle()
    with opened(folder) as setup:
        turn = setup.run(agent_id="eve", token_ids=[*prompt, 1], max_tokens=9)
        assert turn.cache.cached_tokens >= 256


def test_files_that_vanish_give_their_room_back(tmp_path: Path) -> None:
    """The budget counts what is there, not what was: four times as much fits as it allows."""
    loaded = load_world(FAKE)
    with open_store(str(tmp_path), 8 << 20) as store:
        engine = new_engine(loaded, store, ram_blocks=20)
        for number in range(4):
            prompts = [ids(2000, 50 * number + salt) for salt in range(12)]
            for prompt in [*prompts, *prompts]:
                engine.submit(token_ids=prompt, max_tokens=1)
                while engine.has_work or len(engine.tiers.saves):
                    if not engine.has_work:
                        store.wait(0.05)
                    engine.step()
            assert store.health().num_faults == 0, store.health()
            for path in record_files(tmp_path):
                path.unlink()
        engine.check()


# -- the catalogue -------------------------------------------------------------------------------


def delete(path: Path) -> None:
    for suffix in ("", "-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def cut_to_a_page(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: 3 * 4096])


def garbage(path: Path) -> None:
    path.write_bytes(seeded(1).randbytes(path.stat().st_size))


def garbage_behind_the_first_page(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:4096] + seeded(2).randbytes(len(data) - 4096))


def another_application(path: Path) -> None:
    delete(path)
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE somebody (elses INTEGER)")


@pytest.mark.parametrize(
    "harm",
    [
        delete,
        empty,
        cut,
        cut_to_a_page,
        garbage,
        garbage_behind_the_first_page,
        another_application,
    ],
)
def test_without_its_catalogue_kv_is_found_by_content(
    home: Home, tmp_path: Path, harm: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    folder = home.copy_to(tmp_path / "store")
    harm(folder / CATALOG_NAME)
    replies = assert_all_right(home, folder)
    for agent_id, turn in replies.items():
        assert turn.cache.cached_tokens >= home.records[agent_id][-1].end
    assert any("was moved to" in record.message for record in caplog.records)
    assert_all_right(home, folder)


@pytest.mark.parametrize("part", range(4))
def test_a_catalogue_with_a_damaged_page_opens_and_no_answer_is_wrong(
    home: Home, tmp_path: Path, part: int
) -> None:
    """Agents may be lost, or cannot be read, and both is said; what answers is right."""
    size = (home.folder / CATALOG_NAME).stat().st_size
    for page in range(part, size // 4096, 4):
        draw = seeded(page)
        folder = home.copy_to(tmp_path / "store")
        path = folder / CATALOG_NAME
        data = bytearray(path.read_bytes())
        start = 4096 * page + draw.randrange(4000)
        data[start : start + 96] = draw.randbytes(96)
        path.write_bytes(data)
        num_unreadable = 0
        with opened(folder, num_blocks=MEMORY) as setup:
            for agent_id, prompt in [*home.prompts.items()][page % 7 :: 7]:
                try:
                    request_id = setup.engine.submit(
                        agent_id=agent_id, token_ids=prompt, max_tokens=8
                    )
                except DamagedAgent:
                    num_unreadable += 1
                    continue
                turn = completed(drain(setup.engine), request_id)
                assert turn.token_ids == home.replies[agent_id], (page, agent_id)
        assert num_unreadable < 4, page


def test_a_catalogue_of_a_newer_keepwarm_is_refused_and_left_alone(
    home: Home, tmp_path: Path
) -> None:
    folder = home.copy_to(tmp_path / "store")
    with sqlite3.connect(folder / CATALOG_NAME) as db:
        db.execute("PRAGMA user_version=99")
    db.close()
    before = (folder / CATALOG_NAME).read_bytes()
    for _ in range(2):
        with pytest.raises(CatalogTooNew, match="version 99"), opened(folder):
            pass
    assert (folder / CATALOG_NAME).read_bytes() == before
    assert all((folder / s.path).exists() for records in home.records.values() for s in records)


def test_records_that_the_catalogue_lost_are_adopted(home: Home, tmp_path: Path) -> None:
    """A power cut may take the catalogue's last rows and leave the files."""
    folder = home.copy_to(tmp_path / "store")
    with sqlite3.connect(folder / CATALOG_NAME) as db:
        db.execute("DELETE FROM records WHERE created % 2")
    db.close()
    replies = assert_all_right(home, folder)
    for agent_id, turn in replies.items():
        assert turn.cache.cached_tokens >= home.records[agent_id][-1].end
        assert turn.durable
