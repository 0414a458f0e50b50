"""Streams for the benchmarks of the server: over HTTP, and from an engine in this process."""

import asyncio
import heapq
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from benchmarks.server.wire import HOST, READ_BYTES, posted
from keepwarm.bench.requiring import require
from keepwarm.core.events import Completed, Delta, Event, Failed
from keepwarm.engine.batch_engine import BlockPoolBatchEngine


@dataclass(frozen=True, slots=True)
class Timeline:
    """When a stream was requested, its first text came, and its end was known.

    `middle_tpot_s`: seconds per token from a quarter to three quarters of its tokens, over HTTP;
    None for a reply that ended early.
    """

    sent_s: float
    first_s: float
    end_s: float
    num_tokens: int
    middle_tpot_s: float | None = None

    @property
    def ttft_s(self) -> float:
        return self.first_s - self.sent_s

    @property
    def tpot_s(self) -> float:
        return (self.end_s - self.first_s) / max(self.num_tokens - 1, 1)


def median_ttft_s(timelines: Sequence[Timeline]) -> float:
    return median(timeline.ttft_s for timeline in timelines)


def median_tpot_s(timelines: Sequence[Timeline]) -> float:
    return median(timeline.tpot_s for timeline in timelines)


class Connection:
    """One connection, kept alive from request to request."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, port: int) -> "Connection":
        return cls(*await asyncio.open_connection(HOST, port))

    async def complete(self, model: str, prompt: str, num_tokens: int) -> Timeline:
        """Read a streamed completion to its end."""
        body = {"model": model, "prompt": prompt, "max_tokens": num_tokens, "temperature": 0}
        options = {"stream": True, "stream_options": {"include_usage": True}}
        data = posted("/v1/completions", {**body, **options})
        sent_s = time.perf_counter()
        self._writer.write(data)
        received = b""
        first_s = end_s = 0.0
        pieces_s: list[float] = []
        while not received.endswith(b"0\r\n\r\n"):
            received += await self._reader.read(READ_BYTES)
            if not first_s and b"data: " in received:
                first_s = time.perf_counter()
            now = time.perf_counter()
            pieces_s += [now] * (received.count(b"data: ") - len(pieces_s))
            if not end_s and b'"finish_reason":"' in received:
                end_s = time.perf_counter()
        require(b"[DONE]" in received, f"a stream ended with {received[-200:]!r}")
        tail = received[received.rindex(b'"completion_tokens":') :]
        num_said = int(tail.split(b":", 1)[1].split(b",", 1)[0])
        middle = _middle_s(pieces_s) if num_said == num_tokens else None
        return Timeline(sent_s, first_s, end_s, num_said, middle)

    def close(self) -> None:
        self._writer.close()


def _middle_s(pieces_s: Sequence[float]) -> float:
    """Return the seconds per piece from a quarter to three quarters of the pieces."""
    start, stop = len(pieces_s) // 4, 3 * len(pieces_s) // 4
    return (pieces_s[stop] - pieces_s[start]) / max(stop - start, 1)


def _pauses(prompt: str, num_rounds: int, most_s: float) -> list[float]:
    """Draw a pause before each round; without pauses all prompts would always come at once."""
    rng = random.Random(prompt)  # noqa: S311 - the same over HTTP and directly
    return [rng.uniform(0.0, most_s) for _ in range(num_rounds)]


async def rounds_over_http(
    port: int,
    model: str,
    prompts: Sequence[str],
    *,
    num_tokens: int,
    num_rounds: int,
    pause_s: float = 0.0,
) -> list[Timeline]:
    """Send each prompt on a connection of its own, after pauses of up to `pause_s`."""

    async def one(prompt: str) -> list[Timeline]:
        connection = await Connection.open(port)
        timelines: list[Timeline] = []
        try:
            for wait_s in _pauses(prompt, num_rounds, pause_s):
                await asyncio.sleep(wait_s)
                timelines.append(await connection.complete(model, prompt, num_tokens))
        finally:
            connection.close()
        return timelines

    timelines = await asyncio.gather(*(one(prompt) for prompt in prompts))
    return [timeline for some in timelines for timeline in some]


class _Direct:
    """Keeps one request of each prompt in an engine until each has ended once for each of its
    `waits`.
    """

    def __init__(
        self, engine: BlockPoolBatchEngine, waits: Mapping[str, Sequence[float]], num_tokens: int
    ) -> None:
        self._engine = engine
        self._waits = {prompt: list(some) for prompt, some in waits.items()}
        self._num_tokens = num_tokens
        self._due: list[tuple[float, str]] = []
        self._sent: dict[str, tuple[str, float]] = {}
        self._first_s: dict[str, float] = {}
        self.timelines: list[Timeline] = []

    def run(self) -> None:
        for prompt in self._waits:
            self._plan_next(prompt)
        while self._due or self._sent:
            while self._due and self._due[0][0] <= time.perf_counter():
                self._begin(*heapq.heappop(self._due))
            if not self._engine.has_work:
                time.sleep(max(self._due[0][0] - time.perf_counter(), 0.0) if self._due else 0.0)
                continue
            for event in self._engine.step():
                self._take(event)

    def _take(self, event: Event) -> None:
        if isinstance(event, Delta):
            self._first_s.setdefault(event.request_id, time.perf_counter())
        elif isinstance(event, Failed):
            raise event.error
        elif isinstance(event, Completed):
            self._end(event)

    def _plan_next(self, prompt: str) -> None:
        if self._waits[prompt]:
            heapq.heappush(self._due, (time.perf_counter() + self._waits[prompt].pop(0), prompt))

    def _begin(self, sent_s: float, prompt: str) -> None:
        """Submit the prompt.

        `sent_s` may lie in the middle of the step that has just ended, as it does for a request
        over HTTP.
        """
        request_id = self._engine.submit(text=prompt, max_tokens=self._num_tokens)
        self._sent[request_id] = (prompt, sent_s)

    def _end(self, event: Completed) -> None:
        prompt, sent_s = self._sent.pop(event.request_id)
        first_s = self._first_s.pop(event.request_id)
        num_tokens = event.usage.completion_tokens
        self.timelines.append(Timeline(sent_s, first_s, time.perf_counter(), num_tokens))
        self._plan_next(prompt)


def rounds_directly(
    engine: BlockPoolBatchEngine,
    prompts: Sequence[str],
    *,
    num_tokens: int,
    num_rounds: int,
    pause_s: float = 0.0,
) -> list[Timeline]:
    """Run the requests of `rounds_over_http` in this thread, without a server."""
    waits = {prompt: _pauses(prompt, num_rounds, pause_s) for prompt in prompts}
    direct = _Direct(engine, waits, num_tokens)
    direct.run()
    return direct.timelines


def in_turns(*measures: Callable[[], float], num_repeats: int) -> list[float]:
    """Return the median of each side, measured one after the other, `num_repeats` times."""
    measured = [[measure() for measure in measures] for _ in range(num_repeats)]
    return [median(values) for values in zip(*measured, strict=True)]
