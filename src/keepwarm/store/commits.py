"""What of the agents the catalogue has not taken: on its way to it, or refused and tried again."""

from dataclasses import dataclass

from keepwarm.core.stored import AgentState


@dataclass(frozen=True, slots=True)
class Change:
    """The agent as it is from now on; without a state it is gone."""

    ticket: int
    agent_id: str
    state: AgentState | None


class Commits:
    """Owns the changes that are not durable yet, the last one of each agent, and their tickets.

    Whoever commits is answered once: what was refused is tried again in silence. `refused` are the
    agents of whom something was.
    """

    def __init__(self) -> None:
        self.refused: set[str] = set()
        self._on_way: dict[int, str] = {}
        self._last: dict[str, Change] = {}
        self._silent: set[int] = set()

    def __repr__(self) -> str:
        return f"Commits({len(self._on_way)} on their way, {len(self.refused)} agents refused)"

    def begin(self, change: Change, *, is_retry: bool = False) -> None:
        """The change is on its way."""
        self._on_way[change.ticket] = change.agent_id
        self._last[change.agent_id] = change
        if is_retry:
            self._silent.add(change.ticket)

    def last_of(self, agent_id: str) -> Change | None:
        """What the catalogue does not know of the agent yet."""
        return self._last.get(agent_id)

    def deleted(self) -> set[str]:
        """Agents that the catalogue has still, and nobody else."""
        return {agent_id for agent_id, change in self._last.items() if change.state is None}

    def arrived(self, ticket: int) -> Change:
        """The catalogue has answered. Returns the last change of the agent that it was about."""
        return self._last[self._on_way.pop(ticket)]

    def note_taken(self, ticket: int, last: Change) -> None:
        """That ticket's change is durable: the last one of the agent, or one before it."""
        if ticket == last.ticket:
            del self._last[last.agent_id]

    def take_refused(self) -> list[Change]:
        """What is to be tried again, as far as it is not on its way already."""
        refused = self.refused & self._last.keys()
        self.refused.clear()
        changes = [self._last[agent_id] for agent_id in refused]
        return [change for change in changes if change.ticket not in self._on_way]

    def is_awaited(self, ticket: int) -> bool:
        """Whether somebody waits for this answer; asked once."""
        is_silent = ticket in self._silent
        self._silent.discard(ticket)
        return not is_silent

    def abandon(self) -> list[int]:
        """No answer comes any more: the tickets that were on their way."""
        tickets = list(self._on_way)
        self._on_way.clear()
        return tickets
