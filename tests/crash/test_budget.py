"""Budgets under ten times as much: of the disk at every moment, of memory, and of one agent."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.chaos.world import FAKE, load_world, new_engine
from engines import ids, settle
from keepwarm import AgentCacheStore, BlockPoolBatchEngine
from keepwarm.core.events import Completed, Failed
from keepwarm.store.agent_cache_store import StoreConfig
from keepwarm.store.catalog.catalog import Catalog
from keepwarm.store.disk import files as record_files
from stores import disk_bytes

BUDGET_BYTES = 8 << 20
RAM_BLOCKS = 24
QUOTA_BYTES = 500_000


class Scales:
    """Weighs the folder whenever the store's thread may just have made it heavier.

    In that thread, so that nothing is moved or removed while it is weighed.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.most_bytes = 0
        self.num_weighings = 0
        self._watch(monkeypatch, record_files, "_write_all")
        for name in ("commit", "add_records", "remove_records", "delete_agent"):
            self._watch(monkeypatch, Catalog, name)
        self._watch(monkeypatch, Catalog, "_empty_log", before=True)

    def weigh(self) -> None:
        self.num_weighings += 1
        self.most_bytes = max(self.most_bytes, disk_bytes(self.folder))

    def _watch(
        self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, *, before: bool = False
    ) -> None:
        original = getattr(owner, name)

        def watched(*args: Any, **more: Any) -> Any:
            if before:
                self.weigh()
            result = original(*args, **more)
            self.weigh()
            return result

        monkeypatch.setattr(owner, name, watched)


@pytest.fixture
def scales(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scales]:
    scales = Scales(tmp_path, monkeypatch)
    yield scales
    assert scales.num_weighings > 10
    assert scales.most_bytes <= BUDGET_BYTES


def open_small(folder: Path) -> AgentCacheStore:
    config = StoreConfig(disk_budget_bytes=BUDGET_BYTES, free_floor_bytes=0)
    return AgentCacheStore(folder, config=config)


def say(engine: BlockPoolBatchEngine, agent_id: str | None, token_ids: list[int]) -> Completed:
    request_id = engine.submit(agent_id=agent_id, token_ids=token_ids, max_tokens=2)
    ended: list[Completed] = []
    while not ended:
        for event in engine.step():
            assert not isinstance(event, Failed), event
            if isinstance(event, Completed) and event.request_id == request_id:
                ended.append(event)
        assert engine.tiers.pool.snapshot().used_bytes <= engine.tiers.pool.budget_bytes
    return ended[0]


@pytest.mark.slow
def test_a_load_of_ten_times_the_budget(tmp_path: Path, scales: Scales) -> None:
    """Agents come, talk, fork and go; a pinned one and its records stay."""
    num_written = 0
    with open_small(tmp_path) as store:
        engine = new_engine(load_world(FAKE), store, RAM_BLOCKS)
        pinned = ids(2000, 999)
        say(engine, "pinned", pinned)
        engine.pin("pinned")
        settle(engine)
        for number in range(136):
            name = f"agent-{number}"
            turn = say(engine, name, ids(2200, number))
            assert turn.durable, (number, store.health())
            if number % 7 == 0:
                engine.fork(name, f"fork-{number}")
                say(engine, f"fork-{number}", ids(2300, number))
            if number % 5 == 0 and number:
                engine.delete(f"agent-{number - 1}")
            settle(engine)
            assert store.health().num_faults == 0, (number, store.health())
        engine.check()
        num_written = store.health().written_bytes
        engine.park("pinned")
        settle(engine)
    assert num_written >= 10 * BUDGET_BYTES
    with open_small(tmp_path) as store:
        engine = new_engine(load_world(FAKE), store, RAM_BLOCKS)
        assert say(engine, "pinned", [*pinned, 1, 2]).cache.cached_tokens >= 2000
        assert engine.agent("pinned").pinned
        engine.check()


def test_one_agents_quota(tmp_path: Path, scales: Scales) -> None:
    """An agent with little room keeps to it; the agents beside it lose nothing by that."""
    with open_small(tmp_path) as store:
        engine = new_engine(load_world(FAKE), store, RAM_BLOCKS)
        say(engine, "limited", ids(300))
        engine.configure("limited", quota_bytes=QUOTA_BYTES)
        others = {f"other-{number}": ids(1000, number) for number in range(3)}
        for name, prompt in others.items():
            say(engine, name, prompt)
        for number in range(12):
            say(engine, "limited", ids(1500, 100 + number))
            settle(engine)
            assert store._index.bytes_of("limited") <= QUOTA_BYTES
        engine.check()
        assert store.health().num_faults == 0
    with open_small(tmp_path) as store:
        engine = new_engine(load_world(FAKE), store, RAM_BLOCKS)
        for name, prompt in others.items():
            assert say(engine, name, [*prompt, 3]).cache.cached_tokens >= 768
        assert store._index.bytes_of("limited") <= QUOTA_BYTES


def test_where_everything_is_pinned_serving_goes_on(tmp_path: Path, scales: Scales) -> None:
    """What does not fit is not written, and nobody waits for it."""
    with open_small(tmp_path) as store:
        engine = new_engine(load_world(FAKE), store, 10 * RAM_BLOCKS)
        for number in range(30):
            name = f"agent-{number}"
            assert say(engine, name, ids(1200, number)).durable
            engine.configure(name, pinned=True)
            engine.park(name)
            for _ in range(200):
                if not store.health().num_queued:
                    break
                store.wait(0.05)
                engine.step()
        assert store.health().record_bytes <= BUDGET_BYTES
        engine.check()


def test_a_budget_that_was_made_smaller_is_kept_as_soon_as_something_is_written(
    tmp_path: Path,
) -> None:
    with AgentCacheStore(
        tmp_path, config=StoreConfig(disk_budget_bytes=3 * BUDGET_BYTES, free_floor_bytes=0)
    ) as store:
        engine = new_engine(load_world(FAKE), store, RAM_BLOCKS)
        for number in range(40):
            say(engine, None, ids(1500, number))
            settle(engine)
    assert disk_bytes(tmp_path) > BUDGET_BYTES
    with open_small(tmp_path) as store:
        engine = new_engine(load_world(FAKE), store, RAM_BLOCKS)
        say(engine, "ada", ids(1500, 1000))
        settle(engine)
        while store.health().num_queued:
            store.wait(0.05)
            engine.step()
    assert disk_bytes(tmp_path) <= BUDGET_BYTES


def test_damaged_files_that_are_set_aside_count(tmp_path: Path, scales: Scales) -> None:
    with open_small(tmp_path) as store:
        engine = new_engine(load_world(FAKE), store, 4 * RAM_BLOCKS)
        for number in range(30):
            say(engine, f"agent-{number}", ids(1000, number))
            settle(engine)
            for path in (tmp_path / "blocks").glob("*/*.safetensors"):
                if path.stat().st_mtime_ns % 3 == 0:
                    path.write_bytes(path.read_bytes()[:-1] + b"x")
            engine.park(f"agent-{number}")
            settle(engine)
            engine.step()
            say(engine, f"agent-{number}", ids(1010, number))
        settle(engine)
        engine.check()
        assert list((tmp_path / "set-aside").iterdir())
        assert disk_bytes(tmp_path / "set-aside") <= BUDGET_BYTES // 8
