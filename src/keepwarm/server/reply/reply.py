"""A reply on its way to its client: streamed or whole, watched for a client that has gone."""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Protocol

from starlette.responses import Response
from starlette.types import Message as AsgiMessage
from starlette.types import Receive, Scope, Send

from keepwarm.core.errors import EngineStopped, KeepwarmError
from keepwarm.core.events import Completed, Delta, Event, Started
from keepwarm.server.problems import Problem, problem_of
from keepwarm.server.reply.choices import Choices
from keepwarm.server.reply.facts import headers_of
from keepwarm.server.reply.tasks import disconnected, ended
from keepwarm.server.settings import ServerConfig

SSE = "text/event-stream; charset=utf-8"
HEARTBEAT = b": keepwarm\n"
"""A comment before the next event. Many clients take a blank line behind it for an empty event,
and some end there: openai-go before 3.43 is one of them.
"""
STREAM_HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}
"""Against proxies that collect what they pass on; the second is nginx's."""
ABORT = "keepwarm.abort"
"""Where a scope has what closes its connection, whatever has not been read of it."""

_SOON_S = 0.001

_log = logging.getLogger(__name__)


class Encoder(Protocol):
    """A dialect's way of saying events. Each method returns bytes to send, perhaps none.

    `heartbeat` says that the request still lives, between any two events.
    """

    heartbeat: bytes

    def event(self, choice: int, event: Event) -> bytes: ...

    def finish(self) -> bytes:
        """After every choice has ended."""
        ...

    def failed(self, problem: Problem) -> bytes:
        """The stream ends here, after it had begun."""
        ...

    def whole(self, ends: Sequence[Completed]) -> bytes:
        """The same as one JSON document."""
        ...


class _Reply(Response):
    """Ends the request in the engine when its client hangs up, in whichever phase it is.

    One task submits the request, owns its streams and answers; it is cancelled when the client has
    gone, and its end is their end. The other one watches the client: a request may wait for long.
    """

    def __init__(self, choices: Choices, encoder: Encoder, headers: Mapping[str, str]) -> None:
        self._choices = choices
        self._encoder = encoder
        self._extra_headers = headers
        self._abort: Callable[[], None] | None = None
        self._answering: asyncio.Task[None] | None = None
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._abort = scope.get(ABORT)
        self._answering = asyncio.create_task(self._answer(send))
        tasks = (self._answering, asyncio.create_task(disconnected(receive)))
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            # The server stops, and has waited for as long as it may.
            await ended(tasks)
            await self._fail(send, EngineStopped())
        finally:
            await ended(tasks)
        if not self._answering.cancelled():
            self._answering.result()

    async def _answer(self, send: Send) -> None:
        raise NotImplementedError

    async def _fail(self, send: Send, error: Exception) -> None:
        """Say so where that is possible; otherwise raise it."""
        raise error

    def _head(self, media_type: str, event: Started | Completed | None) -> AsgiMessage:
        headers = {"content-type": media_type, "cache-control": "no-store", **self._extra_headers}
        if media_type == SSE:
            headers |= STREAM_HEADERS
        if event is not None:
            headers |= headers_of(event)
        raw = [(key.lower().encode(), value.encode("latin-1")) for key, value in headers.items()]
        return {"type": "http.response.start", "status": 200, "headers": raw}


class WholeReply(_Reply):
    """One JSON document when all choices have ended."""

    async def _answer(self, send: Send) -> None:
        async with aclosing(self._choices.events()) as events:
            ends = {choice: event async for choice, event in events if isinstance(event, Completed)}
        body = self._encoder.whole([ends[choice] for choice in sorted(ends)])
        self._extra_headers = {**self._extra_headers, "content-length": str(len(body))}
        await send(self._head("application/json", ends[0]))
        await send({"type": "http.response.body", "body": body})


class StreamedReply(_Reply):
    """Server-sent events as they come; a heartbeat where nothing came for a while.

    The head is sent when it is known what was reused of the prompt, or with the first heartbeat. A
    request that fails before that gets a status of its own.
    """

    def __init__(
        self,
        choices: Choices,
        encoder: Encoder,
        headers: Mapping[str, str],
        config: ServerConfig,
    ) -> None:
        super().__init__(choices, encoder, headers)
        self._config = config
        self._has_begun = False

    async def _answer(self, send: Send) -> None:
        try:
            await self._stream(_Writer(send))
        except Exception as error:  # noqa: BLE001 - the edge: whatever it is, the client is told
            await self._fail(send, error)

    async def _stream(self, writer: "_Writer") -> None:
        minding = asyncio.create_task(self._mind(writer))
        try:
            async with aclosing(self._choices.events()) as events:
                async for choice, event in events:
                    await self._pass_on(writer, choice, event)
            await writer.write(self._encoder.finish())
            await writer.end()
        finally:
            await ended([minding])

    async def _pass_on(self, writer: "_Writer", choice: int, event: Event) -> None:
        if not self._has_begun and isinstance(event, Started | Delta | Completed):
            await self._begin(writer, event if not isinstance(event, Delta) else None)
        data = self._encoder.event(choice, event)
        if data and self._has_begun:
            await writer.write(data)

    async def _begin(self, writer: "_Writer", event: Started | Completed | None) -> None:
        self._has_begun = True
        await writer.send(self._head(SSE, event))

    async def _fail(self, send: Send, error: Exception) -> None:
        if not self._has_begun:
            raise error
        if not isinstance(error, KeepwarmError):
            _log.error("a reply broke off", exc_info=error)
        last = self._encoder.failed(problem_of(error))
        try:
            async with asyncio.timeout(self._config.slow_reader_s):
                await send({"type": "http.response.body", "body": last})
        except TimeoutError:
            self._cut_off()

    async def _mind(self, writer: "_Writer") -> None:
        """Break the silence, and cut off a client that does not read."""
        while True:
            await asyncio.sleep(writer.next_look_s(self._config))
            if writer.is_stuck(self._config.slow_reader_s):
                self._cut_off()
                return
            if writer.is_silent(self._config.heartbeat_s):
                if not self._has_begun:
                    await self._begin(writer, None)
                await writer.write(self._encoder.heartbeat)

    def _cut_off(self) -> None:
        """The client does not read: the reply ends, and with it the connection."""
        if self._answering is not None:
            self._answering.cancel()
        if self._abort is not None:
            self._abort()


class _Writer:
    """Sends one message at a time, and knows since when."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._now = asyncio.get_running_loop().time
        self._lock = asyncio.Lock()
        self._last_s = self._now()
        self._is_sending = False

    async def write(self, data: bytes) -> None:
        if data:
            await self.send({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self) -> None:
        await self.send({"type": "http.response.body", "body": b""})

    async def send(self, message: AsgiMessage) -> None:
        async with self._lock:
            self._last_s = self._now()
            self._is_sending = True
            await self._send(message)
            self._is_sending = False

    def next_look_s(self, config: ServerConfig) -> float:
        """Until it may have been silent, or stuck, for too long."""
        since_s = self._now() - self._last_s
        if self._is_sending:
            return max(config.slow_reader_s - since_s, _SOON_S)
        return max(min(config.heartbeat_s - since_s, config.slow_reader_s), _SOON_S)

    def is_stuck(self, limit_s: float) -> bool:
        """Whether a message has been on its way for so long: the client does not read."""
        return self._is_sending and self._now() - self._last_s >= limit_s

    def is_silent(self, limit_s: float) -> bool:
        return not self._is_sending and self._now() - self._last_s >= limit_s
