"""Requests as bytes on sockets of their own, which cost the sender next to nothing."""

import asyncio
import json
from collections.abc import AsyncIterator

from keepwarm.bench.requiring import require

HOST = "127.0.0.1"
READ_BYTES = 1 << 16
ANSWER_S = 60.0
"""How long the server may take over one ordinary request."""
CLOSE = "Connection: close"


def head(method: str, path: str, num_bytes: int, *headers: str) -> bytes:
    """Return the head of a request whose body has `num_bytes` bytes of JSON."""
    more = (
        f"Host: {HOST}",
        "Content-Type: application/json",
        f"Content-Length: {num_bytes}",
        *headers,
    )
    return "\r\n".join((f"{method} {path} HTTP/1.1", *more, "", "")).encode()


def posted(path: str, body: object, *headers: str) -> bytes:
    """Return a whole request."""
    data = json.dumps(body).encode()
    return head("POST", path, len(data), *headers) + data


async def ask(port: int, method: str, path: str, body: object = None) -> tuple[int, bytes]:
    """Return the answer's status and body, to a request on a connection of its own."""
    data = b"" if body is None else json.dumps(body).encode()
    async with asyncio.timeout(ANSWER_S):
        reader, writer = await asyncio.open_connection(HOST, port)
        try:
            writer.write(head(method, path, len(data), CLOSE) + data)
            top, _, answer = (await reader.read(-1)).partition(b"\r\n\r\n")
            return int(top.split()[1]), answer
        finally:
            writer.close()


async def streamed(port: int, path: str, body: object) -> AsyncIterator[bytes]:
    """Yield a stream as it comes, to its end. Raises PathNotTaken where it breaks off."""
    reader, writer = await asyncio.open_connection(HOST, port)
    received = b""
    try:
        writer.write(posted(path, body))
        while b"[DONE]" not in received:
            data = await reader.read(READ_BYTES)
            require(bool(data), f"a stream broke off: {received[-200:]!r}")
            yield data
            received = received[-200:] + data
    finally:
        writer.close()
