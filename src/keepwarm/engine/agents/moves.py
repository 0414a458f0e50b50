"""Agents that talk to one model after the other, as the engines of those models see it."""

from keepwarm.core.stored import AgentState
from keepwarm.engine.agents.agent_state import AgentStates
from keepwarm.engine.agents.book import Agent, AgentBook
from keepwarm.engine.agents.store_inbox import StoreInbox
from keepwarm.kv.tiers import Tiers


class AgentMoves:
    """Hands agents over to another model's engine, and takes them from there."""

    def __init__(
        self, book: AgentBook, tiers: Tiers, *, states: AgentStates, link: StoreInbox
    ) -> None:
        self._book = book
        self._tiers = tiers
        self._states = states
        self._link = link

    def holds(self, agent_id: str) -> bool:
        """Whether the agent is in this engine's memory, be it only by what it said."""
        return self._book.is_here(agent_id)

    def is_in_use(self, agent_id: str) -> bool:
        """Whether one of its lines runs, or waits to."""
        return self.holds(agent_id) and self._book.get(agent_id).in_use

    def is_leaving(self, agent_id: str) -> bool:
        """Whether the agent's deletion is on its way to the disk."""
        return self.holds(agent_id) and self._book.get(agent_id).is_leaving

    def state_of(self, agent_id: str) -> AgentState:
        """What another engine needs to go on with the agent. Raises UnknownAgent, AgentBusy."""
        return self._states.state_of(self._book.get_idle(agent_id, "move it to another model"))

    def adopt(self, state: AgentState) -> None:
        """Go on with an agent as another engine left it; what this one holds of its KV stays.

        It is committed as it is now, and counts as used last. Raises AgentBusy.
        """
        agent = self.take_over(state)
        self._tiers.touch(agent.main.blocks)
        self._link.commit(agent)

    def take_over(self, state: AgentState) -> Agent:
        old = None
        if self.holds(state.agent_id):
            old = self._book.get_idle(state.agent_id, "move it to another model")
        self._tiers.catch_up(state.last_used)
        agent = self._states.agent_of(state)
        if old is not None:
            self._book.hand_over(old, agent)
        return self._book.add(agent)

    def leave(self, agent_id: str) -> None:
        """Another engine goes on with the agent: what this one had to say of it is not written."""
        if self.holds(agent_id):
            self._book.get(agent_id).has_left = True

    def let_go(self, agent_id: str) -> None:
        """Forget an agent that another engine has deleted."""
        if self.holds(agent_id):
            self._book.get_idle(agent_id, "delete it").has_left = True
            self._book.remove(agent_id)

    def agent_ids(self) -> tuple[str, ...]:
        """Of those in memory."""
        return tuple(agent.agent_id for agent in self._book)

    def last_used(self, agent_id: str) -> int:
        """When the agent's main line was used last; it orders lines. Raises UnknownAgent."""
        return self._book.get(agent_id).main.blocks.last_used

    def models_of_agents(self) -> dict[str, str]:
        """By agent in memory, the name of the model that it talked to last."""
        return {agent.agent_id: agent.model for agent in self._book}

    def recorded_model(self, agent_id: str) -> str | None:
        """Of the agent, as it is committed; None where there is no such agent."""
        agent = self._book.find(agent_id)
        return agent.model if agent is not None else None

    def has_answered(self, agent_id: str) -> bool:
        """Whether the agent has had a turn here. Raises UnknownAgent."""
        return self._book.get(agent_id).has_answered

    def num_tokens(self, agent_id: str) -> int:
        """Of the agent's main line. Raises UnknownAgent."""
        return self._book.get(agent_id).main.transcript.num_tokens
