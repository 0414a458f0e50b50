"""What an engine is made of: its parts, each with what it needs of the others."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from keepwarm.core.agent_store import AgentStore
from keepwarm.core.events import Event
from keepwarm.core.fidelity import kv_bound
from keepwarm.core.policies import EngineConfig
from keepwarm.core.pool import BlockPool
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
        lineage = CANONICAL_LINEAGE if deterministic else "exact"
        family = KVFamily(facts.fingerprint, facts.layout, lineage)
        ids = given.request_ids or itertools.count(1)
        self.events: list[Event] = []
        self.jobs = Jobs()
        self.background = background = Background()
        self.tiers = tiers = Tiers(given.pool, model, family=family, store=store)
        self.batch = batch = Batch(
            tiers,
            model,
            background,
            config=config,
            clock=given.clock,
        )
        self.book = book = given.book
        self.place = place = Place(
            facts.name,
            given.recorded_as,
            facts.tokenizer.fingerprint,
            tiers,
            give_way=background.give_way,
        )
        book.add_place(place)
        self.lines = lines = Lines(
            book,
            place,
            max_side_lines=config.max_side_lines,
            max_anonymous_lines=config.max_anonymous_lines,
        )
        self.commits = commits = Commits(store, tiers, emit=self.events.append)
        self.prefetches = Prefetcher(batch, tiers, ids)
        self.verifies = Verifications(
            AgentVerifier(
                tiers,
                batch,
                model,
                store=store,
                commits=commits,
                bound=kv_bound(facts.layout.dtype, deterministic=deterministic),
            ),
            model,
            book=book,
            place=place,
            commits=commits,
            alone_tokens=config.prefill_chunk_tokens,
        )
        background.add(self.prefetches)
        background.add(self.verifies)
        self.intake = Intake(facts, book, lines, tiers)
        self.turns = Turns(
            facts.tokenizer,
            batch=batch,
            tiers=tiers,
            book=book,
            lines=lines,
            commits=commits,
            emit=self.events.append,
            clock=given.clock,
            ids=ids,
        )
        self.transfers = Transfers(
            facts,
            family,
            place,
            store=store,
            commits=commits,
            book=book,
            jobs=self.jobs,
        )
        self.commands = AgentCommands(
            book,
            place,
            store=store,
            commits=commits,
            prefetches=self.prefetches,
        )
        self.building = Building(self.intake, self.prefetches, place, store=store)
