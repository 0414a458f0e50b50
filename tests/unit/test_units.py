"""Bundles on the store's thread: a turn and a restore wait for one record of one at most."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engines import fake_engine, ids, run, settle
from keepwarm import AgentCacheStore, BlockPoolBatchEngine
from keepwarm.core.agent_store import BundleTicket
from keepwarm.core.stored import BundleTerms
from keepwarm.engine.agents.agent_state import state_of
from keepwarm.store.agent_cache_store import StoreConfig
from keepwarm.store.bundle.export import Export, export_agent
from keepwarm.store.catalog.catalog import Catalog
from keepwarm.store.disk import disk_store
from keepwarm.store.disk.files import RecordFiles
from stores import hear
from waiting import PATIENCE_S

NUM_BLOCKS = 12


class Gate:
    """Stops the store's thread where a file is next touched, and notes what is done after that."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_there, self.may_go = threading.Event(), threading.Event()
        self.done: list[str] = []
        for owner, name in (
            (RecordFiles, "read_into"),
            (RecordFiles, "publish"),
            (Catalog, "commit"),
            (disk_store, "decode"),
        ):
            monkeypatch.setattr(owner, name, self._noting(name, getattr(owner, name)))

    def _noting(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*arguments: Any, **more: Any) -> Any:
            self.done.append(name)
            if not self.is_there.is_set():
                self.is_there.set()
                assert self.may_go.wait(PATIENCE_S)
            return function(*arguments, **more)

        return noted


@pytest.fixture
def store(tmp_path: Path) -> Any:
    with AgentCacheStore(tmp_path / "home", config=StoreConfig(free_floor_bytes=0)) as store:
        yield store


@pytest.fixture
def engine(store: AgentCacheStore) -> BlockPoolBatchEngine:
    """With an agent of many records."""
    engine = fake_engine(store=store)
    run(engine, agent_id="ada", token_ids=ids(256 * NUM_BLOCKS), max_tokens=2)
    run(engine, agent_id="eve", token_ids=ids(300, 1), max_tokens=2)
    engine.tiers.saves.offer_tails()
    engine.tiers.save_some()
    settle(engine)
    assert engine.flush()
    return engine


def answer_of(store: AgentCacheStore, ticket: BundleTicket[Any]) -> Any:
    hear(store, lambda: ticket.answer)
    return ticket.answer


def commit_and_fetch(engine: BlockPoolBatchEngine, store: AgentCacheStore) -> None:
    """What somebody waits for: a turn that is committed, and KV that is read."""
    state = state_of(engine.book.get("eve"))
    store.commit(state, lambda durable: None)
    family = engine.tiers.family_of("")
    (record, *_) = store.plan(family, family.root, ids(300, 1))
    buffer = bytearray(store.record_bytes(family, record.num_tokens))
    store.fetch(family, record, buffer, lambda data: None)


def test_a_turn_and_a_restore_wait_for_one_record_of_an_export(
    engine: BlockPoolBatchEngine,
    store: AgentCacheStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gate = Gate(monkeypatch)
    state = state_of(engine.book.get("ada"))
    ticket = store.write_bundle(engine.tiers.family_of(""), "fake", state, tmp_path / "ada")
    assert gate.is_there.wait(PATIENCE_S)
    commit_and_fetch(engine, store)
    gate.may_go.set()
    written = answer_of(store, ticket)
    assert written.num_records >= NUM_BLOCKS
    # The record that was being read, then the turn, then the restore; the others come behind.
    assert gate.done[:3] == ["read_into", "commit", "read_into"]
    assert gate.done.count("read_into") == written.num_records + 1


def test_and_for_one_record_of_an_import(
    engine: BlockPoolBatchEngine,
    store: AgentCacheStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state = state_of(engine.book.get("ada"))
    answer_of(
        store, store.write_bundle(engine.tiers.family_of(""), "fake", state, tmp_path / "ada")
    )
    family = engine.tiers.family_of("")
    terms = BundleTerms(
        type(family)(family.fingerprint, family.layout, family.lineage, "import:1"), "fake", 256
    )
    read = answer_of(store, store.read_bundle(tmp_path / "ada", terms))
    assert read.bundle is not None
    gate = Gate(monkeypatch)
    ticket = store.store_bundle(read.bundle, "bob")
    assert gate.is_there.wait(PATIENCE_S)
    commit_and_fetch(engine, store)
    gate.may_go.set()
    assert answer_of(store, ticket).num_records == len(read.bundle.records)
    assert gate.done[0] == "publish"
    assert gate.done[1:3] == ["commit", "read_into"]


def test_an_export_has_a_unit_for_each_record(
    engine: BlockPoolBatchEngine, store: AgentCacheStore, tmp_path: Path
) -> None:
    """Whatever a unit does, it reads one record at most."""
    state = state_of(engine.book.get("ada"))
    asked: list[str] = []

    class Files:
        size_of = store._disk._files.size_of

        def read_into(self, *arguments: Any) -> Any:
            asked.append("read")
            return store._disk._files.read_into(*arguments)

    family = engine.tiers.family_of("")
    planned = store._index.plan(family.root, state.lines[0].transcript.token_ids)
    records = tuple((entry.record, family) for entry in planned)
    export = Export(family, "fake", state, records)
    files: Any = Files()
    units = export_agent(tmp_path / "ada", export, files, {}, lambda nbytes: None)
    most = 0
    for _ in units:
        most = max(most, len(asked))
        asked.clear()
    assert most <= 1
