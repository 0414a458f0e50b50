"""A reply on its way to its client: streamed or whole, watched for a client that has gone."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from starlette.responses import Response
from starlette.types import Message as AsgiMessage
from starlette.types import Receive, Scope, Send

from keepwarm.core.events import CacheReport, Completed, Delta, Event, Failed, Started
from keepwarm.server import cache_report
from keepwarm.server.choices import Choices
from keepwarm.server.problems import Problem, problem_of
from keepwarm.server.settings import ServerConfig

SSE = "text/event-stream; charset=utf-8"
HEARTBEAT = b": keepwarm\n\n"


class Encoder(Protocol):
    """A dialect's way of saying events. Each method returns bytes to send, perhaps none."""

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
    """Ends the request in the engine when its client hangs up, in whichever phase it is."""

    def __init__(self, choices: Choices, encoder: Encoder, headers: Mapping[str, str]) -> None:
        self._choices = choices
        self._encoder = encoder
        self._extra_headers = headers
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watcher = asyncio.create_task(self._watch(receive))
        try:
            await self._answer(send)
        finally:
            watcher.cancel()
            self._choices.hang_up()

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._choices.hang_up()

    async def _answer(self, send: Send) -> None:
        raise NotImplementedError

    def _head(self, media_type: str, cache: CacheReport | None) -> AsgiMessage:
        headers = {"content-type": media_type, "cache-control": "no-store", **self._extra_headers}
        if cache is not None:
            headers[cache_report.HEADER] = cache_report.header_of(cache)
        raw = [(key.lower().encode(), value.encode("latin-1")) for key, value in headers.items()]
        return {"type": "http.response.start", "status": 200, "headers": raw}


class WholeReply(_Reply):
    """One JSON document when all choices have ended."""

    async def _answer(self, send: Send) -> None:
        ends: dict[int, Completed] = {}
        async for choice, event in self._choices.events():
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Completed):
                ends[choice] = event
        body = self._encoder.whole([ends[choice] for choice in sorted(ends)])
        await send(self._head("application/json", ends[0].cache))
        await send({"type": "http.response.body", "body": body})


class StreamedReply(_Reply):
    """Server-sent events as they come; a comment where nothing came for a while.

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

    async def _answer(self, send: Send) -> None:
        writer = _Writer(send, self._config.slow_reader_s, self._choices.hang_up)
        beat = asyncio.create_task(self._beat(writer))
        try:
            async for choice, event in self._choices.events():
                await self._pass_on(writer, choice, event)
            await self._end(writer)
        finally:
            beat.cancel()

    async def _pass_on(self, writer: "_Writer", choice: int, event: Event) -> None:
        if isinstance(event, Failed) and not writer.has_begun:
            raise event.error
        if isinstance(event, Started | Delta | Completed | Failed) and not writer.has_begun:
            await writer.begin(self._head(SSE, _cache_of(event)))
        if isinstance(event, Failed):
            self._choices.hang_up()
            await writer.write(self._encoder.failed(problem_of(event.error)))
            return
        await writer.write(self._encoder.event(choice, event))
        if isinstance(event, Completed):
            note = cache_report.header_of(event.cache)
            await writer.write(f": {cache_report.HEADER} {note}\n\n".encode())

    async def _end(self, writer: "_Writer") -> None:
        if not self._choices.has_failed:
            await writer.write(self._encoder.finish())
        await writer.end()

    async def _beat(self, writer: "_Writer") -> None:
        while True:
            await asyncio.sleep(self._config.heartbeat_s)
            if not writer.has_begun:
                await writer.begin(self._head(SSE, None))
            if not writer.take_was_busy():
                await writer.write(HEARTBEAT)


class _Writer:
    """Writes one at a time, and gives up on a client that does not read."""

    def __init__(self, send: Send, timeout_s: float, hang_up: Callable[[], None]) -> None:
        self._send = send
        self._timeout_s = timeout_s
        self._hang_up = hang_up
        self._lock = asyncio.Lock()
        self._was_busy = False
        self._is_stuck = False
        self.has_begun = False

    def take_was_busy(self) -> bool:
        """Whether anything was written since the last time."""
        was_busy, self._was_busy = self._was_busy, False
        return was_busy

    async def begin(self, head: AsgiMessage) -> None:
        async with self._lock:
            if not self.has_begun:
                self.has_begun = True
                await self._send(head)

    async def write(self, data: bytes) -> None:
        if not data or self._is_stuck:
            return
        self._was_busy = True
        try:
            async with asyncio.timeout(self._timeout_s), self._lock:
                await self._send({"type": "http.response.body", "body": data, "more_body": True})
        except TimeoutError:
            self._is_stuck = True
            self._hang_up()

    async def end(self) -> None:
        if self._is_stuck:
            raise ConnectionAbortedError("the client did not read its reply")
        async with self._lock:
            await self._send({"type": "http.response.body", "body": b""})


def _cache_of(event: Event) -> CacheReport | None:
    return event.cache if isinstance(event, Started | Completed) else None
