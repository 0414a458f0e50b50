"""The application: its routers, its middleware, and how errors are answered."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from keepwarm.core.errors import KeepwarmError
from keepwarm.server.dialects.agents import routes as agents
from keepwarm.server.dialects.anthropic import routes as anthropic
from keepwarm.server.dialects.errors import error_response
from keepwarm.server.dialects.openai import routes as openai
from keepwarm.server.edge.guard import DOCS_FOLDER, Guard
from keepwarm.server.edge.paths import TidyPaths
from keepwarm.server.models import routes as models
from keepwarm.server.operations import routes as operations
from keepwarm.server.problems import problem_of
from keepwarm.server.reply.facts import HEADERS
from keepwarm.server.serving import VERSION, Shared

DESCRIPTION = "A local LLM server in which every agent keeps its memory warm."

ROUTERS = tuple(module.router for module in (openai, anthropic, agents, models, operations))
"""Routers in the order in which they are tried."""

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]


def build_app(shared: Shared) -> ASGIApp:
    """Put the application together: everything but the socket. Its end stops the engine."""
    api = FastAPI(
        title="Keepwarm",
        version=VERSION,
        description=DESCRIPTION,
        lifespan=_lifespan_of(shared),
        redirect_slashes=False,
        docs_url=None,
        redoc_url=None,
    )
    api.state.shared = shared
    for router in ROUTERS:
        api.include_router(router)
    api.mount(DOCS_FOLDER, StaticFiles(packages=[("fastapi_swagger", "resources")]))
    for error_type in (
        KeepwarmError,
        RequestValidationError,
        HTTPException,
        ClientDisconnect,
        Exception,
    ):
        api.add_exception_handler(error_type, _answer_error)
    guarded: ASGIApp = Guard(
        api, shared.config, refuse=error_response, observe=shared.metrics.observe_http
    )
    if shared.config.allowed_origins:
        guarded = CORSMiddleware(
            guarded,
            allow_origins=shared.config.allowed_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            allow_private_network=True,
            expose_headers=[*HEADERS, "X-Request-ID"],
        )
    return TidyPaths(guarded)


def _lifespan_of(shared: Shared) -> Lifespan:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await shared.engine.stop(shared.config.shutdown_grace_s)

    return lifespan


async def _answer_error(request: Request, error: Exception) -> Response:
    problem = problem_of(error)
    if problem.status < 500:
        _drop_tracebacks(error)
    return error_response(request.scope, problem)


def _drop_tracebacks(error: BaseException | None) -> None:
    """Drop the error's tracebacks, whose frames hold the request and its body.

    The framework's frames hold the error in turn: a cycle, which Python would collect much later.
    For a client's mistake no traceback is shown anyway.
    """
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__
