"""KV that an agent will want on a model that it does not talk to at the moment."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from keepwarm.core.agent_store import AgentStore
from keepwarm.engine.agents.agent import Agent, Line, Place
from keepwarm.engine.agents.agent_state import line_at
from keepwarm.engine.prompt.prompt_encoder import Guard
from keepwarm.engine.turn.intake import Intake
from keepwarm.engine.turn.prefetcher import Prefetcher


@dataclass(frozen=True, slots=True)
class BuildPlan:
    """An agent's line whose KV is to be computed in advance, and what finds its ids."""

    line: Line
    read: Callable[[Guard], tuple[int, ...]]


class Building:
    """Computes KV in advance on one engine, where memory and disk have room for it."""

    def __init__(
        self,
        intake: Intake,
        prefetches: Prefetcher,
        place: Place,
        *,
        store: AgentStore,
    ) -> None:
        self._intake = intake
        self._prefetches = prefetches
        self._place = place
        self._store = store

    def begin(self, agent: Agent) -> BuildPlan | None:
        """Plan KV for an agent that talks to another model, for when it comes here.

        `read` of the plan can be called on any thread; `build` takes what it returns. None where
        the agent has a quota: its records would push out those of the model that it talks to.
        """
        if agent.settings.quota_bytes is not None:
            return None
        line = line_at(agent, agent.main, self._place)
        history_ids = self._intake.reader.history_ids
        return BuildPlan(line, partial(history_ids, line.messages, line.transcript))

    def build(self, plan: BuildPlan, token_ids: tuple[int, ...]) -> bool:
        """Compute the plan's KV in the background, until `cancel`.

        Nothing gives way to it: memory and disk must have room. Returns whether it was begun.
        """
        num_tokens = len(token_ids)
        if self._intake.would_drop_turns(num_tokens) or not self.has_room_for(num_tokens):
            return False
        return self._prefetches.begin(plan.line, token_ids, may_compute=True)

    def has_room_for(self, num_tokens: int) -> bool:
        """Whether KV of `num_tokens` tokens fits into memory and onto the disk as they are."""
        needed_bytes = self._intake.slab_bytes(num_tokens)
        health = self._store.health()
        disk_bytes = health.disk_bytes + health.queued_bytes + needed_bytes
        has_disk = not health.budget_bytes or disk_bytes <= health.budget_bytes
        return has_disk and needed_bytes <= self._place.tiers.spendable_bytes

    @property
    def is_computing(self) -> bool:
        return self._prefetches.is_computing

    def cancel(self) -> None:
        """End what is being computed; what is there by then stays."""
        self._prefetches.cancel_computing()
