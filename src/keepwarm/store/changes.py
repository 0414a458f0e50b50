"""Changes of agents that the catalogue has not taken: on their way to it, or refused."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from keepwarm.core.stored import AgentState


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """An agent as it is from now on; without a state it is deleted.

    `answer` is told whether the change is durable. It is None for a second try, because the first
    one was answered when the disk refused it.
    """

    agent_id: str
    state: AgentState | None
    answer: Callable[[bool], object] | None = None

    def again(self) -> "Change":
        return replace(self, answer=None)


class Changes:
    """Owns the changes that are not durable yet, and which is the last one of each agent.

    `refused` are the agents with a state to be tried again. A refused deletion is withdrawn: the
    agent is what it was before.
    """

    def __init__(self) -> None:
        self.refused: set[str] = set()
        self._on_way: set[Change] = set()
        self._last: dict[str, Change] = {}
        self._before: dict[Change, Change] = {}

    def __repr__(self) -> str:
        return f"Changes({len(self._on_way)} on their way, {len(self.refused)} agents refused)"

    def begin(self, change: Change) -> None:
        """Note a change that is on its way to the catalogue."""
        former = self._last.get(change.agent_id)
        if change.state is None and former is not None:
            self._before[change] = former
        self._on_way.add(change)
        self._last[change.agent_id] = change

    def last_of(self, agent_id: str) -> Change | None:
        """Return what the catalogue does not know of the agent yet."""
        return self._last.get(agent_id)

    def deleted(self) -> set[str]:
        """Return the agents that only the catalogue has still."""
        return {agent_id for agent_id, change in self._last.items() if change.state is None}

    def note_ended(self, change: Change) -> None:
        """Note that the catalogue has answered, whatever it said."""
        self._on_way.remove(change)

    def note_taken(self, change: Change) -> None:
        """Note that a change is durable: the last one of its agent, or one before that."""
        self._before.pop(change, None)
        self._before = {later: c for later, c in self._before.items() if c is not change}
        if self._last.get(change.agent_id) is change:
            del self._last[change.agent_id]

    def note_refused(self, change: Change) -> None:
        """Note that the disk refused a change: a state is tried again, a deletion is as if never
        made.
        """
        if change.state is not None:
            self.refused.add(change.agent_id)
            return
        former = self._before.pop(change, None)
        if self._last.get(change.agent_id) is not change:
            return
        del self._last[change.agent_id]
        if former is not None:
            self._last[change.agent_id] = former
            self.refused.add(change.agent_id)

    def take_refused(self) -> list[Change]:
        """Return what is to be tried again, but for what is on its way already."""
        refused = self.refused & self._last.keys()
        self.refused.clear()
        changes = [self._last[agent_id] for agent_id in refused]
        return [change.again() for change in changes if change not in self._on_way]

    def not_durable(self) -> list[Change]:
        """Return the last change of each agent that the catalogue does not have as it is."""
        return [change for change in self._last.values() if change.state is not None]
