"""Operations: health, metrics, the page, and one snapshot of everything."""

from dataclasses import asdict
from importlib.resources import files
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Depends, Query
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.responses import Response

from keepwarm.engine.agents import AgentView
from keepwarm.engine.fleet import Fleet
from keepwarm.engine.snapshot import EngineSnapshot
from keepwarm.server.agents.encode import agent_fields
from keepwarm.server.guard import DOCS_FILES
from keepwarm.server.models import model_card
from keepwarm.server.serving import VERSION, Serving, serving_of

router = APIRouter(tags=["operations"])

ServingOf = Annotated[Serving, Depends(serving_of)]

MAX_SHOWN_AGENTS = 100
PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)


@router.get("/health", response_class=Response)
@router.get("/health/ready", response_class=Response)
async def ready(serving: ServingOf) -> Response:
    """Whether requests are answered: 503 while the server stops, or when the engine has ended."""
    is_serving = serving.engine.is_serving
    body = {
        "status": "ok" if is_serving else "stopping",
        "model": serving.house.models.registry.default.name,
    }
    return _json(body, 200 if is_serving else 503)


@router.get("/health/live", response_class=Response)
async def live() -> Response:
    """Whether the process answers at all."""
    return _json({"status": "ok"})


@router.get("/metrics", response_class=Response)
async def metrics(serving: ServingOf) -> Response:
    """For Prometheus."""
    snapshot = None
    if serving.engine.is_serving:
        snapshot = await serving.engine.call(lambda fleet: fleet.snapshot())
    text = serving.house.metrics.text(snapshot)
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/v1/stats", response_class=Response)
async def stats(
    serving: ServingOf, agents: Annotated[int, Query(ge=0, le=MAX_SHOWN_AGENTS)] = 50
) -> Response:
    """Everything at one moment; of the caller's agents those that were used last."""
    snapshot, views = await serving.engine.call(lambda fleet: _look(fleet, agents))
    mine = [view for view in views if serving.caller.owns(view.agent_id)]
    return _json(
        {
            "version": VERSION,
            "models": [model_card(model) for model in serving.house.models.registry],
            **_snapshot_fields(snapshot),
            "requests": serving.engine.num_requests,
            "num_agents": len(mine),
            "agents": [_agent(view, serving) for view in mine[:agents]],
        }
    )


@router.get("/", response_class=Response, include_in_schema=False)
async def page() -> Response:
    """Agents, tiers and rates, for people."""
    html = files("keepwarm.web").joinpath("index.html").read_bytes()
    headers = {"Content-Security-Policy": PAGE_POLICY}
    return Response(html, media_type="text/html; charset=utf-8", headers=headers)


@router.get("/docs", response_class=Response, include_in_schema=False)
async def docs() -> Response:
    """Every route and field. FastAPI's own page would load its script from the net."""
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


def _agent(view: AgentView, serving: Serving) -> dict[str, Any]:
    shown = serving.caller.shown(view.agent_id)
    return agent_fields(view, shown, default_model=serving.default_model)


def _look(fleet: Fleet, num_agents: int) -> tuple[EngineSnapshot, tuple[AgentView, ...]]:
    return fleet.snapshot(), fleet.agents() if num_agents else ()


def _snapshot_fields(snapshot: EngineSnapshot) -> dict[str, Any]:
    fields = asdict(snapshot)
    for name in ("bytes_by_kind", "num_by_kind"):
        fields["pool"][name] = dict(fields["pool"][name])
    return fields


def _json(value: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status_code=status, media_type="application/json")
