"""What changes of agents return: whether the disk has them, and what stays where it refuses."""

from collections.abc import Iterator
from typing import Any

import pytest

from engines import completed, drain, fake_engine, ids, step, user
from keepwarm import BlockPoolBatchEngine
from keepwarm.core.agent import Tier
from keepwarm.core.errors import AgentBusy, AgentExists, AgentLeaving, UnknownAgent
from keepwarm.core.events import Completed
from keepwarm.testing.agent_store import MemoryAgentStore
from stores import HeldAnswers

PROMPT = ids(600)


class SlowStore(MemoryAgentStore):
    """Answers commits and deletions only when `answers` says so."""

    def __init__(self) -> None:
        super().__init__()
        self._held = HeldAnswers()

    @property
    def answers(self) -> bool:
        return not self._held.are_held

    @answers.setter
    def answers(self, answers: bool) -> None:
        self._held.are_held = not answers

    def commit(self, state: Any, answer: Any) -> None:
        super().commit(state, self._held.through(answer))

    def delete_agent(self, agent_id: str, answer: Any) -> None:
        super().delete_agent(agent_id, self._held.through(answer))

    def poll(self) -> None:
        super().poll()
        self._held.deliver()


@pytest.fixture
def store() -> SlowStore:
    return SlowStore()


@pytest.fixture
def engine(store: SlowStore) -> Iterator[BlockPoolBatchEngine]:
    engine = fake_engine(store=store)
    say(engine, token_ids=PROMPT)
    yield engine
    engine.check()


def say(engine: BlockPoolBatchEngine, agent_id: str = "ada", **request: Any) -> Completed:
    request_id = engine.submit(agent_id=agent_id, max_tokens=4, **request)
    return completed(drain(engine), request_id)


def names(engine: BlockPoolBatchEngine) -> set[str]:
    return {view.agent_id for view in engine.agents()}


CHANGES = {
    "create": lambda engine: engine.create("eve", system="Be brief."),
    "fork": lambda engine: engine.fork("ada", "bob"),
    "rollback": lambda engine: engine.rollback("ada", turn=0),
    "pin": lambda engine: engine.pin("ada"),
    "configure": lambda engine: engine.configure("ada", priority=3),
    "delete": lambda engine: engine.delete("ada"),
}


class TestAnswers:
    @pytest.mark.parametrize("change", CHANGES)
    def test_a_change_is_durable_when_the_disk_has_answered(
        self, engine: BlockPoolBatchEngine, store: SlowStore, change: str
    ) -> None:
        store.answers = False
        heard: list[bool] = []
        commit = CHANGES[change](engine)
        commit.then(heard.append)
        step(engine, 3)
        assert (commit.durable, heard) == (None, [])
        assert engine.has_work
        store.answers = True
        drain(engine)
        assert (commit.durable, heard) == (True, [True])
        commit.then(heard.append)
        assert heard == [True, True]

    @pytest.mark.parametrize("change", CHANGES)
    def test_one_that_the_disk_refuses_says_so(
        self, engine: BlockPoolBatchEngine, store: SlowStore, change: str
    ) -> None:
        store.refuses = True
        commit = CHANGES[change](engine)
        drain(engine)
        assert commit.durable is False
        assert engine.is_durable("ada") == (change in ("create", "fork", "delete"))

    def test_the_same_settings_again_are_not_written_where_the_disk_has_them(
        self, engine: BlockPoolBatchEngine, store: SlowStore
    ) -> None:
        engine.configure("ada", priority=3)
        drain(engine)
        store.refuses = True
        assert engine.configure("ada", priority=3).durable
        assert engine.park("ada").durable
        engine.configure("ada", priority=4)
        drain(engine)
        again = engine.configure("ada", priority=4)
        drain(engine)
        assert again.durable is False
        store.refuses = False
        settled = engine.park("ada")
        drain(engine)
        assert settled.durable
        assert engine.is_durable("ada")

    def test_without_a_store_nothing_is_durable_but_a_deletion(self) -> None:
        engine = fake_engine()
        commit = engine.create("ada")
        drain(engine)
        assert commit.durable is False
        assert engine.delete("ada").durable
        assert names(engine) == set()


class TestDeleting:
    def test_until_the_disk_has_answered_nothing_may_change_it(
        self, engine: BlockPoolBatchEngine, store: SlowStore
    ) -> None:
        store.answers = False
        engine.delete("ada")
        step(engine)
        for action in (
            lambda: engine.submit(agent_id="ada", token_ids=PROMPT),
            lambda: engine.submit(agent_id="ada", append=[user("Hello")]),
            lambda: engine.configure("ada", priority=1),
            lambda: engine.lift_quota("ada"),
            lambda: engine.rollback("ada", turn=0),
            lambda: engine.fork("ada", "bob"),
            lambda: engine.park("ada"),
            lambda: engine.prefetch("ada"),
            lambda: engine.delete("ada"),
        ):
            with pytest.raises(AgentLeaving, match="being deleted"):
                action()
        with pytest.raises(AgentExists):
            engine.create("ada")
        assert issubclass(AgentLeaving, AgentBusy)
        assert engine.agent("ada").num_turns == 1
        store.answers = True
        drain(engine)
        with pytest.raises(UnknownAgent):
            engine.agent("ada")

    def test_a_refused_one_leaves_the_agent_as_it_was_hot_as_it_was(
        self, engine: BlockPoolBatchEngine, store: SlowStore
    ) -> None:
        before, turns, told = engine.agent("ada"), engine.turns("ada"), store.load_agent("ada")
        assert before.tier is Tier.HOT
        store.refuses = True
        gone = engine.delete("ada")
        drain(engine)
        assert gone.durable is False
        assert engine.agent("ada") == before
        assert engine.turns("ada") == turns
        assert store.load_agent("ada") == told
        store.refuses = False
        assert engine.flush()
        assert engine.agent("ada") == before, "a refused deletion is not tried again by itself"
        turn = say(engine, token_ids=[*PROMPT, 1, 2, 3])
        assert turn.cache.tier is Tier.HOT
        assert turn.durable
        assert engine.delete("ada").durable
        assert names(engine) == set()
        assert store.load_agent("ada") is None

    def test_what_was_refused_before_it_is_tried_again_when_it_is_refused_as_well(
        self, engine: BlockPoolBatchEngine, store: SlowStore
    ) -> None:
        store.refuses = True
        say(engine, token_ids=[*PROMPT, 1])
        engine.delete("ada")
        drain(engine)
        store.refuses = False
        assert engine.flush()
        state = store.load_agent("ada")
        assert state is not None
        assert len(state.mains[0].turns) == len(engine.turns("ada"))


def test_a_deletion_that_the_store_does_not_take_leaves_the_agent(
    engine: BlockPoolBatchEngine, store: SlowStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its catalogue could not be read, say."""

    def broken(*_: object) -> None:
        raise OSError("disk I/O error")

    with monkeypatch.context() as patch:
        patch.setattr(store, "delete_agent", broken)
        with pytest.raises(OSError, match="I/O"):
            engine.delete("ada")
    drain(engine)
    assert engine.flush(0.1)
    assert say(engine, token_ids=[*PROMPT, 1]).durable
    commit = engine.delete("ada")
    drain(engine)
    assert commit.durable
