"""Bounds a request's body as it comes, in bytes and in seconds."""

import asyncio
import time

from starlette.types import Message, Receive

from keepwarm.server.problems import Kind, NotAllowed, Problem

BYTES_PER_S = 16 << 10
"""The slowest upload that is waited for, once the first `patience_s` are over."""


class BoundedBody:
    """Receives for the application. Raises NotAllowed for a body that is too large or too slow.

    Only time spent waiting for the client counts, not the application's own.
    """

    def __init__(self, receive: Receive, *, max_bytes: int, patience_s: float) -> None:
        self._receive = receive
        self._max_bytes = max_bytes
        self._patience_s = patience_s
        self._num_bytes = 0
        self._waited_s = 0.0
        self._is_whole = False

    async def __call__(self) -> Message:
        message = await (self._receive() if self._is_whole else self._next_part())
        self._is_whole = not message.get("more_body", False)
        self._num_bytes += len(message.get("body", b""))
        if self._num_bytes > self._max_bytes:
            raise NotAllowed(too_large(self._max_bytes))
        return message

    async def _next_part(self) -> Message:
        allowed_s = self._patience_s + self._num_bytes / BYTES_PER_S
        began = time.monotonic()
        try:
            async with asyncio.timeout(allowed_s - self._waited_s):
                return await self._receive()
        except TimeoutError:
            message = f"the body was waited for for {allowed_s:.3g} seconds; see body_timeout_s"
            raise NotAllowed(Problem(408, Kind.INVALID, message, "body")) from None
        finally:
            self._waited_s += time.monotonic() - began


def too_large(limit: int) -> Problem:
    """Say that a body exceeds `limit` bytes."""
    return Problem(413, Kind.TOO_LARGE, f"the body is larger than {limit:,} bytes", "body")
