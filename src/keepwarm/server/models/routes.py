"""`/v1/models`: lists models with their states, and brings them in and out of memory."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Mapping
from datetime import UTC, datetime

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response, StreamingResponse

from keepwarm.server.dialects.agents.encode import error_body
from keepwarm.server.dialects.anthropic.encode import AnthropicErrorBody
from keepwarm.server.dialects.errors import is_anthropic
from keepwarm.server.dialects.openai.encode import OpenAIErrorBody
from keepwarm.server.models.cards import (
    AnthropicModel,
    AnthropicModelPage,
    ModelList,
    ServedModel,
)
from keepwarm.server.problems import problem_of
from keepwarm.server.reply.json_answer import STREAMS, errors, json_answer
from keepwarm.server.reply.sse import HEARTBEAT, SSE, STREAM_HEADERS, frame
from keepwarm.server.serving import AdminServingOf, Serving, ServingOf
from keepwarm.service.model_registry import Model

router = APIRouter(tags=["models"], responses=errors(OpenAIErrorBody | AnthropicErrorBody))

_encode = msgspec.json.Encoder().encode

POLL_S = 0.1
"""The pause between two looks at a model's state."""


@router.get("/v1/models", response_model=ModelList | AnthropicModelPage)
async def models(request: Request, serving: ServingOf) -> Response:
    """List the models that requests may name, in the client's dialect."""
    known = list(serving.shared.models.registry)
    if is_anthropic(request.scope):
        cards = [_anthropic_card(model, serving) for model in known]
        return json_answer(AnthropicModelPage(cards, cards[0].id, cards[-1].id))
    num_agents = await _num_agents(serving)
    return json_answer(ModelList([_card_of(model, serving, num_agents) for model in known]))


@router.get("/v1/models/{name:path}", response_model=ServedModel | AnthropicModel)
async def model(name: str, request: Request, serving: ServingOf) -> Response:
    """Show one model, in the client's dialect."""
    found = serving.known_model(name)
    if is_anthropic(request.scope):
        return json_answer(_anthropic_card(found, serving))
    return json_answer(await _card(found, serving))


@router.post("/v1/models/{name:path}/load", response_model=ServedModel, responses=STREAMS)
async def load(name: str, request: Request, serving: AdminServingOf) -> Response:
    """Bring the model into memory; others make room where they have to.

    With `Accept: text/event-stream`, its states are sent as they change.
    """
    wanted = serving.model(name)
    return await _brought(wanted, request, serving, serving.shared.models.load(wanted.name))


@router.post("/v1/models/{name:path}/unload", response_model=ServedModel, responses=STREAMS)
async def unload(name: str, request: Request, serving: AdminServingOf) -> Response:
    """Take the model out of memory; its agents stay, and what it was answering brings it back."""
    wanted = serving.known_model(name)
    return await _brought(wanted, request, serving, serving.shared.models.unload(wanted.name))


async def _card(model: Model, serving: Serving) -> ServedModel:
    return _card_of(model, serving, await _num_agents(serving))


async def _num_agents(serving: Serving) -> Mapping[str, int]:
    """Count, by model, the caller's agents that talked to it last."""
    return await serving.engine.call(lambda fleet: fleet.count_agents(serving.caller.owns))


def _card_of(model: Model, serving: Serving, num_agents: Mapping[str, int]) -> ServedModel:
    created = serving.shared.started
    number = num_agents.get(model.name, 0)
    return ServedModel.of_model(model, serving.caller, created=created, num_agents=number)


def _anthropic_card(model: Model, serving: Serving) -> AnthropicModel:
    created = datetime.fromtimestamp(serving.shared.started, UTC)
    shown = created.isoformat(timespec="seconds").replace("+00:00", "Z")
    return AnthropicModel(id=model.name, display_name=model.name, created_at=shown)


async def _brought(
    model: Model, request: Request, serving: Serving, bringing: Awaitable[None]
) -> Response:
    if SSE not in request.headers.get("accept", ""):
        await bringing
        return json_answer(await _card(model, serving))
    events = _progress(model, serving, bringing)
    return StreamingResponse(events, media_type=SSE, headers=STREAM_HEADERS)


async def _progress(
    model: Model, serving: Serving, bringing: Awaitable[None]
) -> AsyncIterator[bytes]:
    """Send an event `state` for each state, heartbeats in between, and `done` or `error` at last.

    Loading goes on when the client disconnects.
    """
    begun = time.monotonic()
    task = asyncio.ensure_future(bringing)
    shown = ""
    said_s = begun
    while not task.done():
        now = time.monotonic()
        if model.state.value != shown:
            shown, said_s = model.state.value, now
            state = {"state": shown, "elapsed_s": round(now - begun, 3)}
            yield frame("state", _encode(state))
        elif now - said_s >= serving.config.heartbeat_s:
            said_s = now
            yield HEARTBEAT
        await asyncio.wait({task}, timeout=POLL_S)
    error = task.exception()
    if isinstance(error, Exception):
        problem = problem_of(error)
        yield frame("error", error_body(problem))
    else:
        yield frame("done", _encode(await _card(model, serving)))
