"""How routes answer with JSON, and how they say what they answer."""

from types import UnionType
from typing import Any

import msgspec
from starlette.responses import Response

STREAMS: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}
}
"""The description of a route that may answer with events."""


def json_answer(value: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status_code=status, media_type="application/json")


def errors(body: type | UnionType) -> dict[int | str, dict[str, Any]]:
    """The description of routes whose errors look like this, whatever their status."""
    return {"default": {"model": body, "description": "What is wrong"}}
