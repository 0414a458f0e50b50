"""Configures uvicorn, for the command and for tests alike."""

import math
from functools import partial

import uvicorn
from starlette.types import ASGIApp

from keepwarm.server.edge.connection import Connection
from keepwarm.server.settings import ServerConfig


def uvicorn_config(app: ASGIApp, config: ServerConfig) -> uvicorn.Config:
    """Serve the application on `Connection`, within the bounds of `config`."""
    return uvicorn.Config(
        app,
        http=partial(Connection, bounds=config),  # type: ignore[arg-type]  # it is only called
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="on",
        timeout_keep_alive=math.ceil(config.keep_alive_s),
        timeout_graceful_shutdown=int(config.shutdown_grace_s),
    )
