"""Exports and imports between the engine's steps: beside requests, called off, or cut short."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from engines import (
    TOKENIZER,
    assistant,
    completed,
    drain,
    fake_engine,
    fresh_reply,
    ids,
    run,
    settle,
    step,
    user,
)
from keepwarm import AgentCacheStore, BlockPoolBatchEngine
from keepwarm.core.agent import Tier
from keepwarm.core.agent_store import BundleTicket
from keepwarm.core.errors import (
    AgentExists,
    BadBundle,
    BundleFailed,
    EngineStopped,
    UnknownAgent,
)
from keepwarm.engine.agents.transfer import (
    VOUCH_TOKENS,
    ExportSummary,
    ImportSummary,
    private_terms,
    vouched_for,
)
from keepwarm.store.agent_cache_store import StoreConfig
from keepwarm.store.disk.io_thread import Priority
from keepwarm.testing.agent_store import MemoryAgentStore
from stores import HeldAnswers, hear
from waiting import PATIENCE_S, wait_until


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[BlockPoolBatchEngine]:
    with AgentCacheStore(tmp_path / "home", config=StoreConfig(free_floor_bytes=0)) as store:
        yield fake_engine(store=store)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "out" / "ada.keepwarm"


@pytest.fixture(autouse=True)
def _folder(path: Path) -> None:
    path.parent.mkdir()


def export(engine: BlockPoolBatchEngine, path: Path, agent: str = "ada") -> "Future[ExportSummary]":
    answer: Future[ExportSummary] = Future()
    engine.begin_export(agent, path, answer)
    return answer


def import_(
    engine: BlockPoolBatchEngine, path: Path, name: str | None = None
) -> "Future[ImportSummary]":
    answer: Future[ImportSummary] = Future()
    engine.begin_import(path, name, answer)
    return answer


def go_on(engine: BlockPoolBatchEngine, num_steps: int = 1) -> None:
    """Step, with a little time for the store before each step."""
    for _ in range(num_steps):
        engine._store.wait(0.005)
        step(engine)


def finish(engine: BlockPoolBatchEngine, answer: "Future[Any]") -> Any:
    def go_on_if_busy() -> None:
        assert engine.has_chores
        go_on(engine)

    wait_until(answer.done, go_on_if_busy)
    return answer.result()


def store_of(engine: BlockPoolBatchEngine) -> AgentCacheStore:
    store = engine._store
    assert isinstance(store, AgentCacheStore)
    return store


def quieten(engine: BlockPoolBatchEngine) -> None:
    """Until no job is left, and the store has done what it was told before."""
    wait_until(lambda: not engine._jobs and not store_of(engine)._bundles, lambda: go_on(engine))
    settle(engine)
    assert engine.flush()
    for _ in range(4):  # work of many units lets what comes behind it go first
        has_come = threading.Event()
        store_of(engine)._thread.post(Priority.SAVE, has_come.set)
        assert has_come.wait(PATIENCE_S)


def said_by(engine: BlockPoolBatchEngine, agent: str = "ada") -> list[Any]:
    return [turn.messages for turn in engine.turns(agent)]


class TestInTheMiddle:
    """People export an agent when it works."""

    @pytest.mark.parametrize("num_tokens", [5, 255, 256, 300, 700])
    def test_a_reply_goes_on_and_the_file_ends_with_the_last_turn(
        self, engine: BlockPoolBatchEngine, path: Path, tmp_path: Path, num_tokens: int
    ) -> None:
        first = run(engine, agent_id="ada", token_ids=ids(num_tokens), max_tokens=4)
        known = [*ids(num_tokens), *first.token_ids]
        prompt = [*known, *ids(300, 1)]
        request = engine.submit(agent_id="ada", token_ids=prompt, max_tokens=600)
        while engine._turns.active[request].sequence.num_reply_tokens < 20:
            step(engine)
        summary = finish(engine, export(engine, path))
        assert request in engine._turns.active
        assert engine.agent("ada").in_use
        reply = completed(drain(engine), request)
        assert reply.token_ids == fresh_reply(prompt, max_tokens=600)
        assert (summary.num_tokens, summary.num_left_out) == (len(known), 0)
        with AgentCacheStore(tmp_path / "other") as store:
            other = fake_engine(store=store)
            assert other.import_agent(path).num_turns == 1
            turn = run(other, agent_id="ada", token_ids=prompt, max_tokens=5)
            assert turn.cache.cached_tokens == len(known)
            assert turn.cache.tier is Tier.COLD
            assert turn.token_ids == reply.token_ids[:5]

    def test_the_first_reply_is_not_there_yet(
        self, engine: BlockPoolBatchEngine, path: Path
    ) -> None:
        engine.submit(agent_id="ada", messages=[user("Hello")], max_tokens=200)
        step(engine, 20)
        finish(engine, export(engine, path))
        drain(engine)
        assert len(said_by(engine)) == 1
        assert finish(engine, import_(engine, path, "eve")).num_turns == 0

    def test_what_changes_meanwhile_is_not_in_the_file(
        self, engine: BlockPoolBatchEngine, path: Path
    ) -> None:
        engine.create("ada")
        for text in ("One", "Two"):
            run(engine, agent_id="ada", append=[user(text)], max_tokens=5)
        said = said_by(engine)
        answer = export(engine, path)
        engine.rollback("ada", turn=1)
        run(engine, agent_id="ada", append=[user("Another")], max_tokens=5)
        finish(engine, answer)
        finish(engine, import_(engine, path, "eve"))
        assert said_by(engine, "eve") == said

    def test_a_prefetch_is_no_obstacle(self, engine: BlockPoolBatchEngine, path: Path) -> None:
        run(engine, agent_id="ada", token_ids=ids(1000), max_tokens=3)
        engine.park("ada")
        settle(engine)
        engine.prefetch("ada")
        assert finish(engine, export(engine, path)).num_left_out == 0
        drain(engine)

    def test_an_unknown_agent_is_still_refused(
        self, engine: BlockPoolBatchEngine, path: Path
    ) -> None:
        with pytest.raises(UnknownAgent):
            export(engine, path, "nobody").result(0)

    def test_what_has_no_room_to_be_copied_is_left_out(self, path: Path, tmp_path: Path) -> None:
        """Memory is full of slabs that run: their last, unfinished blocks cannot be copied."""
        config = StoreConfig(free_floor_bytes=0)
        with AgentCacheStore(tmp_path / "tight", config=config) as store:
            engine = fake_engine(store=store, num_blocks=3, reserve_reply_tokens=1)
            first = run(engine, agent_id="ada", token_ids=ids(100), max_tokens=4)
            known = [*ids(100), *first.token_ids]
            settle(engine)
            request = engine.submit(agent_id="ada", token_ids=[*known, 1], max_tokens=650)
            while engine._turns.active[request].sequence.num_reply_tokens < 500:
                step(engine)
            answer: Future[ExportSummary] = Future()
            engine.begin_export("ada", path, answer, timeout_s=0.2)
            summary = finish(engine, answer)
            assert summary.num_tokens + summary.num_left_out >= len(known) - 1
            drain(engine)


class Holding(MemoryAgentStore):
    """Answers for bundles when it is told to, and for everything else at once."""

    def __init__(self) -> None:
        super().__init__()
        self.bundles = HeldAnswers(are_held=True)

    def _answered(self, answer: Any, undo: Any = lambda: None) -> BundleTicket[Any]:
        ticket: BundleTicket[Any] = BundleTicket(undo)
        self._answers.add(self.bundles.through(ticket.put), answer)
        return ticket

    def poll(self) -> None:
        super().poll()
        self.bundles.deliver()


class TestBeside:
    """The engine does not wait: it serves on while the store is at work."""

    def test_requests_begin_and_end_while_an_export_and_an_import_are_under_way(
        self, path: Path
    ) -> None:
        store = Holding()
        engine = fake_engine(store=store)
        run(engine, agent_id="ada", messages=[user("Hello")], max_tokens=5)
        store.bundles.are_held = False
        finish(engine, export(engine, path))
        store.bundles.are_held = True
        answers: list[Future[Any]] = [
            export(engine, path.with_name("2")),
            import_(engine, path, "eve"),
        ]
        for number in range(5):
            turn = run(engine, agent_id=f"other-{number}", token_ids=ids(300, number), max_tokens=9)
            assert turn.durable
        assert run(engine, agent_id="ada", append=[user("And?")], max_tokens=5).turn == 2
        assert not any(answer.done() for answer in answers)
        assert engine.has_chores
        store.bundles.are_held = False
        for answer in answers:
            finish(engine, answer)
        assert len(said_by(engine, "eve")) == 1
        assert not engine.has_chores

    def test_a_name_that_is_taken_meanwhile(self, engine: BlockPoolBatchEngine, path: Path) -> None:
        run(engine, agent_id="ada", token_ids=ids(600), max_tokens=5)
        finish(engine, export(engine, path))
        num_records = engine.snapshot().store.num_records
        answer = import_(engine, path, "eve")
        second = import_(engine, path, "eve")
        assert not answer.done()
        engine.create("eve")
        for refused in (answer, second):
            with pytest.raises(AgentExists):
                finish(engine, refused)
        quieten(engine)
        assert engine.turns("eve") == ()
        assert engine.snapshot().store.num_records == num_records

    def test_two_imports_under_one_name(self, engine: BlockPoolBatchEngine, path: Path) -> None:
        run(engine, agent_id="ada", token_ids=ids(600), max_tokens=5)
        finish(engine, export(engine, path))
        answers = [import_(engine, path, "eve") for _ in range(3)]
        ended: list[Any] = []
        for answer in answers:
            try:
                ended.append(finish(engine, answer))
            except AgentExists as error:
                ended.append(error)
        assert sum(isinstance(end, ImportSummary) for end in ended) == 1
        quieten(engine)
        assert engine.snapshot().store.num_records == 6
        assert len(engine.turns("eve")) == 1

    def test_what_is_being_exported_is_not_evicted(self, path: Path, tmp_path: Path) -> None:
        """A file begun anew for each record that went would never end on a busy disk."""
        config = StoreConfig(disk_budget_bytes=8 << 20, free_floor_bytes=0)
        with AgentCacheStore(tmp_path / "tight", config=config) as store:
            engine = fake_engine(store=store)
            run(engine, agent_id="ada", token_ids=ids(600), max_tokens=5)
            settle(engine)
            answer = export(engine, path)
            while not store._bundles.num_reads:
                step(engine)
            victims = store._index.choose_victims(1 << 40)
            assert victims == []
            finish(engine, answer)
            assert store._bundles.num_reads == 0
            assert len(store._index.choose_victims(1 << 40)) == 3


class TestCalledOff:
    """Whenever the client goes, nothing half is left: a file or none, an agent or none."""

    @pytest.mark.parametrize("num_steps", range(9))
    def test_an_export(self, engine: BlockPoolBatchEngine, path: Path, num_steps: int) -> None:
        run(engine, agent_id="ada", token_ids=ids(900), max_tokens=5)
        answer = export(engine, path)
        go_on(engine, num_steps)
        is_called_off = answer.cancel()
        quieten(engine)
        assert list(path.parent.iterdir()) == ([] if is_called_off else [path])
        assert store_of(engine)._bundles.num_reads == 0
        assert run(engine, agent_id="ada", token_ids=ids(900), max_tokens=5).cache.cached_tokens

    @pytest.mark.parametrize("num_steps", range(12))
    def test_an_import(self, engine: BlockPoolBatchEngine, path: Path, num_steps: int) -> None:
        run(engine, agent_id="ada", token_ids=ids(900), max_tokens=5)
        settle(engine)
        finish(engine, export(engine, path))
        quieten(engine)
        num_records = engine.snapshot().store.num_records
        answer = import_(engine, path, "eve")
        go_on(engine, num_steps)
        answer.cancel()
        quieten(engine)
        is_there = engine.knows("eve")
        expected = 2 * num_records if is_there else num_records
        assert engine.snapshot().store.num_records == expected
        if not is_there:
            assert finish(engine, import_(engine, path, "eve")).num_records == num_records
        assert run(engine, agent_id="eve", token_ids=ids(900), max_tokens=5).cache.cached_tokens

    def test_what_had_just_ended(self, engine: BlockPoolBatchEngine, path: Path) -> None:
        """The store has answered, and the engine has not looked yet."""
        run(engine, agent_id="ada", token_ids=ids(300), max_tokens=5)
        settle(engine)
        answer = export(engine, path)
        wait_until(lambda: store_of(engine)._bundles, lambda: step(engine))
        wait_until(lambda: not store_of(engine)._bundles, engine._commits.hear)
        assert path.exists()
        assert answer.cancel()
        quieten(engine)
        assert not path.exists()


class TestTheEnd:
    @pytest.mark.parametrize("end", ["close", "abandon"])
    def test_who_waits_is_told(self, engine: BlockPoolBatchEngine, path: Path, end: str) -> None:
        run(engine, agent_id="ada", token_ids=ids(900), max_tokens=5)
        answer = export(engine, path)
        stop: dict[str, Callable[[], object]] = {
            "close": engine.close,
            "abandon": lambda: engine.abandon(EngineStopped()),
        }
        stop[end]()
        with pytest.raises(EngineStopped):
            answer.result(0)
        quieten(engine)
        assert not list(path.parent.iterdir())

    def test_a_store_that_closes_leaves_nothing_half(self, path: Path, tmp_path: Path) -> None:
        with AgentCacheStore(tmp_path / "closing") as store:
            engine = fake_engine(store=store)
            run(engine, agent_id="ada", token_ids=ids(900), max_tokens=5)
            answer = export(engine, path)
            wait_until(lambda: store._bundles, lambda: step(engine))
        assert list(path.parent.iterdir()) in ([], [path])
        assert not answer.done()

    def test_errors_are_for_who_asked(self, engine: BlockPoolBatchEngine, path: Path) -> None:
        path.write_bytes(b"no bundle")
        answers = [import_(engine, path), export(engine, path.parent / "no" / "folder")]
        for answer, kind in zip(answers, (BadBundle, UnknownAgent), strict=True):
            with pytest.raises(kind):
                finish(engine, answer)
        run(engine, agent_id="ada", token_ids=ids(9), max_tokens=2)
        with pytest.raises(BundleFailed):
            finish(engine, export(engine, path.parent / "no" / "folder"))


def test_what_a_file_says_is_looked_at_a_part_at_a_time(
    engine: BlockPoolBatchEngine, path: Path
) -> None:
    """On the engine's thread, whose steps it shares with everybody's replies."""
    for number in range(6):
        messages = [user("x" * 700), assistant("y" * 700)] * number
        run(engine, agent_id="ada", messages=[*messages, user("x" * 700)], max_tokens=5)
    finish(engine, export(engine, path))
    store, family, tokenizer = engine._store, engine.tiers.family_of(""), TOKENIZER
    ticket = store.read_bundle(
        path, private_terms(family, tokenizer.fingerprint, tokenizer.vocab_size)
    )
    hear(store, lambda: ticket.answer)
    bundle = ticket.answer.bundle
    num_steps = sum(1 for _ in vouched_for(bundle, tokenizer))
    num_tokens = bundle.state.lines[0].transcript.num_tokens
    assert num_tokens > 4 * VOUCH_TOKENS
    assert num_steps >= num_tokens // (2 * VOUCH_TOKENS)
