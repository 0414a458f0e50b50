"""Clients that hang up at random moments, beside streams that go on: nothing of them stays.

The server is in a process of its own, so its event loop is as busy as the clients make it.
"""

import asyncio
import json
import random
import socket
import struct
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.server.process import FAKE, server_of
from benchmarks.server.wire import ANSWER_S, HOST, READ_BYTES, ask, posted, streamed
from keepwarm.bench.progress import OnProgress, no_progress
from keepwarm.bench.report import Figure, Report
from keepwarm.bench.requiring import require

AGENTS = ("ada", "eve", "bob", "cleo")
MAX_ROWS = 8
POLL_S = 0.02
MANY_TOKENS = 50_000
"""More than the server computes while it is watched, so that a reply that was not cancelled is
seen.
"""
_RESET = struct.pack("ii", 1, 0)

Request = tuple[str, dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class HangUpPlan:
    """`num_rounds` rounds with each of `sizes` clients; all must be forgotten within `bound_s`."""

    sizes: Sequence[int] = (150, 500)
    num_rounds: int = 20
    num_beside: int = 4
    bound_s: float = 2.0
    seed: int = 0


@dataclass(slots=True)
class Findings:
    """The slowest round, and what was left of those that were too slow."""

    num_hung_up: int = 0
    slowest_s: float = 0.0
    num_left: int = 0
    notes: list[str] = field(default_factory=list)


def run(
    model: str = FAKE,
    plan: HangUpPlan | None = None,
    on_progress: OnProgress = no_progress,
) -> Report:
    """Attack a server of this model; the figures say what was left, and for how long."""
    plan = plan or HangUpPlan()
    with (
        TemporaryDirectory(prefix="keepwarm-bench-hangups-") as home,
        server_of(model, Path(home), max_rows=MAX_ROWS, server__deadline_s=0) as port,
    ):
        found = asyncio.run(_Campaign(port, model, plan, on_progress).run())
    facts = {"hung_up": float(found.num_hung_up)}
    return Report(
        (
            Figure(
                f"requests, rows, tasks and connections left {plan.bound_s:g} s after "
                f"{plan.num_rounds} rounds of {_listed(plan.sizes)} hang-ups",
                float(found.num_left),
                0.0,
                unit="",
                facts=facts,
            ),
            Figure(
                "until nothing was left of a round's hang-ups",
                found.slowest_s,
                plan.bound_s,
                unit=" s",
            ),
        ),
        tuple(found.notes),
    )


class _Campaign:
    """Owns the streams beside, and compares the server after each round with what it was before."""

    def __init__(self, port: int, model: str, plan: HangUpPlan, on_progress: OnProgress) -> None:
        self._port = port
        self._model = model
        self._plan = plan
        self._on_progress = on_progress
        self._found = Findings()

    async def run(self) -> Findings:
        for agent in AGENTS:
            await ask(self._port, "PUT", f"/v1/agents/{agent}", {})
        async with _beside(self._port, self._model, self._plan.num_beside) as beside:
            await beside.until_all_speak()
            before = await self._look()
            for number, (size, name) in enumerate(self._rounds()):
                self._on_progress(name, number, len(self._plan.sizes) * self._plan.num_rounds)
                if not await self._round(size, name, before):
                    break
                await beside.until_all_speak()
        await self._check_agents()
        return self._found

    def _rounds(self) -> Iterator[tuple[int, str]]:
        for size in self._plan.sizes:
            for number in range(self._plan.num_rounds):
                yield size, f"{size} hang-ups, round {number + 1}"

    async def _round(self, size: int, name: str, before: Mapping[str, float]) -> bool:
        """Whether everything was free again in time."""
        rng = random.Random(f"{self._plan.seed} {name}")  # noqa: S311 - the same each time
        await _hang_ups(self._port, self._model, size, rng)
        self._found.num_hung_up += size
        started = time.monotonic()
        while True:
            after = await self._look()
            left = {key: now - before[key] for key, now in after.items() if now > before[key]}
            elapsed_s = time.monotonic() - started
            if not left or elapsed_s >= self._plan.bound_s:
                break
            await asyncio.sleep(POLL_S)
        self._found.slowest_s = max(self._found.slowest_s, elapsed_s)
        if left:
            self._found.num_left += int(sum(left.values()))
            self._found.notes.append(f"{name}: left after {elapsed_s:.1f} s: {left}")
        return not left

    async def _look(self) -> dict[str, float]:
        """Return how many requests, rows, tasks and connections there are, by name."""
        stats = json.loads((await ask(self._port, "GET", "/v1/stats"))[1])
        text = (await ask(self._port, "GET", "/metrics"))[1].decode()
        lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[:1] != "#")
        told = {name: float(lines[f"keepwarm_{name}"]) for name in ("tasks", "connections")}
        rows = {name: float(stats[name]) for name in ("requests", "num_waiting", "num_running")}
        return {**rows, **told}

    async def _check_agents(self) -> None:
        """Have each agent take a message, so that nothing stands in its line or holds its turn."""
        for agent in AGENTS:
            path, body = f"/v1/agents/{agent}/messages", {"content": "Still there?"}
            status, answer = await ask(self._port, "POST", path, {**body, "max_tokens": 2})
            require(status == 200, f"{agent} answers {status}: {answer[:200]!r}")


async def _hang_ups(port: int, model: str, size: int, rng: random.Random) -> None:
    """Run `size` clients that hang up; in four of five rounds all go at the same moment."""
    together = rng.random() < 0.8
    moment_s = rng.uniform(0.0, 0.4)
    loop = asyncio.get_running_loop()
    clients = []
    for _ in range(size):
        leaves_s = loop.time() + (moment_s if together else rng.uniform(0.0, 1.5))
        request = _request(model, rng)
        clients.append(_client(port, request, random.Random(rng.random()), leaves_s))  # noqa: S311
    await asyncio.gather(*clients)


async def _client(port: int, request: Request, rng: random.Random, leaves_s: float) -> None:
    """Send a request, or a part of one, read or do not read, and hang up at the client's moment."""
    data = posted(*request)
    if rng.random() < 0.05:
        data = data[: rng.randrange(len(data))]
    with suppress(ConnectionError):
        reader, writer = await asyncio.open_connection(HOST, port)
        try:
            writer.write(data)
            with suppress(TimeoutError):
                async with asyncio.timeout_at(leaves_s):
                    await _read(reader, rng)
        finally:
            _go(writer, reset=rng.random() < 0.3)


async def _read(reader: asyncio.StreamReader, rng: random.Random) -> None:
    """Read until the client's moment, or until a little of the answer has come."""
    if rng.random() < 0.3:
        await asyncio.Event().wait()
    enough = rng.choice([1, 400, 5_000, 1 << 40])
    num_bytes = 0
    while num_bytes < enough:
        data = await reader.read(READ_BYTES)
        if not data:
            return
        num_bytes += len(data)


def _go(writer: asyncio.StreamWriter, *, reset: bool) -> None:
    sock = writer.get_extra_info("socket")
    if reset and sock is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    writer.transport.abort()


# -- requests --------------------------------------------------------------------------------------


def _request(model: str, rng: random.Random) -> Request:
    """Draw a request of any dialect, streamed or not; without an idempotency key, with which it
    would rightly go on.
    """
    text = f"{rng.random()} " + "x" * rng.choice([1, 40, 2_000])
    body: dict[str, Any] = {
        "model": model,
        "max_tokens": rng.choice([1, 20, MANY_TOKENS, MANY_TOKENS]),
        "stream": rng.random() < 0.6,
    }
    kind = rng.choice(["chat", "chat of an agent", "choices", "completions", "messages", "agent"])
    messages = [{"role": "user", "content": text}]
    if kind == "completions":
        return "/v1/completions", {**body, "prompt": text, "n": rng.choice([1, 3])}
    if kind == "messages":
        return "/v1/messages", {**body, "messages": messages}
    if kind == "agent":
        return f"/v1/agents/{rng.choice(AGENTS)}/messages", {
            **body,
            "content": text,
            "model": None,
        }
    more = {"chat": {}, "choices": {"n": rng.choice([2, 4])}}
    named = {"user": rng.choice(AGENTS)}
    return "/v1/chat/completions", {**body, "messages": messages, **more.get(kind, named)}


# -- streams beside --------------------------------------------------------------------------------


class _Beside:
    """Streams that are read as they come, and begun anew where they end."""

    def __init__(self, port: int, model: str, number: int) -> None:
        self._port = port
        self._model = model
        self._num_events = [0] * number
        self._news = asyncio.Event()

    async def until_all_speak(self) -> None:
        """Wait until each of them has gone on from where it is now."""
        before = list(self._num_events)
        async with asyncio.timeout(ANSWER_S):
            while any(a <= b for a, b in zip(self._num_events, before, strict=True)):
                self._news.clear()
                await self._news.wait()

    async def keep(self, number: int) -> None:
        """Read one stream after the other until cancelled."""
        while True:
            await self._stream(number)

    async def _stream(self, number: int) -> None:
        prompt = f"Stream {number} tells a very long story."
        body = {"model": self._model, "prompt": prompt, "max_tokens": MANY_TOKENS, "stream": True}
        async for data in streamed(self._port, "/v1/completions", body):
            self._num_events[number] += data.count(b"data: ")
            self._news.set()


@asynccontextmanager
async def _beside(port: int, model: str, number: int) -> AsyncIterator[_Beside]:
    """Keep streams beside the block. One that breaks off ends the campaign."""
    streams = _Beside(port, model, number)
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(streams.keep(n)) for n in range(number)]
        yield streams
        for task in tasks:
            task.cancel()


def _listed(sizes: Sequence[int]) -> str:
    return " and ".join(f"{size:,}" for size in sizes)
