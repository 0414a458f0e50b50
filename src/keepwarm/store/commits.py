"""What of the agents the catalogue has not taken: on its way to it, or refused and tried again."""

from collections.abc import Callable
from dataclasses import dataclass

from keepwarm.core.stored import AgentState


@dataclass(frozen=True, slots=True)
class Change:
    """The agent as it is from now on; without a state it is gone.

    `answer` is None for a retry: its first try was answered when the disk refused it.
    """

    ticket: int
    agent_id: str
    state: AgentState | None
    answer: Callable[[bool], object] | None


class Commits:
    """Owns the changes that are not durable yet, and the last one of each agent.

    `refused` are the agents with a state to be tried again. A refused deletion is withdrawn: the
    agent is what it was before.
    """

    def __init__(self) -> None:
        self.refused: set[str] = set()
        self._on_way: dict[int, Change] = {}
        self._last: dict[str, Change] = {}
        self._before: dict[int, Change] = {}

    def __repr__(self) -> str:
        return f"Commits({len(self._on_way)} on their way, {len(self.refused)} agents refused)"

    def begin(self, change: Change) -> None:
        """The change is on its way."""
        former = self._last.get(change.agent_id)
        if change.state is None and former is not None:
            self._before[change.ticket] = former
        self._on_way[change.ticket] = change
        self._last[change.agent_id] = change

    def last_of(self, agent_id: str) -> Change | None:
        """What the catalogue does not know of the agent yet."""
        return self._last.get(agent_id)

    def deleted(self) -> set[str]:
        """Agents that the catalogue has still, and nobody else."""
        return {agent_id for agent_id, change in self._last.items() if change.state is None}

    def arrived(self, ticket: int) -> Change:
        """The catalogue has answered: the change that it was asked for."""
        return self._on_way.pop(ticket)

    def note_taken(self, change: Change) -> None:
        """The change is durable: the last one of its agent, or one before it."""
        self._before.pop(change.ticket, None)
        self._before = {ticket: c for ticket, c in self._before.items() if c is not change}
        if self._last.get(change.agent_id) is change:
            del self._last[change.agent_id]

    def note_refused(self, change: Change) -> None:
        """The disk refused it: a state is tried again, a deletion is as if it had not been."""
        if change.state is not None:
            self.refused.add(change.agent_id)
            return
        former = self._before.pop(change.ticket, None)
        if self._last.get(change.agent_id) is not change:
            return
        del self._last[change.agent_id]
        if former is not None:
            self._last[change.agent_id] = former
            self.refused.add(change.agent_id)

    def take_refused(self) -> list[Change]:
        """What is to be tried again, as far as it is not on its way already."""
        refused = self.refused & self._last.keys()
        self.refused.clear()
        changes = [self._last[agent_id] for agent_id in refused]
        return [change for change in changes if change.ticket not in self._on_way]

    def not_durable(self) -> list[Change]:
        """The agents that the catalogue does not have as they are."""
        return [change for change in self._last.values() if change.state is not None]

    def abandon(self) -> list[Change]:
        """No answer comes any more: what was on its way."""
        changes = list(self._on_way.values())
        self._on_way.clear()
        return changes
