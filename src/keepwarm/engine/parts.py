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
from keepwarm.engine.agents.agent_state import AgentStates
from keepwarm.engine.agents.book import AgentBook
from keepwarm.engine.agents.commands import AgentCommands
from keepwarm.engine.agents.moves import AgentMoves
from keepwarm.engine.agents.store_inbox import StoreInbox
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
        self.states = states = AgentStates(
            store,
            tokenizer=facts.tokenizer.fingerprint,
            root_of=tiers.root_of,
            new_blocks=tiers.new_line,
            pin=tiers.pin,
        )
        self.book = book = AgentBook(
            new_blocks=tiers.new_line,
            forget=tiers.forget,
            pin=tiers.pin,
            load=states.load,
            give_way=background.give_way,
            max_side_lines=config.max_side_lines,
            max_anonymous_lines=config.max_anonymous_lines,
            model=given.recorded_as,
        )
        self.link = link = StoreInbox(store, tiers, states, emit=self.events.append)
        self.prefetches = Prefetcher(batch, tiers, ids)
        self.verifies = Verifications(
            AgentVerifier(
                tiers,
                batch,
                model,
                store=store,
                link=link,
                bound=kv_bound(facts.layout.dtype, deterministic=deterministic),
            ),
            model,
            book=book,
            link=link,
            alone_tokens=config.prefill_chunk_tokens,
        )
        background.add(self.prefetches)
        background.add(self.verifies)
        self.intake = Intake(facts, book, tiers)
        self.turns = Turns(
            facts.tokenizer,
            batch=batch,
            tiers=tiers,
            book=book,
            link=link,
            emit=self.events.append,
            clock=given.clock,
            ids=ids,
        )
        self.transfers = Transfers(
            facts,
            family,
            tiers,
            store=store,
            link=link,
            states=states,
            book=book,
            jobs=self.jobs,
        )
        self.commands = AgentCommands(
            book,
            tiers,
            store=store,
            link=link,
            prefetches=self.prefetches,
            recorded_as=given.recorded_as,
        )
        self.moves = AgentMoves(book, tiers, states=states, link=link)
        self.building = Building(self.intake, self.prefetches, tiers, store=store, moves=self.moves)
