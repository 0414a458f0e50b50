"""One at a time for each agent, in the order in which they came."""

import asyncio
from collections import Counter

from keepwarm.core.errors import QueueTimeout


class Turnstile:
    """Belongs to the event loop's thread."""

    def __init__(self) -> None:
        self._locks: dict[str, asyncio.Lock] = {}
        self._num_inside_or_waiting: Counter[str] = Counter()

    async def enter(self, agent_id: str, timeout_s: float | None) -> None:
        """Raises QueueTimeout. Whoever entered must leave."""
        lock = self._locks.setdefault(agent_id, asyncio.Lock())
        self._num_inside_or_waiting[agent_id] += 1
        try:
            async with asyncio.timeout(timeout_s):
                await lock.acquire()
        except TimeoutError as error:
            self._forget(agent_id)
            raise QueueTimeout(waited_s=timeout_s or 0.0) from error
        except BaseException:
            self._forget(agent_id)
            raise

    def leave(self, agent_id: str) -> None:
        self._locks[agent_id].release()
        self._forget(agent_id)

    def _forget(self, agent_id: str) -> None:
        self._num_inside_or_waiting[agent_id] -= 1
        if not self._num_inside_or_waiting[agent_id]:
            del self._num_inside_or_waiting[agent_id]
            del self._locks[agent_id]
