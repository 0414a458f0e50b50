"""`/v1/agents` and all paths below it. Names in paths are without the caller's namespace."""

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Annotated

from fastapi import APIRouter, Header, Query, Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from keepwarm.core.errors import (
    AgentExists,
    BadBundle,
    DeletionRefused,
    InvalidRequest,
)
from keepwarm.core.stored import AgentSettings
from keepwarm.engine.agents.agent_view import AgentView
from keepwarm.engine.agents.commits import Commit
from keepwarm.engine.agents.transfer import ExportSummary, ImportSummary
from keepwarm.engine.batch_engine import BlockPoolBatchEngine
from keepwarm.engine.requests import GenerateRequest, ReceiptKey, valid_name
from keepwarm.fleet.fleet import Fleet
from keepwarm.server.dialects.agents.answers import (
    AgentDeleted,
    AgentDetails,
    AgentErrorBody,
    AgentPage,
    AgentReply,
    AgentTurns,
    AgentVerified,
    TurnCard,
    card_of,
    details_of,
)
from keepwarm.server.dialects.agents.encode import AgentEncoder
from keepwarm.server.dialects.agents.schema import AgentBody, ForkBody, MessagesBody, RollbackBody
from keepwarm.server.dialects.fields import limit_of, seed_of, stops_of, time_limits
from keepwarm.server.dialects.json_body import BodyRoute
from keepwarm.server.problems import Unsupported
from keepwarm.server.reply.json_answer import STREAMS, errors, json_answer
from keepwarm.server.reply.tasks import unless_disconnected
from keepwarm.server.reply.transfers import SentFile, Unanswered, remove
from keepwarm.server.serving import Serving, ServingOf

router = APIRouter(
    prefix="/v1/agents",
    route_class=BodyRoute,
    tags=["agents"],
    responses=errors(AgentErrorBody),
)

MAX_PAGE = 1000
SETTINGS = {"pinned", "priority", "quota_bytes", "overflow"}
"""The fields of AgentBody that are settings of the engine's as well."""
BUNDLE_TYPE = "application/x-tar"
_BUNDLE = {"content": {BUNDLE_TYPE: {"schema": {"type": "string", "format": "binary"}}}}


@router.get("", response_model=AgentPage)
async def list_agents(
    serving: ServingOf,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 100,
    after: str | None = None,
) -> Response:
    """List the caller's agents by name, a page at a time; `after` is the last name so far."""
    caller, default = serving.caller, serving.default_model

    def one_more(views: Sequence[AgentView]) -> list[AgentView]:
        mine = {caller.shown(v.agent_id): v for v in views if caller.owns(v.agent_id)}
        names = sorted(name for name in mine if after is None or name > after)
        return [mine[name] for name in names[: limit + 1]]

    views = await serving.engine.agents(one_more)
    page = [card_of(v, caller.shown(v.agent_id), default_model=default) for v in views[:limit]]
    return json_answer(AgentPage(page, len(views) > limit))


@router.put(
    "/{name}",
    response_model=AgentDetails,
    responses={201: {"model": AgentDetails, "description": "The agent is new"}},
)
async def put_agent(name: str, body: AgentBody, serving: ServingOf) -> Response:
    """Create the agent, or change its settings where it exists; may be repeated."""
    if body.kv_policy not in (None, "exact"):
        raise Unsupported("kv_policy", f"{body.kv_policy!r} does not exist yet; only exact does")
    agent_id = serving.caller.agent(name)
    return await _changed(serving, agent_id, lambda fleet: _put(fleet.of(agent_id), agent_id, body))


@router.get("/{name}", response_model=AgentDetails)
async def get_agent(name: str, serving: ServingOf) -> Response:
    """Show the agent with its settings."""
    return await _shown(serving, serving.caller.agent(name))


@router.delete("/{name}", response_model=AgentDeleted)
async def delete_agent(name: str, serving: ServingOf) -> Response:
    """Delete the agent and what only it owned, from the disk as well.

    Where the disk refuses, the answer is 507, and the agent is as it was.
    """
    agent_id = await _stored_agent(serving, name)
    is_gone, _ = await serving.engine.change(lambda fleet: (fleet.delete(agent_id), None))
    if not is_gone:
        raise DeletionRefused(name, await serving.engine.call(lambda fleet: fleet.fault))
    return json_answer(AgentDeleted(name))


@router.post("/{name}/messages", response_model=AgentReply, responses=STREAMS)
async def send(
    name: str,
    body: MessagesBody,
    serving: ServingOf,
    idempotency_key: Annotated[str | None, Header()] = None,
) -> Response:
    """Send the agent a new message; it knows the rest. Each agent answers one message at a time.

    With an `Idempotency-Key`, a request that is sent again runs once, also across a restart; it
    then runs to its end even when the client disconnects.
    """
    agent_id = serving.caller.agent(name)
    model = None if body.model is None else serving.model(body.model)
    at = model or serving.model(await serving.engine.model_of(agent_id))
    config = serving.config_for(at)
    temperature = body.temperature
    request = GenerateRequest(
        agent_id=agent_id,
        append=body.new_messages(),
        max_tokens=limit_of(body.max_tokens),
        temperature=config.default_temperature if temperature is None else temperature,
        top_p=body.top_p or 0.0,
        top_k=body.top_k or 0,
        min_p=body.min_p or 0.0,
        seed=seed_of(body.seed),
        stop=stops_of(body.stop),
        priority=body.priority,
        **time_limits(serving.config),
    )
    key = _receipt_key(idempotency_key, body)
    return await serving.answer(
        [request], AgentEncoder(name), model=model, stream=bool(body.stream), key=key
    )


@router.post("/{name}/fork", status_code=201, response_model=AgentDetails)
async def fork(name: str, body: ForkBody, serving: ServingOf) -> Response:
    """Make a new agent that knows what this one knew after `at_turn` turns; nothing is copied."""
    agent_id, new_id = serving.caller.agent(name), serving.caller.agent(body.new_id)

    def apply(fleet: Fleet) -> tuple[Commit, int]:
        return fleet.fork(agent_id, new_id, at_turn=body.at_turn), 201

    return await _changed(serving, new_id, apply)


@router.post("/{name}/rollback", response_model=AgentDetails)
async def rollback(name: str, body: RollbackBody, serving: ServingOf) -> Response:
    """Forget everything after the given number of turns."""
    agent_id = serving.caller.agent(name)

    def apply(fleet: Fleet) -> tuple[Commit, int]:
        return fleet.of(agent_id).rollback(agent_id, turn=body.turn), 200

    return await _changed(serving, agent_id, apply)


@router.post("/{name}/park", response_model=AgentDetails)
async def park(name: str, serving: ServingOf) -> Response:
    """Save the agent and free its memory; its next turn comes from the disk."""
    agent_id = serving.caller.agent(name)
    return await _changed(serving, agent_id, lambda fleet: (fleet.of(agent_id).park(agent_id), 200))


@router.post("/{name}/prefetch", response_model=AgentDetails)
async def prefetch(name: str, serving: ServingOf) -> Response:
    """Bring the agent's KV back in the background, so that its next turn begins at once."""
    agent_id = serving.caller.agent(name)
    await serving.engine.call_computing(agent_id, lambda engine: engine.prefetch(agent_id))
    return await _shown(serving, agent_id)


@router.post("/{name}/verify", response_model=AgentVerified)
async def verify(name: str, request: Request, serving: ServingOf) -> Response:
    """Compute the agent's KV anew and compare; takes a prefill, beside the requests.

    Any other request for the agent interrupts it, with a 409; blocks that have differed by then are
    dropped.
    """
    agent_id = serving.caller.agent(name)
    report = await unless_disconnected(request, serving.engine.verify(agent_id))
    return json_answer(AgentVerified.of(report, name))


@router.get("/{name}/turns", response_model=AgentTurns)
async def turns(name: str, serving: ServingOf) -> Response:
    """List the agent's turns, with what was said in each."""
    agent_id = serving.caller.agent(name)
    found = await serving.engine.call_at(agent_id, lambda engine: engine.turns(agent_id))
    before = (None, *found)
    rows = [
        TurnCard.of(number, turn, earlier)
        for number, (turn, earlier) in enumerate(zip(found, before, strict=False), 1)
    ]
    return json_answer(AgentTurns(name, rows))


@router.get("/{name}/export", response_class=Response, responses={200: _BUNDLE})
async def export(name: str, request: Request, serving: ServingOf) -> Response:
    """Send the agent with its KV as one file, for another machine.

    While the agent replies, the file has it as its last turn left it. The header
    `X-Keepwarm-Left-Out-Tokens` counts tokens whose KV is not in the file, because the disk had not
    taken it. The file of a damaged agent has what can be read, and `X-Keepwarm-Damage` says what is
    wrong.
    """
    agent_id = await _stored_agent(serving, name)
    transfers = serving.shared.transfers
    with transfers.failing():
        path = await transfers.new_path()

        def begin(fleet: Fleet, answer: "Future[ExportSummary]") -> None:
            fleet.begin_export(agent_id, path, answer)

        try:
            summary = await unless_disconnected(request, serving.engine.work(begin))
        except BaseException as error:
            await remove(path)
            if isinstance(error, ClientDisconnect):
                return Unanswered()
            raise
    return SentFile(
        path,
        media_type=BUNDLE_TYPE,
        headers={
            "Content-Disposition": f'attachment; filename="{_file_name(name)}.keepwarm"',
            "X-Keepwarm-Left-Out-Tokens": str(summary.num_left_out),
            **({"X-Keepwarm-Damage": _header_safe(summary.damage)} if summary.damage else {}),
        },
    )


@router.post(
    "/import",
    status_code=201,
    response_model=ImportSummary,
    openapi_extra={"requestBody": {**_BUNDLE, "required": True}},
)
async def import_agent(
    request: Request, serving: ServingOf, name: Annotated[str | None, Query(alias="id")] = None
) -> Response:
    """Import an agent from a file that `export` made: the body. `id` gives it another name."""
    agent_id = None if name is None else serving.caller.agent(name)
    transfers, namespace = serving.shared.transfers, serving.caller.namespace
    with transfers.failing():
        path = await transfers.new_path()

        def begin(fleet: Fleet, answer: "Future[ImportSummary]") -> None:
            fleet.begin_import(path, agent_id, answer, namespace=namespace)

        try:
            await transfers.receive(request, path)
            summary = await unless_disconnected(request, serving.engine.work(begin))
        except ClientDisconnect:
            return Unanswered()
        except BadBundle as error:
            raise InvalidRequest("body", f"cannot be imported: {error.problem}") from error
        finally:
            await remove(path)
    shown = serving.caller.shown(summary.agent_id)
    return json_answer(replace(summary, agent_id=shown), 201)


# -- inside ----------------------------------------------------------------------------------------


async def _stored_agent(serving: Serving, name: str) -> str:
    """Return the agent's whole name, even where damage has made it an invalid one."""
    try:
        return serving.caller.agent(name)
    except InvalidRequest:
        agent_id = serving.caller.stored_agent(name)
        if not await serving.engine.call(lambda fleet: fleet.is_damaged(agent_id)):
            raise
        return agent_id


def _put(engine: BlockPoolBatchEngine, agent_id: str, body: AgentBody) -> tuple[Commit, int]:
    """Create the agent, or configure it; returns the status.

    Raises AgentExists where it has another system prompt.
    """
    given = body.model_dump(include=SETTINGS, exclude_none=True)
    if not engine.knows(agent_id):
        return engine.create(agent_id, system=body.system, settings=AgentSettings(**given)), 201
    if body.system is not None and body.system != engine.system(agent_id):
        raise AgentExists(agent_id)
    commit = engine.configure(agent_id, **given)
    if "quota_bytes" in body.model_fields_set and body.quota_bytes is None:
        commit = engine.lift_quota(agent_id)
    return commit, 200


async def _changed(
    serving: Serving, agent_id: str, change: Callable[[Fleet], tuple[Commit, int]]
) -> Response:
    """Make a change, which returns a status, and show the agent once the disk has answered."""

    def apply(fleet: Fleet) -> tuple[Commit, tuple[AgentDetails, int]]:
        commit, status = change(fleet)
        return commit, (_details(fleet.of(agent_id), serving, agent_id), status)

    durable, (details, status) = await serving.engine.change(apply)
    return json_answer(replace(details, durable=durable), status)


async def _shown(serving: Serving, agent_id: str) -> Response:
    details = await serving.engine.call_at(
        agent_id, lambda engine: _details(engine, serving, agent_id)
    )
    return json_answer(details)


def _details(engine: BlockPoolBatchEngine, serving: Serving, agent_id: str) -> AgentDetails:
    shown = serving.caller.shown(agent_id)
    card = card_of(engine.agent(agent_id), shown, default_model=serving.default_model)
    return details_of(
        card,
        engine.settings(agent_id),
        engine.system(agent_id),
        durable=engine.is_durable(agent_id),
    )


def _header_safe(text: str) -> str:
    return text.encode("unicode_escape").decode()


def _file_name(name: str) -> str:
    """Return the agent's name, or a stand-in where damage has made it an invalid one."""
    try:
        return valid_name(name)
    except InvalidRequest:
        return "agent"


def _receipt_key(key: str | None, body: MessagesBody) -> ReceiptKey | None:
    """Make the key; its digest covers what the request asks for, not whether it is streamed."""
    if key is None:
        return None
    asked = body.model_dump(exclude={"stream"}, mode="json")
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
    return ReceiptKey(key, digest[:32])
