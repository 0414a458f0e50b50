"""A request's JSON: bounded, and parsed without delaying other requests."""

import asyncio
import json
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

import msgspec
from fastapi import Request, Response
from fastapi.routing import APIRoute

from keepwarm.core.errors import InvalidRequest, TooManyMessages
from keepwarm.engine.reply.stop_strings import check_num_stops
from keepwarm.server.serving import Shared

MAX_OBJECTS = 150_000
"""The most objects and lists in a body: each takes many times its length in memory."""
MAX_VALUES = 600_000
"""The most names and values in a body. A prompt's token ids are values."""
MAX_BIASES = 1024
"""The most entries of a `logit_bias`."""
LARGE_BYTES = 256 << 10
"""The size from which a body is parsed on another thread."""


class BodyRoute(APIRoute):
    """A route whose JSON body is bounded before it is parsed and validated."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_bounded(request: Request) -> Response:
            return await handle(_BoundedRequest(request.scope, request.receive))

        return handle_bounded


class _BoundedRequest(Request):
    async def json(self) -> Any:
        """Parse the body. Raises InvalidRequest where it exceeds a bound, and JSONDecodeError."""
        body = await self.body()
        shared: Shared = self.app.state.shared
        shared.memory.came(len(body))
        value = await asyncio.to_thread(parse, body) if len(body) > LARGE_BYTES else parse(body)
        check_sizes(value, max_messages=shared.config.max_messages)
        return value


def parse(body: bytes) -> Any:
    """Parse JSON. Raises InvalidRequest where it exceeds a bound, and JSONDecodeError."""
    _check_amount(body)
    try:
        return msgspec.json.decode(body)  # three times as fast as `json`
    except msgspec.DecodeError:
        return json.loads(body)  # takes half surrogates, and says where the body is wrong


def check_sizes(body: object, *, max_messages: int) -> None:
    """Refuse lists that are too long, before each item is validated.

    Raises InvalidRequest and TooManyMessages.
    """
    if not isinstance(body, Mapping):
        return
    messages = body.get("messages")
    if isinstance(messages, list):
        num_messages = _num_messages(messages)
        if num_messages > max_messages:
            raise TooManyMessages(num_messages=num_messages, max_messages=max_messages)
    for field in ("stop", "stop_sequences"):
        if isinstance(stops := body.get(field), list):
            check_num_stops(field, len(stops))
    biases = body.get("logit_bias")
    if isinstance(biases, Mapping | list) and len(biases) > MAX_BIASES:
        problem = f"has {len(biases)} entries; at most {MAX_BIASES} are taken"
        raise InvalidRequest("logit_bias", problem)


def _num_messages(messages: list[object]) -> int:
    """Count the messages, each as one or as the number of parts of its content."""
    contents = (m.get("content") if isinstance(m, Mapping) else None for m in messages)
    return sum(max(len(content), 1) if isinstance(content, list) else 1 for content in contents)


def _check_amount(body: bytes) -> None:
    """Raise InvalidRequest for too many objects or values.

    Text may have braces and commas, so a body with many of them is counted more closely.
    """
    if _is_taken(*_amount(body, 0, len(body))) or _is_taken(*_amount_outside_of_text(body)):
        return
    problem = f"has more than {MAX_OBJECTS} objects and lists, or {MAX_VALUES} names and values"
    raise InvalidRequest("body", problem)


def _is_taken(num_objects: int, num_values: int) -> bool:
    return num_objects <= MAX_OBJECTS and num_values <= MAX_VALUES


def _amount(body: bytes, start: int, end: int) -> tuple[int, int]:
    """Count the marks of objects and lists, and of names and values, inside of text as well."""
    count = body.count
    num_objects = count(b"{", start, end) + count(b"[", start, end)
    return num_objects, count(b",", start, end) + count(b":", start, end)


def _amount_outside_of_text(body: bytes) -> tuple[int, int]:
    """Count objects and values outside of strings, until there are too many.

    A loop over strings and no regular expression over the body, which would keep other threads
    waiting.
    """
    body = body.replace(b"\\\\", b"").replace(b'\\"', b"")  # every quote that is left is an end
    num_objects = num_values = position = 0
    while 0 <= position < len(body) and _is_taken(num_objects, num_values):
        quote = body.find(b'"', position)
        end = len(body) if quote < 0 else quote
        more_objects, more_values = _amount(body, position, end)
        num_objects += more_objects
        num_values += more_values
        position = body.find(b'"', end + 1) + 1 or len(body)
    return num_objects, num_values
