"""The fleet: one engine for each model that was loaded, over one store and one memory budget."""

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from keepwarm.core.agent import home_namespace
from keepwarm.core.agent_store import AgentStore, NoStore
from keepwarm.core.errors import (
    AgentBusy,
    DamagedAgent,
    InvariantBroken,
    OtherWeights,
    PoolExhausted,
    UnknownModel,
)
from keepwarm.core.events import Event
from keepwarm.core.pool import BlockPool
from keepwarm.core.ports import LoadedModel
from keepwarm.engine.agents.agent_view import AgentView, view_of, view_of_summary
from keepwarm.engine.agents.book import AgentBook
from keepwarm.engine.agents.commits import REFUSED_S, STORE_WAIT_S, Commit
from keepwarm.engine.agents.transfer import ExportSummary, ImportSummary
from keepwarm.engine.batch_engine import BlockPoolBatchEngine
from keepwarm.engine.requests import GenerateRequest
from keepwarm.engine.snapshot import EngineSnapshot, merged
from keepwarm.engine.turn.intake import Reading
from keepwarm.fleet.idle_builder import IdleBuilder

NewEngine = Callable[
    [LoadedModel, BlockPool, AgentStore, AgentBook, Iterator[int]], BlockPoolBatchEngine
]
"""Makes an engine of a model, its pool, the store, the book and request numbers."""


@dataclass(slots=True)
class Weights:
    """What is in the device's memory, by model. It outlives a fleet that broke."""

    loaded: dict[str, LoadedModel] = field(default_factory=dict)


class Fleet:
    """Owns the engines. No lock: one thread, the engines' own.

    An engine stays when its model goes: suspended, it keeps its agents and whatever waits. They
    share one book of agents: an agent is at the engine that it talks to, or talked to last, and has
    KV in the memory of others. `builds_when_idle`: KV of what an agent has said elsewhere is
    computed while nothing is asked.
    """

    def __init__(
        self,
        new_engine: NewEngine,
        *,
        default: str,
        store: AgentStore | None = None,
        budget_bytes: int,
        weights: Weights | None = None,
        book: AgentBook | None = None,
        builds_when_idle: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.store = store or NoStore()
        self.book = book or AgentBook(self.store)
        self._new_engine = new_engine
        self._default = default
        self._budget_bytes = budget_bytes
        self._engines: dict[str, BlockPoolBatchEngine] = {}
        self._replaced: list[BlockPoolBatchEngine] = []
        self._ids = itertools.count(1)
        self._events: list[Event] = []
        self._builder = IdleBuilder(self._engines, self.book, clock=clock)
        self._builds_when_idle = builds_when_idle
        self._weights = weights or Weights()
        for loaded in list(self._weights.loaded.values()):
            self.attach(loaded)

    @classmethod
    def of_one(cls, engine: BlockPoolBatchEngine) -> "Fleet":
        """Make a fleet of an engine that is there already, with its store and its book."""

        def no_other(*_: object) -> BlockPoolBatchEngine:
            raise InvariantBroken("this fleet has one engine")

        budget_bytes = engine.tiers.pool.budget_bytes
        fleet = cls(no_other, default=engine.model, budget_bytes=budget_bytes, book=engine.book)
        fleet._engines[engine.model] = engine
        return fleet

    def __repr__(self) -> str:
        return f"Fleet({self._engines})"

    # -- models ----------------------------------------------------------------------------------

    def attach(self, loaded: LoadedModel) -> None:
        """Let the model compute from now on; what waited for it goes on.

        With other weights than before it is another model: its agents keep what was said, and what
        ran on the old ones fails with OtherWeights.
        """
        self._builder.stop()
        name = loaded.name
        old = self._engines.get(name)
        if old is not None and old.fingerprint == loaded.fingerprint:
            old.resume(loaded)
        else:
            if old is not None:
                self._events += old.abandon(OtherWeights(name))
                self._replaced.append(old)  # its agents' changes may not be on the disk yet
            pool = BlockPool(self._budget_bytes, _Others(self._engines, name))
            new = self._new_engine(loaded, pool, self.store, self.book, self._ids)
            self._engines[name] = new
        self._weights.loaded[name] = loaded

    def detach(self, name: str, timeout_s: float = 60.0) -> bool:
        """Let the model's weights go; its agents' KV goes to the disk, as far as that takes it.

        Returns whether it took everything. What the model was answering waits for its return.
        """
        self._builder.stop()
        is_saved = self.engine(name).suspend(timeout_s)
        close = self._weights.loaded.pop(name).close
        close()  # nothing holds the weights now, so their memory is given back
        return is_saved

    def is_attached(self, name: str) -> bool:
        return name in self._weights.loaded

    def has_engine(self, name: str) -> bool:
        """Whether the model was ever loaded."""
        return name in self._engines

    def engine(self, name: str) -> BlockPoolBatchEngine:
        """Return the model's engine. Raises UnknownModel."""
        if name not in self._engines:
            raise UnknownModel(name, tuple(self._engines))
        return self._engines[name]

    def bring(self, agent_id: str, name: str) -> BlockPoolBatchEngine:
        """Return the engine of this model, or for an empty name of the one that the agent talked to
        last.

        Raises UnknownModel, and AgentBusy while the agent talks to another.
        """
        self._builder.stop()
        engine = self.engine(name or self.model_of(agent_id))
        if self._talks_elsewhere(agent_id, engine):
            raise AgentBusy(agent_id, "move it to another model")
        return engine

    # -- requests --------------------------------------------------------------------------------

    def submit(self, request: GenerateRequest, reading: Reading | None = None) -> str:
        """Submit the request to its model's engine, and bring its agent there.

        While an agent talks to one model, what is asked in its name of another is answered without
        touching it.
        """
        self._builder.stop()
        agent_id = request.agent_id
        engine = self.engine(request.model or self.model_of(agent_id))
        arguments = {**request.arguments(), "reading": reading}
        if agent_id is not None and self._talks_elsewhere(agent_id, engine):
            if request.append is not None:
                raise AgentBusy(agent_id, "send it another message")
            namespace = home_namespace(agent_id)
            return engine.submit(**{**arguments, "agent_id": None, "namespace": namespace})
        return engine.submit(**arguments)

    def check_length(self, request: GenerateRequest, reading: Reading | None = None) -> None:
        """Check the length by what is known of the agent at its model; nothing moves.

        Of a model that was never loaded nothing is known.
        """
        agent_id = request.agent_id
        name = request.model or self.model_of(agent_id)
        if name not in self._engines:
            return
        engine = self._engines[name]
        agent = self.book.here(agent_id)
        if agent_id is not None and (agent is None or agent.place is not engine.place):
            if request.append is not None:
                return
            namespace = home_namespace(agent_id)
            request = replace(request, agent_id=None, namespace=namespace)
        engine.intake.check_length(request, reading)

    def cancel(self, request_id: str) -> bool:
        """End a request now. False when it had ended."""
        return any(engine.cancel(request_id) for engine in self._engines.values())

    @property
    def has_work(self) -> bool:
        engines = (*self._engines.values(), *self._replaced)
        return bool(self._events) or any(engine.has_work for engine in engines)

    @property
    def has_chores(self) -> bool:
        return any(engine.has_chores for engine in self._engines.values())

    def step(self) -> list[Event]:
        """Step every engine that has something to do, or compute some KV in advance."""
        if self._builds_when_idle and not self.has_work:
            self._builder.look()
        busy = [engine for engine in self._engines.values() if engine.has_work]
        if len(busy) > 1 and all(engine.is_stalled for engine in busy):
            self.store.wait(STORE_WAIT_S)
        for engine in self._engines.values():
            self._events += engine.step(may_wait=busy == [engine])
        self._replaced = [engine for engine in self._replaced if not engine.is_settled]
        for engine in self._replaced:
            if engine.has_work:
                self._events += engine.step(may_wait=False)
        events, self._events = self._events, []
        return events

    # -- agents ----------------------------------------------------------------------------------

    def model_of(self, agent_id: str | None) -> str:
        """Return the name of the model that the agent talks to, or talked to last, or the default
        one.

        It may be one that was not loaded since the agent's last run. Raises DamagedAgent.
        """
        if agent_id is None or not self._engines:
            return self._default
        agent = self.book.find(agent_id)
        if agent is not None and agent.in_use:
            return agent.place.model
        return self._default if agent is None else agent.model or self._default

    def of(self, agent_id: str) -> BlockPoolBatchEngine:
        """Return the agent's engine; the default one for an unknown or damaged agent.

        Raises UnknownModel where there is no engine: an agent is read for a model.
        """
        agent = None
        if self._engines:
            with suppress(DamagedAgent):
                agent = self.book.find(agent_id)
        return self._default_engine if agent is None else self._engines[agent.place.model]

    def agents(self) -> tuple[AgentView, ...]:
        """Return all agents, those that are only on the disk as well."""
        there = (s for s in self.store.summaries() if self.book.here(s.agent_id) is None)
        return (*map(view_of, self.book), *map(view_of_summary, there))

    def is_damaged(self, agent_id: str) -> bool:
        """Whether the agent is listed as damaged."""
        return any(s.agent_id == agent_id and s.damage for s in self.store.summaries())

    def fork(self, agent_id: str, new_id: str, *, at_turn: int | None = None) -> Commit:
        """Fork the agent at its engine."""
        return self.of(agent_id).fork(agent_id, new_id, at_turn=at_turn)

    def begin_export(self, agent_id: str, path: Path, answer: "Future[ExportSummary]") -> None:
        """Begin to export the agent at its engine."""
        self.of(agent_id).begin_export(agent_id, path, answer)

    def begin_import(
        self,
        path: Path,
        agent_id: str | None,
        answer: "Future[ImportSummary]",
        *,
        namespace: str = "",
    ) -> None:
        """Begin to import an agent at the default model's engine."""
        self.engine(self._default).begin_import(path, agent_id, answer, namespace=namespace)

    def counted(self, views: Sequence[AgentView]) -> list[AgentView]:
        """Fill in how many tokens the disk holds of agents that are only there."""
        return [
            view if view.is_here else view.holding(self.store.num_stored(view.agent_id))
            for view in views
        ]

    def count_agents(self, counts: Callable[[str], bool]) -> Counter[str]:
        """Return how many of the agents that count talked to each model last."""
        model_of = self.store.models() | {agent.agent_id: agent.model for agent in self.book}
        ids = filter(counts, model_of)
        return Counter(model_of[agent_id] or self._default for agent_id in ids)

    def abandon(self, name: str, error: Exception) -> None:
        """Fail what waits for the model, which does not come back."""
        if name in self._engines:
            self._events += self._engines[name].abandon(error)

    def delete(self, agent_id: str) -> Commit:
        """Delete the agent from the memory of all engines. Raises UnknownAgent, AgentBusy."""
        self._builder.stop()
        commit = self.of(agent_id).delete(agent_id)
        commit.then(lambda is_done: self._builder.forget(agent_id) if is_done else None)
        return commit

    # -- the whole -------------------------------------------------------------------------------

    def snapshot(self) -> EngineSnapshot:
        """Return a snapshot of all engines together, and of their one store."""
        return merged(
            [engine.snapshot() for engine in self._engines.values()],
            self.store.health(),
            budget_bytes=self._budget_bytes,
        )

    @property
    def fault(self) -> str | None:
        """What the disk refuses now."""
        return self.store.health().fault

    @property
    def troubles(self) -> tuple[str, ...]:
        """What is wrong now, for people; empty when all is well."""
        health = self.store.health()
        faults = () if health.fault is None else (f"the disk refuses: {health.fault}",)
        return (*faults, *health.notices)

    def close(self, timeout_s: float = 60.0) -> bool:
        """Save every line's KV to its last token; the store stays open. As the engine's own."""
        self._builder.stop()
        is_saved = True
        for engine in self._replaced:
            is_saved &= engine.flush(timeout_s)
        for engine in self._engines.values():
            # A disk that has refused one engine's KV to the end is not waited for again.
            is_refused = not is_saved and self.fault is not None
            is_saved &= engine.close(REFUSED_S / 10 if is_refused else timeout_s)
        return is_saved

    def release(self) -> None:
        """Close all models: the end, after `close`."""
        for loaded in self._weights.loaded.values():
            loaded.close()
        self._weights.loaded.clear()

    def check(self) -> None:
        """Raise InvariantBroken when any of the bookkeeping contradicts itself."""
        for name, engine in self._engines.items():
            engine.check()
            if engine.is_suspended == self.is_attached(name):
                raise InvariantBroken(f"{name}: suspended and attached, or neither")
        self.book.check()

    # -- inside ----------------------------------------------------------------------------------

    def _talks_elsewhere(self, agent_id: str, engine: BlockPoolBatchEngine) -> bool:
        """Whether the agent is in the middle of a request to another model."""
        agent = self.book.here(agent_id)
        return agent is not None and agent.in_use and agent.place is not engine.place

    @property
    def _default_engine(self) -> BlockPoolBatchEngine:
        """The default model's; after a bug there may be none, and then any is as good.

        Raises UnknownModel where there is no engine at all.
        """
        return self._engines.get(self._default) or self.engine(next(iter(self._engines), ""))


class _Others:
    """Implements `Neighbours` with the engines of all models but one."""

    def __init__(self, engines: dict[str, BlockPoolBatchEngine], name: str) -> None:
        self._engines = engines
        self._name = name

    def used_bytes(self) -> int:
        return sum(engine.tiers.pool.used_bytes for engine in self._others())

    def make_room(self, needed_bytes: int) -> None:
        """Ask each engine in turn for memory; none of them asks others."""
        for engine in self._others():
            engine.background.make_way()
            with suppress(PoolExhausted):
                engine.tiers.make_room(needed_bytes, ask_others=False)

    def will_free(self) -> bool:
        return any(engine.batch.will_free for engine in self._others())

    def _others(self) -> Iterator[BlockPoolBatchEngine]:
        return (engine for name, engine in self._engines.items() if name != self._name)
