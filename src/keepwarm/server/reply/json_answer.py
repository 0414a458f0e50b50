"""JSON answers of routes, and their descriptions for OpenAPI."""

from types import UnionType
from typing import Any

import msgspec
from starlette.responses import Response

STREAMS: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}
}
"""Describes a route that may answer with a stream of events."""


def json_answer(value: object, status: int = 200) -> Response:
    """Answer with the value as JSON."""
    return Response(msgspec.json.encode(value), status_code=status, media_type="application/json")


def errors(body: type | UnionType) -> dict[int | str, dict[str, Any]]:
    """Describe routes whose errors have this body, whatever their status."""
    return {"default": {"model": body, "description": "What is wrong"}}
