"""Agents that were committed last, remembered so that a commit writes only what is new."""

from collections import OrderedDict
from collections.abc import Iterator

from keepwarm.store.catalog.plan import CommittedAgent

MAX_RECENT_AGENTS = 256
MAX_RECENT_TOKENS = 2_000_000
"""About 80 MB where nothing else holds the states."""


class RecentAgents:
    """Remembers the agents that were committed last, within two limits."""

    def __init__(self) -> None:
        self._agents: OrderedDict[str, CommittedAgent] = OrderedDict()
        self._num_tokens: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._agents)

    def __iter__(self) -> Iterator[CommittedAgent]:
        return iter(self._agents.values())

    def take(self, name: str) -> CommittedAgent | None:
        """Hand an agent out and forget it: a commit that fails leaves nothing to believe."""
        self._num_tokens.pop(name, None)
        return self._agents.pop(name, None)

    def put(self, agent: CommittedAgent) -> None:
        """Remember an agent as the latest; the longest unused leave, but never this one."""
        self._agents[agent.state.agent_id] = agent
        self._num_tokens[agent.state.agent_id] = agent.num_tokens
        while len(self._agents) > 1 and self._is_too_large():
            self.take(next(iter(self._agents)))

    def _is_too_large(self) -> bool:
        num_tokens = sum(self._num_tokens.values())
        return len(self._agents) > MAX_RECENT_AGENTS or num_tokens > MAX_RECENT_TOKENS
