"""Health, metrics, statistics, the page, and the API's description."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from importlib.resources import files
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.responses import Response

from keepwarm.engine.agents.agent_view import AgentView
from keepwarm.engine.snapshot import EngineSnapshot
from keepwarm.server.dialects.agents.answers import AgentCard, card_of
from keepwarm.server.dialects.openai.encode import OpenAIErrorBody
from keepwarm.server.edge.guard import DOCS_FILES
from keepwarm.server.edge.scope_keys import CONNECTIONS
from keepwarm.server.models.cards import ModelCard
from keepwarm.server.reply.json_answer import errors, json_answer
from keepwarm.server.serving import VERSION, AdminServingOf, Serving, ServingOf

router = APIRouter(tags=["operations"], responses=errors(OpenAIErrorBody))

MAX_SHOWN_AGENTS = 100
PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)


@dataclass(frozen=True, slots=True)
class Alive:
    """The process answers."""

    status: str = "ok"


@dataclass(frozen=True, slots=True)
class Readiness:
    """The status `ok`, `degraded` or `stopping`, and the default model.

    A degraded server answers all the same; `causes` say what is wrong: a disk that refuses, or data
    that was damaged.
    """

    status: str
    model: str
    causes: Sequence[str]


@dataclass(frozen=True, slots=True)
class Stats(EngineSnapshot):
    """All figures at one moment.

    `num_agents` counts the caller's agents; `agents` lists those that were used last.
    """

    version: str
    models: Sequence[ModelCard]
    requests: int
    num_agents: int
    agents: Sequence[AgentCard]


@dataclass(frozen=True, slots=True)
class UserStats:
    """The figures that a user's key shows: the caller's own, and the models."""

    version: str
    models: Sequence[ModelCard]
    num_agents: int
    agents: Sequence[AgentCard]


_NOT_READY: dict[int | str, dict[str, Any]] = {503: {"model": Readiness, "description": "Not now"}}


@router.get("/health", responses=_NOT_READY, response_model=Readiness)
@router.get("/health/ready", responses=_NOT_READY, response_model=Readiness)
async def ready(serving: ServingOf) -> Response:
    """Say whether requests are answered: 503 while the server stops, and when it has broken."""
    is_serving, causes = serving.engine.is_serving, serving.engine.troubles
    status = ("degraded" if causes else "ok") if is_serving else "stopping"
    answer = Readiness(status, serving.default_model, causes)
    return json_answer(answer, 200 if is_serving else 503)


@router.get("/health/live", response_model=Alive)
async def live() -> Response:
    """Answer as soon as the process runs."""
    return json_answer(Alive())


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
async def metrics(request: Request, serving: AdminServingOf) -> Response:
    """Write all metrics for Prometheus; needs an admin's key where there are keys."""
    snapshot = None
    if serving.engine.is_serving:
        snapshot = await serving.engine.call(lambda fleet: fleet.snapshot())
    text = serving.shared.metrics.text(snapshot, len(request.scope.get(CONNECTIONS, ())))
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/v1/stats", response_model=Stats | UserStats)
async def stats(
    serving: ServingOf, agents: Annotated[int, Query(ge=0, le=MAX_SHOWN_AGENTS)] = 50
) -> Response:
    """Show all figures at one moment, and the caller's agents that were used last."""
    caller = serving.caller
    snapshot = await serving.engine.call(lambda fleet: fleet.snapshot())
    num_agents = await serving.engine.call(lambda fleet: fleet.count_agents(caller.owns).total())
    mine: list[AgentView] = []
    if agents:
        mine = await serving.engine.agents(
            lambda views: [view for view in views if caller.owns(view.agent_id)][:agents]
        )
    own = UserStats(
        version=VERSION,
        models=[ModelCard.of(model, caller) for model in serving.shared.models.registry],
        num_agents=num_agents,
        agents=[_card(view, serving) for view in mine],
    )
    if not caller.role.is_admin:
        return json_answer(own)
    requests = serving.engine.num_requests
    return json_answer(Stats(**_fields(snapshot), **_fields(own), requests=requests))


@router.get("/", response_class=Response, include_in_schema=False)
async def page() -> Response:
    """Show agents, tiers and rates, for people."""
    html = files("keepwarm.web").joinpath("index.html").read_bytes()
    headers = {"Content-Security-Policy": PAGE_POLICY}
    return Response(html, media_type="text/html; charset=utf-8", headers=headers)


@router.get("/docs", response_class=Response, include_in_schema=False)
async def docs() -> Response:
    """Show every route and field. FastAPI's own page would load its script from the net."""
    script, style = DOCS_FILES
    return get_swagger_ui_html(
        openapi_url="/openapi.json",
        title="Keepwarm",
        swagger_js_url=script,
        swagger_css_url=style,
        swagger_favicon_url="/favicon.ico",
    )


@router.get("/favicon.ico", include_in_schema=False)
async def favicon() -> Response:
    return Response(status_code=204)


def _card(view: AgentView, serving: Serving) -> AgentCard:
    shown = serving.caller.shown(view.agent_id)
    return card_of(view, shown, default_model=serving.default_model)


def _fields(value: EngineSnapshot | UserStats) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in fields(value)}
