"""Work that no request waits for, and that ends where a request needs its memory or its agent."""

from typing import Protocol


class SideWork(Protocol):
    """A kind of such work. What it has done by the time it is cancelled stays."""

    def cancel(self, reason: str, agent_id: str | None = None) -> bool:
        """End all of it, or this agent's. Returns whether there was any."""
        ...


class Background:
    """Knows every kind of side work of an engine.

    It is made before the batch and the agents, which ask it to give way, and before the side work,
    which needs the batch: so none of them is called by a part of its own.
    """

    def __init__(self) -> None:
        self._works: list[SideWork] = []

    def __repr__(self) -> str:
        return f"Background({self._works!r})"

    def add(self, work: SideWork) -> None:
        self._works.append(work)

    def make_way(self, reason: str = "a request needed the memory") -> bool:
        """End all side work. Returns whether there was any: memory or a row may be free then."""
        had_any = [work.cancel(reason) for work in self._works]
        return any(had_any)

    def give_way(self, agent_id: str) -> None:
        """End side work of an agent that something else is asked of."""
        for work in self._works:
            work.cancel("something else was asked of the agent", agent_id)
