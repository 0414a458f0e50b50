"""Writes errors in the dialect that a path speaks, also where no route has seen the request."""

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Scope

from keepwarm.server.dialects.agents import encode as agents
from keepwarm.server.dialects.anthropic import encode as anthropic
from keepwarm.server.dialects.openai import encode as openai
from keepwarm.server.edge.scope_keys import REQUEST_ID
from keepwarm.server.problems import Problem


def error_response(scope: Scope, problem: Problem) -> Response:
    """Answer with the problem, in the shape that the client of this path expects."""
    headers = dict(problem.headers)
    if problem.retry_after_s is not None:
        headers["Retry-After"] = str(problem.retry_after_s)
    if problem.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return Response(
        _body(scope, problem),
        status_code=problem.status,
        media_type="application/json",
        headers=headers,
    )


def is_anthropic(scope: Scope) -> bool:
    """Whether the request is Anthropic's: by its path, or by its header on a shared path."""
    path: str = scope["path"]
    shared = path.startswith("/v1/models")
    return path.startswith("/v1/messages") or (
        shared and "anthropic-version" in Headers(scope=scope)
    )


def _body(scope: Scope, problem: Problem) -> bytes:
    if is_anthropic(scope):
        return anthropic.error_body(problem, scope.get(REQUEST_ID, ""))
    path: str = scope["path"]
    if path.startswith("/v1/agents"):
        return agents.error_body(problem)
    return openai.error_body(problem)
