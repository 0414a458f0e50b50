"""One connection: bounds in bytes and seconds for a client that is not trusted yet.

It leans on uvicorn's own classes, as of 0.54: `HttpToolsProtocol` with its parser callbacks,
`cycle`, `pipeline`, `send_400_response` and `timeout_keep_alive_handler`, and, for HTTP/1.0,
`RequestResponseCycle.chunked_encoding` and `.expected_content_length`. Where a later version
renames one, tests/server/test_bounds.py and test_pressure.py fail.
"""

import asyncio
import logging
from collections.abc import Mapping
from functools import partial
from http import HTTPStatus
from typing import Any, NoReturn

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from keepwarm.server.dialects.openai.encode import error_body
from keepwarm.server.edge.scope_keys import CONNECTIONS
from keepwarm.server.problems import Kind, Problem
from keepwarm.server.settings import ServerConfig

LINGER_S = 5.0
"""How long a refused client may go on sending what is not read any more. Closing a connection while
something is unread resets it, and the client would lose its answer."""
DRAIN_PAUSE_S = 0.05
"""The pause between two reads of what a refused client still sends: it may come as fast as memory
copies, and the processor is the model's."""
MAX_HEADERS = 256
"""The most headers of a request: a short one takes more memory than bytes on the wire."""
MAX_PIPELINED = 16
"""The most requests that wait on one connection for the reply to an earlier one."""
MAX_REFUSED = 64
"""How many connections beyond the bound are answered with 503; further ones are dropped."""

_PIECE_BYTES = 64 << 10
"""How much is parsed between two looks at how much is unread."""

_log = logging.getLogger(__name__)


class Connection(HttpToolsProtocol):
    """uvicorn's protocol, with bounds in bytes and seconds.

    The parser keeps what it has not handed on yet, a head or the trailers of a body, and only that
    can grow: `_num_unread_bytes` counts it. Bodies are bounded by `BoundedBody`, which knows when
    the application waits for them. A client that does not read its answer is cut off here, after
    `slow_reader_s`: replies and exports rely on that.
    """

    def __init__(self, *arguments: Any, bounds: ServerConfig, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._bounds = bounds
        self._num_unread_bytes = 0
        self._awaits_head = True
        self._exceeds_bound = False
        self._has_refused = False
        self._refusal: Problem | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._reader_timer: asyncio.TimerHandle | None = None

    # -- what the client sends

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.app = partial(_with, {CONNECTIONS: self.connections}, self.config.loaded_app)
        num_beyond = len(self.connections) - self._bounds.max_connections
        self._exceeds_bound = num_beyond > 0
        if num_beyond > MAX_REFUSED:
            transport.abort()
        self._set_deadline(LINGER_S if self._exceeds_bound else self._bounds.head_timeout_s)

    def data_received(self, data: bytes) -> None:
        if self._awaits_head:
            self._set_deadline(self._bounds.head_timeout_s)
        # In pieces, because a head that is too long is noticed only after each.
        for start in range(0, len(data), _PIECE_BYTES):
            if self._has_refused or self.transport.is_closing():
                break
            self._read(data[start : start + _PIECE_BYTES])
        if self._has_refused:
            self._drain_slowly()

    def _read(self, piece: bytes) -> None:
        if self._exceeds_bound:
            self._refuse(self._too_many_connections())
            return
        self._num_unread_bytes += len(piece)
        super().data_received(piece)
        if self._num_unread_bytes > self._bounds.max_head_bytes:
            self._refuse(self._head_too_large())

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._awaits_head:
            return  # a trailer, which follows the body
        if len(self.headers) >= MAX_HEADERS:
            message = f"there are more than {MAX_HEADERS} headers"
            self._stop_parser(Problem(431, Kind.TOO_LARGE, message))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        fields = sum(len(name) + len(value) + len(": \r\n") for name, value in self.headers)
        if len(self.url) + fields > self._bounds.max_head_bytes:
            self._stop_parser(self._head_too_large())
        if len(self.pipeline) >= MAX_PIPELINED:
            message = f"more than {MAX_PIPELINED} requests wait on this connection"
            self._stop_parser(Problem(400, Kind.INVALID, message))
        self._clear_deadline()
        self._awaits_head = False
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._num_unread_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._num_unread_bytes = 0
        self._awaits_head = True
        if self.cycle.response_complete:
            self._clear_deadline()
            self._set_deadline(self._bounds.head_timeout_s)

    # -- what the client is sent

    def on_response_complete(self) -> None:
        super().on_response_complete()
        # `close` waits until the client has read all, and writing is not paused for a short answer.
        if self.transport.is_closing():
            self._watch_reader()
        elif self.cycle.response_complete and self.cycle.more_body:
            self._set_deadline(LINGER_S)

    def timeout_keep_alive_handler(self) -> None:
        """End an idle connection. uvicorn's `close` would wait until the client has read all."""
        self.transport.abort()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._unwatch_reader()

    def connection_lost(self, exc: Exception | None) -> None:
        self._clear_deadline()
        self._unwatch_reader()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Refuse what uvicorn's parser, or a callback above, has stopped at. uvicorn calls this."""
        self._refuse(self._refusal or Problem(400, Kind.INVALID, msg))

    # -- inside

    def _set_deadline(self, seconds: float) -> None:
        """Give the client this long to send what comes next; an earlier deadline stays."""
        if self._deadline is None:
            self._deadline = self.loop.call_later(seconds, self._on_deadline)

    def _clear_deadline(self) -> None:
        """Note that what was expected has come."""
        self._num_unread_bytes = 0
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _watch_reader(self) -> None:
        """Abort the connection unless the client reads what it was sent, within `slow_reader_s`."""
        if self._reader_timer is None:
            limit_s = self._bounds.slow_reader_s
            self._reader_timer = self.loop.call_later(limit_s, self.transport.abort)

    def _unwatch_reader(self) -> None:
        if self._reader_timer is not None:
            self._reader_timer.cancel()
            self._reader_timer = None

    def _on_deadline(self) -> None:
        self._deadline = None
        if self._has_refused:
            self.transport.abort()
        elif self._exceeds_bound:
            self._refuse(self._too_many_connections())
        elif self._is_answering:
            self._set_deadline(self._bounds.head_timeout_s)
        elif self._num_unread_bytes and self._awaits_head:
            seconds = self._bounds.head_timeout_s
            self._refuse(Problem(408, Kind.INVALID, f"no whole head came in {seconds:g} seconds"))
        else:
            self.transport.abort()

    @property
    def _is_answering(self) -> bool:
        cycle: RequestResponseCycle | None = self.cycle
        return cycle is not None and not cycle.response_complete

    def _refuse(self, problem: Problem) -> None:
        """Answer with the problem, unless a reply is under way, and read nothing more."""
        self._has_refused = True
        _log.info("refused a connection: %s", problem.message)
        if self._is_answering:
            self.transport.abort()
            return
        self.transport.write(_document(problem))
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._clear_deadline()
        self._set_deadline(LINGER_S)

    def _drain_slowly(self) -> None:
        """Pause reading for a moment; what is read after a refusal is thrown away."""
        if not self.transport.is_closing():
            self.transport.pause_reading()
            self.loop.call_later(DRAIN_PAUSE_S, self._read_on)

    def _read_on(self) -> None:
        if not self.transport.is_closing():
            self.transport.resume_reading()

    def _stop_parser(self, problem: Problem) -> NoReturn:
        """Raise out of one of the parser's callbacks; uvicorn then calls `send_400_response`."""
        self._refusal = problem
        raise _Refused

    def _head_too_large(self) -> Problem:
        limit = self._bounds.max_head_bytes
        message = f"request line and headers are larger than {limit:,} bytes"
        return Problem(431, Kind.TOO_LARGE, message)

    def _too_many_connections(self) -> Problem:
        message = f"there are {self._bounds.max_connections:,} connections; see max_connections"
        return Problem(503, Kind.OVERLOADED, message, retry_after_s=5)


class _Refused(Exception):
    """Stops the parser in the middle of a piece."""


def _document(problem: Problem) -> bytes:
    """Write a whole response, in OpenAI's shape: the dialect is not known yet."""
    body = error_body(problem)
    head = [
        f"HTTP/1.1 {problem.status} {HTTPStatus(problem.status).phrase}",
        "content-type: application/json",
        f"content-length: {len(body)}",
        "connection: close",
    ]
    if problem.retry_after_s is not None:
        head.append(f"retry-after: {problem.retry_after_s}")
    return "\r\n".join([*head, "", ""]).encode() + body


async def _with(
    facts: Mapping[str, object], app: ASGIApp, scope: Scope, receive: Receive, send: Send
) -> None:
    """Call the application with these facts in its scope."""
    scope.update(facts)
    if scope["type"] == "http" and scope["http_version"] == "1.0":
        send = _UntilClosed(send)
    await app(scope, receive, send)


class _UntilClosed:
    """Sends a stream without chunks to a client of HTTP/1.0, for which it ends by closing.

    uvicorn sends chunks to every client. nginx uses HTTP/1.0 unless it is told otherwise.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self._cycle: Any = send.__self__  # type: ignore[attr-defined]
        self._has_length = True

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._has_length = "content-length" in Headers(raw=message.get("headers", []))
            if not self._has_length:
                self._cycle.chunked_encoding = False
        elif not self._has_length:
            self._cycle.expected_content_length = len(message.get("body", b""))
        await self._send(message)
