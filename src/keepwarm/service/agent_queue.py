"""Turns: for each agent one request at a time, in the order in which they came."""

import asyncio
from collections import Counter

from keepwarm.core.errors import QueueFull, QueueTimeout


class AgentQueue:
    """Owns the turns. Belongs to the event loop's thread.

    `max_waiting` requests may wait, for all agents together.
    """

    def __init__(self, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self._locks: dict[str, asyncio.Lock] = {}
        self._num_inside_or_waiting: Counter[str] = Counter()
        self.num_waiting = 0

    def __repr__(self) -> str:
        return f"AgentQueue({len(self._locks)} agents, {self.num_waiting} waiting)"

    @property
    def is_empty(self) -> bool:
        """Whether no request has a turn or waits for one."""
        return not self._locks

    def is_taken(self, agent_id: str) -> bool:
        """Whether `enter` would have to wait."""
        return agent_id in self._locks

    async def enter(self, agent_id: str, timeout_s: float | None) -> None:
        """Wait for the agent's turn, which lasts until `leave`.

        Raises QueueTimeout after `timeout_s` seconds, and QueueFull at once.
        """
        lock = self._locks.setdefault(agent_id, asyncio.Lock())
        if lock.locked() and self.num_waiting >= self._max_waiting:
            raise QueueFull(num_waiting=self.num_waiting)
        self._num_inside_or_waiting[agent_id] += 1
        self.num_waiting += 1
        try:
            async with asyncio.timeout(timeout_s):
                await lock.acquire()
        except TimeoutError as error:
            self._forget(agent_id)
            raise QueueTimeout(waited_s=timeout_s or 0.0) from error
        except BaseException:
            self._forget(agent_id)
            raise
        finally:
            self.num_waiting -= 1

    def leave(self, agent_id: str) -> None:
        """Let the agent's next request have its turn."""
        self._locks[agent_id].release()
        self._forget(agent_id)

    def _forget(self, agent_id: str) -> None:
        self._num_inside_or_waiting[agent_id] -= 1
        if not self._num_inside_or_waiting[agent_id]:
            del self._num_inside_or_waiting[agent_id]
            del self._locks[agent_id]
