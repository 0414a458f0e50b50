"""How uvicorn serves the application: the same for the command and for tests."""

import asyncio
from functools import partial

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from keepwarm.server.reply import ABORT
from keepwarm.server.settings import ServerConfig

KEEP_ALIVE_S = 75
"""Longer than clients keep an idle connection, so that none sends into one that is being closed."""


def uvicorn_config(app: ASGIApp, config: ServerConfig) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=_Connection,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="on",
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=int(config.shutdown_grace_s),
    )


class _Connection(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """Lets the application close it, whatever its client has not read."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.app = partial(_with_abort, self.config.loaded_app, transport)


async def _with_abort(
    app: ASGIApp, transport: asyncio.Transport, scope: Scope, receive: Receive, send: Send
) -> None:
    scope[ABORT] = transport.abort
    await app(scope, receive, send)
