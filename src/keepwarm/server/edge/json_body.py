"""A request's JSON: how much of it is taken, and parsed where it holds up nobody."""

import asyncio
import json
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

import msgspec
from fastapi import Request, Response
from fastapi.routing import APIRoute

from keepwarm.core.errors import InvalidRequest, TooManyMessages
from keepwarm.engine.prompt.stop_strings import check_num_stops
from keepwarm.server.serving import House

MAX_OBJECTS = 150_000
"""Objects and lists in a body, however deep: each takes many times its length in memory."""
MAX_VALUES = 600_000
"""Names and values in a body. A prompt's ids are values."""
MAX_BIASES = 1024
"""Entries of a `logit_bias`."""
LARGE_BYTES = 256 << 10
"""A larger body is parsed on a thread of its own."""


class BodyRoute(APIRoute):
    """A route whose body is bounded before anything is made of it."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_bounded(request: Request) -> Response:
            return await handle(_BoundedRequest(request.scope, request.receive))

        return handle_bounded


class _BoundedRequest(Request):
    async def json(self) -> Any:
        """Raises InvalidRequest for more than is taken, and JSONDecodeError."""
        body = await self.body()
        house: House = self.app.state.house
        house.memory.came(len(body))
        value = await asyncio.to_thread(parse, body) if len(body) > LARGE_BYTES else parse(body)
        check_sizes(value, max_messages=house.config.max_messages)
        return value


def parse(body: bytes) -> Any:
    """JSON to Python's values. Raises InvalidRequest, and JSONDecodeError."""
    _check_amount(body)
    try:
        return msgspec.json.decode(body)  # three times as fast, and it keeps others as long waiting
    except msgspec.DecodeError:
        return json.loads(body)  # takes half surrogates, and says where the body is wrong


def check_sizes(body: object, *, max_messages: int) -> None:
    """Raise for lists that are longer than anybody needs, before each item is looked at."""
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
    """Each counts as one, or as many as its content has parts."""
    contents = (m.get("content") if isinstance(m, Mapping) else None for m in messages)
    return sum(max(len(content), 1) if isinstance(content, list) else 1 for content in contents)


def _check_amount(body: bytes) -> None:
    """Text may have braces and commas; only where they are many is it looked at more closely."""
    if _is_taken(*_amount(body, 0, len(body))) or _is_taken(*_amount_outside_of_text(body)):
        return
    problem = f"has more than {MAX_OBJECTS} objects and lists, or {MAX_VALUES} names and values"
    raise InvalidRequest("body", problem)


def _is_taken(num_objects: int, num_values: int) -> bool:
    return num_objects <= MAX_OBJECTS and num_values <= MAX_VALUES


def _amount(body: bytes, start: int, end: int) -> tuple[int, int]:
    """Objects and lists, and names and values, if there is no text between these positions."""
    count = body.count
    num_objects = count(b"{", start, end) + count(b"[", start, end)
    return num_objects, count(b",", start, end) + count(b":", start, end)


def _amount_outside_of_text(body: bytes) -> tuple[int, int]:
    """As far as it is taken: what is behind that is not looked at.

    One string after the other, so that other threads get their turns.
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
