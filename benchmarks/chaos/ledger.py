"""What must be true of a home's agents, as the process that was killed had told it."""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from benchmarks.chaos.state import State


@dataclass(slots=True)
class Ledger:
    """Agents by name. `keeps_all`: nothing is evicted, so what was written stays.

    truth: the last state that was acknowledged. pending: what was begun and not acknowledged.
    settled: how many tokens are known to be on disk. deleted: the ids of agents that are gone.
    limited: agents with a quota. related: agents that share blocks by a fork. origins: the agent
    that a fork goes back to.
    """

    keeps_all: bool
    truth: dict[str, State] = field(default_factory=dict)
    pending: defaultdict[str, list[dict[str, Any]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    settled: dict[str, int] = field(default_factory=dict)
    deleted: dict[str, list[int]] = field(default_factory=dict)
    limited: set[str] = field(default_factory=set)
    related: set[str] = field(default_factory=set)
    origins: dict[str, str] = field(default_factory=dict)

    def intend(self, doing: dict[str, Any]) -> None:
        """Note what may have happened or not, until it is acknowledged."""
        agent = doing["agent"]
        self.pending[agent].append(doing)
        if doing["doing"] == "change" and agent in self.settled:
            num_tokens = len(doing["state"]["ids"]) if doing["state"] else 0
            self.settled[agent] = min(self.settled[agent], num_tokens)
        if "parent" in doing:
            self.related |= {agent, doing["parent"]}
            self.origins[agent] = self._origin(doing["parent"])

    def acknowledge(self, agent: str, state: State | None) -> None:
        """Note an agent's new state, None where it was deleted: it must survive every kill."""
        self.pending.pop(agent, None)
        if state is not None:
            self.truth[agent] = state
            return
        before = self.truth.pop(agent, None)
        self.settled.pop(agent, None)
        self.deleted[agent] = before["ids"] if before else []

    def limit(self, agent: str) -> None:
        """Note that the agent has a quota, so that what is written of it may be evicted."""
        self.limited.add(self._origin(agent))
        self.settled = {name: count for name, count in self.settled.items() if self._is_kept(name)}

    def settle(self, tokens: dict[str, int]) -> None:
        """Note that all of these agents' tokens are written, where they are kept."""
        self.settled |= {name: count for name, count in tokens.items() if self._is_kept(name)}

    def find(self, agent: str, actual: State | None) -> None:
        """Go on with what is there after a kill."""
        if actual is None:
            self.truth.pop(agent, None)
            self.settled.pop(agent, None)
        else:
            self.truth[agent] = actual

    def _is_kept(self, agent: str) -> bool:
        """Whether no block of it is evicted; a fork's blocks count against its parent's quota."""
        return self.keeps_all and self._origin(agent) not in self.limited

    def _origin(self, agent: str) -> str:
        """Return the agent that this one, or the one it was forked from, began as."""
        return self.origins.get(agent, agent)
