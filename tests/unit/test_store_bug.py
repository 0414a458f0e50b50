"""A bug that ends the store's thread: all that waits for it is answered, and memory serves on."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engines import fake_engine, ids, run
from keepwarm import AgentCacheStore, BlockPoolBatchEngine
from keepwarm.core.errors import BundleFailed
from keepwarm.core.stored import KVFamily, Record, Saved
from keepwarm.store.agent_cache_store import StoreConfig
from keepwarm.store.catalog.catalog import Catalog
from keepwarm.store.catalog.reader import CatalogReader
from keepwarm.store.disk.files import RecordFiles
from keepwarm.store.disk.io_thread import Priority
from keepwarm.testing.generator import FAKE_LAYOUT
from stores import hear

FAMILY = KVFamily("bug", FAKE_LAYOUT)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[AgentCacheStore]:
    with AgentCacheStore(tmp_path / "home", config=StoreConfig(free_floor_bytes=0)) as store:
        yield store


@pytest.fixture
def engine(store: AgentCacheStore) -> BlockPoolBatchEngine:
    engine = fake_engine(store=store)
    run(engine, agent_id="ada", token_ids=ids(300), max_tokens=2)
    assert engine.close()
    return engine


def broken(*_: object) -> None:
    raise ZeroDivisionError


def test_what_waits_is_answered(
    engine: BlockPoolBatchEngine,
    store: AgentCacheStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state = store.load_agent("ada")
    assert state is not None
    path = tmp_path / "bundle"
    written = store.write_bundle(FAMILY, state.lines[0].tokenizer, state, path)
    hear(store, lambda: written.answer)

    go = threading.Event()
    store._thread.post(Priority.COMMIT, lambda: go.wait(30))
    monkeypatch.setattr(RecordFiles, "publish", broken)
    heard: dict[str, Any] = {}

    def note(what: str) -> Any:
        return lambda answer: heard.update({what: answer})

    token_ids = ids(256, 7)
    record = Record.of_run(FAMILY.root, 0, token_ids)
    data = memoryview(bytes(store.record_bytes(FAMILY, 256)))
    pieces = [data[: t.nbytes] for t in FAMILY.layout.tensors(256)]
    store.save(FAMILY, record, token_ids, pieces, "ada", note("save"))
    store.fetch(FAMILY, record, bytearray(store.record_bytes(FAMILY, 256)), note("fetch"))
    ticket = store.write_bundle(FAMILY, "fake", state, path.with_name("never"))
    store._thread.post(Priority.SAVE, broken)
    go.set()
    hear(store, lambda: ticket.answer)
    store.commit(state, note("commit"))
    store.delete_agent("ada", note("delete"))
    hear(store, lambda: len(heard) == 4)

    assert heard == {"save": Saved.GIVEN_UP, "fetch": None, "commit": False, "delete": False}
    assert isinstance(ticket.answer.error, BundleFailed)
    assert "has died" in str(store.health().fault)
    assert not store.accepts(1)
    assert store.plan(FAMILY, FAMILY.root, token_ids) == []
    store.check()


def test_requests_are_answered_from_memory(
    engine: BlockPoolBatchEngine, store: AgentCacheStore
) -> None:
    store._thread.post(Priority.SAVE, broken)
    hear(store, lambda: store.health().fault)
    turn = run(engine, agent_id="ada", token_ids=[*ids(300), 1], max_tokens=2)
    assert not turn.durable
    assert turn.cache.cached_tokens
    assert not engine.flush(0.1)
    engine.check()


def test_the_home_is_given_back(tmp_path: Path) -> None:
    store = AgentCacheStore(tmp_path / "home")
    store._thread.post(Priority.SAVE, broken)
    hear(store, lambda: store.health().fault)
    store.close()
    AgentCacheStore(tmp_path / "home").close()


def test_the_home_is_given_back_where_the_catalogue_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_descriptors(_: Path) -> None:
        raise OSError("too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(CatalogReader, "open", no_descriptors)
        with pytest.raises(OSError, match="too many"):
            AgentCacheStore(tmp_path / "home")
    AgentCacheStore(tmp_path / "home").close()


def test_a_disk_that_does_not_say_its_sizes_takes_what_it_takes(
    engine: BlockPoolBatchEngine, store: AgentCacheStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A figure that cannot be read ends no thread, and leaves nothing without an answer."""

    def unreadable(_: Catalog) -> int:
        raise OSError("input/output error")

    monkeypatch.setattr(Catalog, "size_bytes", property(unreadable))
    run(engine, agent_id="ada", token_ids=[*ids(300), 1], max_tokens=2)
    assert engine.flush(1.0) in (True, False)
    assert store._thread.failure is None
