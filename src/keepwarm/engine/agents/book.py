"""The book of agents: each is in it once, whatever models it talks to."""

from collections.abc import Iterator
from contextlib import contextmanager

from keepwarm.core.agent_store import AgentLog
from keepwarm.core.errors import (
    AgentBusy,
    AgentExists,
    AgentLeaving,
    InvariantBroken,
    UnknownAgent,
)
from keepwarm.engine.agents.agent import Agent, Place
from keepwarm.engine.agents.agent_state import agent_of, move


class AgentBook:
    """Owns the agents of all models that share a store, and says where each of them is.

    An agent that is not in memory is read from the store before it counts as unknown; that raises
    DamagedAgent for one that cannot be read.
    """

    def __init__(self, store: AgentLog) -> None:
        self._store = store
        self._agents: dict[str, Agent] = {}
        self._places: dict[str, Place] = {}

    def __repr__(self) -> str:
        return f"AgentBook({len(self._agents)} agents, {len(self._places)} models)"

    def __contains__(self, agent_id: str) -> bool:
        return self.find(agent_id) is not None

    def __iter__(self) -> Iterator[Agent]:
        return iter(self._agents.values())

    def add_place(self, place: Place) -> None:
        """Agents of this model can be here now.

        A place of the same name is replaced: other weights had it. Its agents come here with what
        was said, and what it held of their KV goes with it; nothing may run there.
        """
        former = self._places.get(place.recorded_as)
        self._places[place.recorded_as] = place
        if former is None:
            return
        for agent in self:
            if agent.place is former:
                move(agent, place)
            agent.answered.discard(former)
            for line in agent.lines:
                line.resting.pop(former, None)

    # -- finding ---------------------------------------------------------------------------------

    def find(self, agent_id: str) -> Agent | None:
        agent = self._agents.get(agent_id)
        if agent is None and (state := self._store.load_agent(agent_id)) is not None:
            agent = self.add(agent_of(state, self._place_of(state.model)))
        return agent

    def here(self, agent_id: str | None) -> Agent | None:
        """Return the agent, if it is in memory."""
        return None if agent_id is None else self._agents.get(agent_id)

    def get(self, agent_id: str) -> Agent:
        """Return the agent. Raises UnknownAgent."""
        agent = self.find(agent_id)
        if agent is None:
            raise UnknownAgent(agent_id)
        return agent

    def get_staying(self, agent_id: str) -> Agent:
        """Return the agent. Raises UnknownAgent, and AgentLeaving while it is being deleted."""
        self.check_stays(agent_id)
        return self.get(agent_id)

    def get_idle(self, agent_id: str, action: str) -> Agent:
        """Return the agent and end what goes on for it without a request.

        Raises UnknownAgent, AgentLeaving, and AgentBusy while one of its lines runs.
        """
        agent = self.get_staying(agent_id)
        if agent.in_use:
            raise AgentBusy(agent_id, action)
        agent.place.give_way(agent_id)
        return agent

    def bring(self, agent_id: str, place: Place, action: str) -> Agent:
        """Return the agent as `get_idle` does, moved to this place. Raises what that raises."""
        agent = self.get_idle(agent_id, action)
        move(agent, place)
        return agent

    @contextmanager
    def moved(self, agent_id: str | None, place: Place) -> Iterator[None]:
        """Have the agent, if there is one, at this place from now on, unless the block raises.

        Raises AgentLeaving, and AgentBusy while it runs at another place.
        """
        self.check_stays(agent_id)
        agent = None if agent_id is None else self.find(agent_id)
        if agent is None or agent.place is place:
            yield
            return
        former = agent.place
        self.bring(agent.agent_id, place, "move it to another model")
        try:
            yield
        except BaseException:
            move(agent, former)
            raise

    def check_stays(self, agent_id: str | None) -> None:
        """Raise AgentLeaving while the agent is being deleted."""
        agent = self.here(agent_id)
        if agent is not None and agent.is_leaving:
            raise AgentLeaving(agent.agent_id)

    def check_is_new(self, agent_id: str) -> None:
        """Raise AgentExists where there is such an agent."""
        if agent_id in self:
            raise AgentExists(agent_id)

    # -- changing --------------------------------------------------------------------------------

    def add(self, agent: Agent) -> Agent:
        self._agents[agent.agent_id] = agent
        return agent

    def remove(self, agent: Agent) -> None:
        """Remove the agent, and what only it owned in the memory of any model."""
        for place, blocks in agent.holdings():
            place.tiers.forget(blocks)
        del self._agents[agent.agent_id]
        agent.is_deleted = True

    def check(self) -> None:
        """Check that every agent is at a known place, and that no line's KV is another's."""
        places = set(self._places.values())
        seen: set[int] = set()
        for agent_id, agent in self._agents.items():
            agent.check()
            if agent.agent_id != agent_id or agent.place not in places or agent.is_deleted:
                raise InvariantBroken(f"{agent_id}: {agent.agent_id} at {agent.place}")
            for place, blocks in agent.holdings():
                if place not in places or id(blocks) in seen:
                    raise InvariantBroken(f"{agent_id}: line {blocks.line} at {place}, or twice")
                seen.add(id(blocks))

    def _place_of(self, model: str) -> Place:
        """Return the place of the model that an agent talked to last, or the default one's."""
        if not self._places:
            raise InvariantBroken("agents are read for a model, and none was ever loaded")
        default = self._places.get("") or next(iter(self._places.values()))
        return self._places.get(model, default)
