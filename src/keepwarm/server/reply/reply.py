"""A reply on its way to its client: streamed or whole, and ended when the client disconnects."""

import asyncio
import logging
from collections.abc import Mapping, Sequence
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
from keepwarm.server.reply.sse import SSE, STREAM_HEADERS
from keepwarm.server.reply.tasks import disconnected, ended

_log = logging.getLogger(__name__)


class Encoder(Protocol):
    """A dialect's way of writing events. Each method returns bytes to send, perhaps none.

    `heartbeat` may be sent between any two events.
    """

    heartbeat: bytes

    def event(self, choice: int, event: Event) -> bytes: ...

    def finish(self) -> bytes:
        """End the stream after every choice has ended."""
        ...

    def failed(self, problem: Problem) -> bytes:
        """End the stream with an error, after it had begun."""
        ...

    def whole(self, ends: Sequence[Completed]) -> bytes:
        """Write all choices as one JSON document."""
        ...


class _Reply(Response):
    """Ends the request in the engine when its client disconnects, in whichever phase it is.

    One task submits the request, owns its streams and answers. Another one watches the client,
    because a request may wait for long before anything is sent; it cancels the first.
    """

    def __init__(self, choices: Choices, encoder: Encoder, headers: Mapping[str, str]) -> None:
        self._choices = choices
        self._encoder = encoder
        self._extra_headers = headers
        self.background = None  # FastAPI reads and sets it on every response

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answering = asyncio.create_task(self._answer(send))
        tasks = (answering, asyncio.create_task(disconnected(receive)))
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            # The server stops, and its grace period is over.
            await ended(tasks)
            await self._fail(send, EngineStopped())
        finally:
            await ended(tasks)
        if not answering.cancelled():
            answering.result()

    async def _answer(self, send: Send) -> None:
        raise NotImplementedError

    async def _fail(self, send: Send, error: Exception) -> None:
        """Tell the client where that is possible; otherwise raise the error."""
        raise error

    def _head(self, own: Mapping[str, str], event: Started | Completed | None) -> AsgiMessage:
        headers = {**own, **self._extra_headers, **(headers_of(event) if event else {})}
        raw = [(key.lower().encode(), value.encode("latin-1")) for key, value in headers.items()]
        return {"type": "http.response.start", "status": 200, "headers": raw}


class WholeReply(_Reply):
    """One JSON document when all choices have ended."""

    async def _answer(self, send: Send) -> None:
        async with aclosing(self._choices.events()) as events:
            ends = {choice: event async for choice, event in events if isinstance(event, Completed)}
        body = self._encoder.whole([ends[choice] for choice in sorted(ends)])
        headers = {
            "content-type": "application/json",
            "cache-control": "no-store",
            "content-length": str(len(body)),
        }
        await send(self._head(headers, ends[0]))
        await send({"type": "http.response.body", "body": body})


class StreamedReply(_Reply):
    """Server-sent events as they come; a heartbeat where none came for `heartbeat_s` seconds.

    The head is sent when it is known what was reused of the prompt, or with the first heartbeat. A
    request that fails before that gets an error status. A client that does not read is not watched
    here: `send` waits for it, and its connection ends after `slow_reader_s`, which ends the reply.
    """

    def __init__(
        self,
        choices: Choices,
        encoder: Encoder,
        headers: Mapping[str, str],
        *,
        heartbeat_s: float,
    ) -> None:
        super().__init__(choices, encoder, headers)
        self._heartbeat_s = heartbeat_s
        self._has_begun = False

    async def _answer(self, send: Send) -> None:
        try:
            await self._stream(_Writer(send))
        except Exception as error:  # noqa: BLE001 - the edge: the client is told of any error
            await self._fail(send, error)

    async def _stream(self, writer: "_Writer") -> None:
        beating = asyncio.create_task(self._beat(writer))
        try:
            async with aclosing(self._choices.events()) as events:
                async for choice, event in events:
                    await self._pass_on(writer, choice, event)
            await writer.write(self._encoder.finish())
            await writer.end()
        finally:
            await ended([beating])

    async def _pass_on(self, writer: "_Writer", choice: int, event: Event) -> None:
        if not self._has_begun and isinstance(event, Started | Delta | Completed):
            await self._begin(writer, event if not isinstance(event, Delta) else None)
        data = self._encoder.event(choice, event)
        if data and self._has_begun:
            await writer.write(data)

    async def _begin(self, writer: "_Writer", event: Started | Completed | None) -> None:
        self._has_begun = True
        headers = {"content-type": f"{SSE}; charset=utf-8", **STREAM_HEADERS}
        await writer.send(self._head(headers, event))

    async def _fail(self, send: Send, error: Exception) -> None:
        if not self._has_begun:
            raise error
        if not isinstance(error, KeepwarmError):
            _log.error("a reply broke off", exc_info=error)
        await send({"type": "http.response.body", "body": self._encoder.failed(problem_of(error))})

    async def _beat(self, writer: "_Writer") -> None:
        while True:
            await asyncio.sleep(self._heartbeat_s - writer.silent_s)
            if writer.silent_s >= self._heartbeat_s:
                if not self._has_begun:
                    await self._begin(writer, None)
                await writer.write(self._encoder.heartbeat)


class _Writer:
    """Sends one message at a time, and knows since when nothing was sent."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._now = asyncio.get_running_loop().time
        self._lock = asyncio.Lock()
        self._sent_s = self._now()

    @property
    def silent_s(self) -> float:
        """Seconds since the last message was sent; 0 while one is on its way."""
        return 0.0 if self._lock.locked() else self._now() - self._sent_s

    async def write(self, data: bytes) -> None:
        if data:
            await self.send({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self) -> None:
        await self.send({"type": "http.response.body", "body": b""})

    async def send(self, message: AsgiMessage) -> None:
        async with self._lock:
            await self._send(message)
            self._sent_s = self._now()
