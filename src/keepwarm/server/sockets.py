"""How uvicorn serves the application: the same for the command and for tests."""

import asyncio
from collections.abc import Mapping
from functools import partial
from typing import Any

import uvicorn
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from keepwarm.server.reply import ABORT
from keepwarm.server.serving import CONNECTIONS
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
    """Lets the application close it, whatever its client has not read, and count the others."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        facts = {ABORT: transport.abort, CONNECTIONS: self.connections}
        self.app = partial(_with, facts, self.config.loaded_app)


async def _with(
    facts: Mapping[str, object], app: ASGIApp, scope: Scope, receive: Receive, send: Send
) -> None:
    scope.update(facts)
    if scope["type"] == "http" and scope["http_version"] == "1.0":
        send = _UntilClosed(send)
    await app(scope, receive, send)


class _UntilClosed:
    """To a client of HTTP/1.0, which knows no chunks: a stream without a length ends by closing.

    uvicorn sends chunks to everybody where it parses with httptools; with h11 it does not, and has
    none of these fields. nginx asks like this unless told otherwise.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self._cycle: Any = send.__self__  # type: ignore[attr-defined]
        self._has_length = True

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._has_length = "content-length" in Headers(raw=message.get("headers", []))
            if not self._has_length:
                self._cycle.chunked_encoding = False
        elif not self._has_length:
            self._cycle.expected_content_length = len(message.get("body", b""))
        await self._send(message)
