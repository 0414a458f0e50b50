"""Chooses the model that answers a request, and keeps it in memory meanwhile."""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from keepwarm.core.errors import UnknownModel
from keepwarm.service.engine_thread import EngineThread
from keepwarm.service.model_swapper import ModelSwapper

_log = logging.getLogger(__name__)


class ModelUse:
    """Takes and releases models for requests. Belongs to the event loop's thread.

    Without a `swapper` there is no choice: the fleet has the models that it was opened with, and
    every name is empty.
    """

    def __init__(self, thread: EngineThread) -> None:
        self.swapper: ModelSwapper | None = None
        self._thread = thread

    def __repr__(self) -> str:
        return f"ModelUse({self.swapper!r})"

    async def model_of(self, agent_id: str | None) -> str:
        """Name the model that the agent talked to last, or the default where that is missing."""
        if self.swapper is None:
            return ""
        registry = self.swapper.registry
        if registry.only_used:
            return registry.only_used
        name = await self._thread.call(lambda fleet: fleet.model_of(agent_id))
        with suppress(UnknownModel):
            model = registry.resolve(name)
            if self.swapper.can_be_had(model):
                return model.name
        _log.warning("%s talked to %s, which cannot be had now", agent_id, name)
        return registry.default.name

    def is_ready(self, name: str) -> bool:
        """Whether `enter` returns at once. Raises UnknownModel."""
        return self.swapper is None or self.swapper.is_ready(name)

    async def enter(self, name: str, timeout_s: float | None) -> None:
        """Wait until the model is in memory; it stays until `leave`.

        Raises what `ModelSwapper.enter` raises.
        """
        if self.swapper is not None:
            await self.swapper.enter(name, timeout_s)

    def leave(self, name: str) -> None:
        """Undo one `enter`."""
        if self.swapper is not None:
            self.swapper.leave(name)

    @asynccontextmanager
    async def using(self, name: str) -> AsyncIterator[None]:
        """Keep the model in memory for the block, however long its loading takes."""
        await self.enter(name, None)
        try:
            yield
        finally:
            self.leave(name)
