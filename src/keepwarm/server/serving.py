"""Gives a route what it works with: the engine, the caller, and the one way to answer."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Annotated

from fastapi import Depends
from starlette.requests import Request
from starlette.responses import Response

from keepwarm.engine.requests import GenerateRequest, ReceiptKey
from keepwarm.server.edge.caller import Caller
from keepwarm.server.edge.keys import ANONYMOUS
from keepwarm.server.edge.memory import MemoryReturn
from keepwarm.server.edge.scope_keys import ROLE
from keepwarm.server.operations.metrics import Metrics
from keepwarm.server.reply.choices import Choices
from keepwarm.server.reply.facts import IGNORED, names_of
from keepwarm.server.reply.reply import Encoder, StreamedReply, WholeReply
from keepwarm.server.reply.transfers import Transfers
from keepwarm.server.settings import ServerConfig
from keepwarm.service.async_engine import AsyncEngine
from keepwarm.service.model_registry import Model
from keepwarm.service.model_swapper import ModelSwapper

# Not `keepwarm.__version__`: that module names MLX's loader, which the server must not import.
VERSION = version("keepwarm")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Shared:
    """What all requests share. Belongs to the event loop's thread.

    `started`: when the server was started, in seconds since 1970.
    """

    engine: AsyncEngine
    models: ModelSwapper
    config: ServerConfig
    metrics: Metrics
    transfers: Transfers
    started: int
    memory: MemoryReturn = field(default_factory=MemoryReturn)


@dataclass(frozen=True, slots=True)
class Serving:
    """What one request works with: the shared parts, and its caller."""

    shared: Shared
    caller: Caller

    @property
    def engine(self) -> AsyncEngine:
        return self.shared.engine

    @property
    def config(self) -> ServerConfig:
        return self.shared.config

    def model(self, name: str) -> Model:
        """Find a model by any of its names. Raises UnknownModel."""
        return self.shared.models.registry.resolve(name)

    @property
    def default_model(self) -> str:
        """The default model's name."""
        return self.shared.models.registry.default.name

    def known_model(self, name: str) -> Model:
        """Find a model without adding one for an unknown name. Raises UnknownModel."""
        return self.shared.models.registry.resolve(name, may_add=False)

    def config_for(self, model: Model) -> ServerConfig:
        """Return the server's settings with the model's own default temperature."""
        own = model.settings.temperature
        return self.config if own < 0.0 else replace(self.config, default_temperature=own)

    async def answer(
        self,
        requests: Sequence[GenerateRequest],
        encoder: Encoder,
        *,
        model: Model | None = None,
        stream: bool,
        ignored: Sequence[str] = (),
        key: ReceiptKey | None = None,
    ) -> Response:
        """Answer with replies to the requests, written by the encoder.

        They are submitted, and may be refused, only when the response is sent. Without `model`, the
        model that the agent talked to last answers. `ignored` names fields that change nothing.
        """
        if model is not None:
            requests = [replace(request, model=model.name) for request in requests]
        headers: dict[str, str] = {}
        if ignored:
            headers[IGNORED] = ", ".join(names_of(ignored))
            _log.info("ignored: %s", headers[IGNORED])
        if self.config.log_prompts:
            for request in requests:
                _log.info("request: %s", request)
        choices = Choices(self.engine, requests, key)
        if stream:
            return StreamedReply(choices, encoder, headers, heartbeat_s=self.config.heartbeat_s)
        return WholeReply(choices, encoder, headers)


async def serving_of(request: Request) -> Serving:
    """Make a route's Serving. Async, because FastAPI runs other dependencies on a pool's thread."""
    shared: Shared = request.app.state.shared
    return Serving(shared, Caller(request.scope.get(ROLE, ANONYMOUS), request.headers))


async def admin_serving_of(request: Request) -> Serving:
    """Make the Serving of a route that needs an admin's key. Raises NotAllowed for a user's."""
    serving = await serving_of(request)
    serving.caller.must_be_admin()
    return serving


ServingOf = Annotated[Serving, Depends(serving_of)]
AdminServingOf = Annotated[Serving, Depends(admin_serving_of)]
