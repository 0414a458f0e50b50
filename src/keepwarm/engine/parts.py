"""What an engine is made of: its parts, each with what it needs of the others."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from keepwarm.core.agent_store import AgentStore
from keepwarm.core.events import Event
from keepwarm.core.fidelity import kv_bound
from keepwarm.core.policies import EngineConfig
from keepwarm.core.pool import BlockPool
from keepwarm.core.ports import LoadedModel
from keepwarm.core.stored import KVFamily
from keepwarm.engine.agents.agent import Place
from keepwarm.engine.agents.book import AgentBook
from keepwarm.engine.agents.commands import AgentCommands
from keepwarm.engine.agents.commits import Commits
from keepwarm.engine.agents.lines import Lines
from keepwarm.engine.agents.transfer import Transfers
from keepwarm.engine.agents.verification import AgentVerifier, Verifications
from keepwarm.engine.jobs import Jobs
from keepwarm.engine.turn.building import Building
from keepwarm.engine.turn.intake import Intake
from keepwarm.engine.turn.prefetcher import Prefetcher
from keepwarm.engine.turn.turns import Turns
from keepwarm.kv.background import Background
from keepwarm.kv.batch import Batch
from keepwarm.kv.generator_source import GeneratorSource
from keepwarm.kv.tiers import Tiers

CANONICAL_LINEAGE = "exact-canonical"
"""Blocks computed in canonical shapes differ in their last bits: they have other hashes."""


def family_of(model: LoadedModel, *, deterministic: bool) -> KVFamily:
    """Say which blocks an engine on this model can use.

    Where bits never depend on the way, the deterministic mode uses the blocks of the ordinary one.
    """
    needs_canonical = deterministic and not model.is_reproducible
    lineage = CANONICAL_LINEAGE if needs_canonical else "exact"
    return KVFamily(model.fingerprint, model.layout, lineage)


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What an engine is given: it owns none of it alone but the configuration."""

    pool: BlockPool
    store: AgentStore
    book: AgentBook
    config: EngineConfig
    clock: Callable[[], float]
    recorded_as: str = ""
    request_ids: Iterator[int] | None = None


class EngineParts:
    """Builds the parts of one engine, from the memory up to what people ask of agents."""

    def __init__(
        self,
        model: GeneratorSource,
        given: Surroundings,
        *,
        deterministic: bool,
    ) -> None:
        facts, store, config = model.facts, given.store, given.config
        family = family_of(facts, deterministic=deterministic)
        self.events: list[Event] = []
        self.background = Background()
        self.tiers = Tiers(given.pool, model, family=family, store=store)
        self.batch = Batch(self.tiers, model, self.background, config=config, clock=given.clock)
        self.book = given.book
        self.place = Place(
            facts.name,
            given.recorded_as,
            facts.tokenizer.fingerprint,
            self.tiers,
            give_way=self.background.give_way,
        )
        self.book.add_place(self.place)
        self.commits = Commits(store, self.tiers, emit=self.events.append)
        ids = given.request_ids or itertools.count(1)
        self.prefetches = Prefetcher(self.batch, self.tiers, ids)
        is_reproducible = deterministic or facts.is_reproducible
        bound = kv_bound(facts.layout.dtype, deterministic=is_reproducible)
        self._build_verification(model, given, bound)
        self._build_requests(facts, given, ids)
        self._build_calls(facts, given, family)

    def _build_verification(
        self, model: GeneratorSource, given: Surroundings, bound: float
    ) -> None:
        self.verifies = Verifications(
            AgentVerifier(
                self.tiers, self.batch, model, store=given.store, commits=self.commits, bound=bound
            ),
            model,
            book=self.book,
            place=self.place,
            commits=self.commits,
            alone_tokens=given.config.prefill_chunk_tokens,
        )
        self.background.add(self.prefetches)
        self.background.add(self.verifies)

    def _build_requests(self, facts: LoadedModel, given: Surroundings, ids: Iterator[int]) -> None:
        self.lines = Lines(
            self.book,
            self.place,
            max_side_lines=given.config.max_side_lines,
            max_anonymous_lines=given.config.max_anonymous_lines,
        )
        self.intake = Intake(facts, self.book, self.lines, self.tiers)
        self.turns = Turns(
            facts.tokenizer,
            batch=self.batch,
            tiers=self.tiers,
            book=self.book,
            lines=self.lines,
            commits=self.commits,
            emit=self.events.append,
            clock=given.clock,
            ids=ids,
        )
        self.building = Building(self.intake, self.prefetches, self.place, store=given.store)

    def _build_calls(self, facts: LoadedModel, given: Surroundings, family: KVFamily) -> None:
        self.jobs = Jobs()
        self.transfers = Transfers(
            facts,
            family,
            self.place,
            store=given.store,
            commits=self.commits,
            book=self.book,
            jobs=self.jobs,
        )
        self.commands = AgentCommands(
            self.book,
            self.place,
            store=given.store,
            commits=self.commits,
            prefetches=self.prefetches,
        )
