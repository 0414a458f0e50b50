"""Fleets of fake models over a real store, and the questions that tests ask of them."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from engines import FakeFactory, fake_loaded
from keepwarm import AgentCacheStore, BlockPool, BlockPoolBatchEngine
from keepwarm.core.agent_store import AgentStore
from keepwarm.core.events import Completed, Event, Failed
from keepwarm.core.policies import EngineConfig
from keepwarm.core.ports import LoadedModel
from keepwarm.engine.agents.book import AgentBook
from keepwarm.engine.agents.transfer import ImportSummary
from keepwarm.engine.requests import GenerateRequest
from keepwarm.fleet.fleet import Fleet
from keepwarm.store.agent_cache_store import StoreConfig
from keepwarm.testing.tokenizer import FakeTokenizer

BUDGET_BYTES = 1 << 22
NAMES = ("small", "other")


@dataclass(frozen=True, slots=True)
class OtherTokenizer(FakeTokenizer):
    """Spells every text byte by byte."""

    @property
    def fingerprint(self) -> str:
        return "bytes"

    def encode(self, text: str) -> list[int]:
        return list(text.encode())


def tokenizer_of(name: str) -> FakeTokenizer:
    return OtherTokenizer() if name == "other" else FakeTokenizer()


def loaded(
    name: str, *, fingerprint: str = "", tokenizer: FakeTokenizer | None = None
) -> LoadedModel:
    made = fake_loaded(
        factory=FakeFactory(),
        tokenizer=tokenizer or FakeTokenizer(),
        fingerprint=fingerprint or name,
    )
    return replace(made, name=name)


@dataclass
class Setup:
    fleet: Fleet
    store: AgentCacheStore
    ended: dict[str, Completed | Failed] = field(default_factory=dict)

    def attach(self, name: str, **more: Any) -> None:
        self.fleet.attach(loaded(name, tokenizer=tokenizer_of(name), **more))

    def start(self, model: str = "", **request: Any) -> str:
        return self.fleet.submit(GenerateRequest(model=model, **request))

    def step(self, times: int = 1) -> list[Event]:
        events: list[Event] = []
        for _ in range(times):
            events += self.fleet.step()
            self.fleet.check()
            self.fleet._builder.wait(60.0)
        for event in events:
            if isinstance(event, Completed | Failed):
                self.ended[event.request_id] = event
        return events

    def import_agent(self, path: Path, name: str) -> ImportSummary:
        answer: Future[ImportSummary] = Future()
        self.fleet.begin_import(path, name, answer)
        while not answer.done():
            self.store.wait(0.05)
            self.step()
        return answer.result()

    def settle(self) -> None:
        """Step until nothing is left to do and the disk has taken everything."""
        while self.fleet.has_work or self.fleet.has_chores:
            self.store.wait(0.05)
            self.step()

    def finish(self, request_id: str) -> Completed:
        for _ in range(20_000):
            if request_id in self.ended:
                break
            self.step()
        end = self.ended[request_id]
        assert isinstance(end, Completed), end
        return end

    def run(self, model: str = "", **request: Any) -> Completed:
        return self.finish(self.start(model, **request))

    def say(self, agent: str, content: str, model: str = "", **more: Any) -> Completed:
        append = [{"role": "user", "content": content}]
        return self.run(model, agent_id=agent, append=append, max_tokens=6, **more)


def new_engine(
    model: LoadedModel,
    pool: BlockPool,
    store: AgentStore,
    book: AgentBook,
    request_ids: Iterator[int],
    **config: Any,
) -> BlockPoolBatchEngine:
    return BlockPoolBatchEngine(
        model,
        pool=pool,
        store=store,
        config=EngineConfig(always_restore=True, **config),
        book=book,
        request_ids=request_ids,
        recorded_as="" if model.name == "small" else model.name,
    )


@contextmanager
def opened(
    home: Path,
    *,
    budget_bytes: int = BUDGET_BYTES,
    new_engine: Callable[..., BlockPoolBatchEngine] = new_engine,
    **options: Any,
) -> Iterator[Setup]:
    """Open a fleet with its default model; `options` are the fleet's."""
    with AgentCacheStore(home, config=StoreConfig(free_floor_bytes=0)) as store:
        fleet = Fleet(
            new_engine, default="small", store=store, budget_bytes=budget_bytes, **options
        )
        setup = Setup(fleet, store)
        setup.attach("small")
        yield setup
        fleet.check()


def create(setup: Setup, *names: str) -> None:
    for name in names:
        setup.fleet.of(name).create(name)
