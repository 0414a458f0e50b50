"""Requests that are too large in every way, beside streams that must not notice them.

Each is refused; what is measured is the streams' gaps, the time of `/health`, and the server's
memory. The server is in a process of its own; the attackers send from threads, bytes that were made
before.
"""

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from benchmarks.server.process import BenchServer, running_server
from benchmarks.server.wire import CLOSE, HOST, READ_BYTES, ask, head, posted, streamed
from keepwarm.bench.progress import OnProgress, no_progress
from keepwarm.bench.report import Figure, Report
from keepwarm.bench.requiring import require
from keepwarm.server.settings import ServerConfig

MAX_ROWS = 8
MEBIBYTE = 1 << 20
CLAIM_BYTES = 64 << 30
STREAM_TOKENS = 2_000
"""More than a stream says meanwhile: one that begins anew delays the others, attack or not."""
PROBE_S = 0.05
SAMPLE_S = 0.01
CALM_S = 2.0
"""How many seconds lie between the last attack and the look at the memory that stays."""
ANSWER_S = 120.0
LEAST_GAP_S = 0.150
MAX_GAP_RATIO = 2.0
MAX_PROBE_S = 0.100
MAX_STAYING_BYTES = 64 * MEBIBYTE
MAX_PEAK_BODIES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class SizesPlan:
    """Every attack `num_times`, after `steady_s` in which the streams are alone."""

    num_streams: int = 4
    steady_s: float = 20.0
    num_times: int = 3
    prompt_bytes: int = 8 * MEBIBYTE
    num_messages: int = 100_000
    num_stops: int = 100_000
    header_bytes: int = 300 * MEBIBYTE
    sent_of_claim_bytes: int = 256 * MEBIBYTE


@dataclass(frozen=True, slots=True)
class Attack:
    """What is sent, a part at a time, until the server has answered.

    The last of `parts` is sent again until there are `num_parts`.
    """

    name: str
    parts: Sequence[bytes]
    num_parts: int = 1

    def sent(self) -> Iterator[bytes]:
        """Yield the first part once, and the last again and again where there are to be more."""
        yield from self.parts
        yield from (self.parts[-1] for _ in range(self.num_parts - len(self.parts)))


@dataclass(slots=True)
class Seen:
    """What the other clients have noticed."""

    gaps_s: list[float] = field(default_factory=list)
    probes_s: list[float] = field(default_factory=list)
    answers: list[tuple[str, int | None]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def attacks(model: str, plan: SizesPlan) -> list[Attack]:
    """Make one attack of each kind."""
    text = "The quick brown fox jumps over it. " * (plan.prompt_bytes // 35)
    said = {"role": "user", "content": "Hi."}
    many = [said, {"role": "assistant", "content": "Hello."}] * (plan.num_messages // 2) + [said]
    stops = [f"stop {number}" for number in range(plan.num_stops)]
    asked = {"model": model, "max_tokens": 4}
    large = [{"role": "user", "content": text}]
    posts = {
        "a prompt": ("/v1/completions", {**asked, "prompt": text}),
        "a message": ("/v1/chat/completions", {**asked, "messages": large, "stream": True}),
        "a message to count": ("/v1/messages/count_tokens", {"model": model, "messages": large}),
        "messages": ("/v1/chat/completions", {**asked, "messages": many}),
        "messages to Anthropic's": ("/v1/messages", {**asked, "messages": many}),
        "stop strings": ("/v1/chat/completions", {**asked, "messages": [said], "stop": stops}),
    }
    bodies = [Attack(name, [posted(path, body, CLOSE)]) for name, (path, body) in posts.items()]
    piece = b"x" * MEBIBYTE
    num_header, num_claim = (
        max(size // MEBIBYTE, 1) + 1 for size in (plan.header_bytes, plan.sent_of_claim_bytes)
    )
    long_head = f"GET /v1/models HTTP/1.1\r\nHost: {HOST}\r\nX-Long: ".encode()
    claims = [
        Attack(f"{method} of an import", [head(method, path, CLAIM_BYTES, CLOSE), piece], num_claim)
        for method, path in (("POST", "/v1/agents/import"), ("PUT", "/v1/agents/import"))
    ]
    return [*bodies, Attack("a header", [long_head, piece], num_header), *claims]


def run(
    model: str = "smollm2",
    plan: SizesPlan | None = None,
    on_progress: OnProgress = no_progress,
) -> Report:
    """Attack a server of this model; the figures say what its other clients and memory felt."""
    plan = plan or SizesPlan()
    with (
        TemporaryDirectory(prefix="keepwarm-bench-sizes-") as home,
        running_server(model, Path(home), max_rows=MAX_ROWS) as server,
    ):
        return _Campaign(server, model, plan, on_progress).run()


class _Campaign:
    """Owns the streams beside and what they have seen."""

    def __init__(
        self, server: BenchServer, model: str, plan: SizesPlan, on_progress: OnProgress
    ) -> None:
        self._server = server
        self._model = model
        self._plan = plan
        self._on_progress = on_progress

    def run(self) -> Report:
        prepared = attacks(self._model, self._plan)
        return asyncio.run(self._run(prepared))

    async def _run(self, prepared: Sequence[Attack]) -> Report:
        steady, beside = Seen(), Seen()
        seen = [steady]
        tasks = [
            asyncio.ensure_future(self._stream(n, seen)) for n in range(self._plan.num_streams)
        ]
        tasks.append(asyncio.ensure_future(self._probe(seen)))
        try:
            await asyncio.sleep(self._plan.steady_s)
            before_bytes = self._server.rss_bytes()
            seen[0] = beside
            with _peak_of(self._server) as peak_bytes:
                await self._attack(prepared, beside)
                await asyncio.sleep(CALM_S)
            for task in tasks:
                if task.done():
                    await task  # it ended with an error, which is the result
            after_bytes = self._server.rss_bytes()
        finally:
            for task in tasks:
                task.cancel()
        return _result(steady, beside, (before_bytes, peak_bytes(), after_bytes))

    async def _attack(self, prepared: Sequence[Attack], seen: Seen) -> None:
        num_attacks = len(prepared) * self._plan.num_times
        for number in range(num_attacks):
            attack = prepared[number % len(prepared)]
            self._on_progress(attack.name, number, num_attacks)
            started, gaps = time.perf_counter(), len(seen.gaps_s)
            status = await asyncio.to_thread(answered, self._server.port, attack)
            seen.answers.append((attack.name, status))
            worst_s = max(seen.gaps_s[gaps:], default=0.0)
            took_s = time.perf_counter() - started
            seen.notes.append(f"{attack.name}: {status} in {took_s:.2f} s, gap {worst_s:.3f} s")

    async def _stream(self, number: int, seen: Sequence[Seen]) -> None:
        """Read completions, one after the other, and note the gaps between the events of each."""
        while True:
            prompt = f"Stream {number} tells a very long story."
            limits = {"max_tokens": STREAM_TOKENS, "seed": number, "stream": True}
            body = {"model": self._model, "prompt": prompt, **limits}
            last_s = None
            async for data in streamed(self._server.port, "/v1/completions", body):
                now_s = time.perf_counter()
                if last_s is not None:
                    seen[0].gaps_s.append(now_s - last_s)
                last_s = now_s if b"data: " in data or last_s is not None else None

    async def _probe(self, seen: Sequence[Seen]) -> None:
        while True:
            started = time.perf_counter()
            status, answer = await ask(self._server.port, "GET", "/health")
            require(status == 200, f"/health says {status} {answer[:200]!r}")
            seen[0].probes_s.append(time.perf_counter() - started)
            await asyncio.sleep(PROBE_S)


def answered(port: int, attack: Attack) -> int | None:
    """Send the attack. Returns the status of its answer; None where the server just hung up."""
    with socket.create_connection((HOST, port), timeout=ANSWER_S) as connection:
        with suppress(ConnectionError):  # it may have said all that it has to say
            for part in attack.sent():
                connection.sendall(part)
            if attack.num_parts > len(attack.parts):
                connection.shutdown(socket.SHUT_WR)  # it never says all that it has claimed
        received = b""
        with suppress(ConnectionError):
            while b"\r\n" not in received and (data := connection.recv(READ_BYTES)):
                received += data
    return int(received.split()[1]) if received else None


@contextmanager
def _peak_of(server: BenchServer) -> Iterator[Callable[[], int]]:
    """Watch the server's memory while the block runs; the yielded function returns the most, in
    bytes.
    """
    samples = [server.rss_bytes()]
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(SAMPLE_S):
            samples.append(server.rss_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield lambda: max(samples)
    finally:
        is_over.set()
        thread.join()


def _result(steady: Seen, beside: Seen, memory: tuple[int, int, int]) -> Report:
    before_bytes, peak_bytes, after_bytes = memory
    longest_s = max(steady.gaps_s)
    p99_s = float(np.percentile(beside.probes_s, 99))
    body_bytes = ServerConfig().max_body_bytes
    taken = [name for name, status in beside.answers if status is not None and status < 400]
    return Report(
        (
            Figure(
                "longest gap of a stream beside too large requests",
                max(beside.gaps_s),
                max(MAX_GAP_RATIO * longest_s, LEAST_GAP_S),
                unit=" s",
                facts={"steady_ms": 1e3 * longest_s, "gaps": float(len(beside.gaps_s))},
            ),
            Figure(
                "/health, p99",
                p99_s,
                MAX_PROBE_S,
                unit=" s",
                facts={"steady_ms": 1e3 * float(np.percentile(steady.probes_s, 99))},
            ),
            Figure(
                "memory that stays (MiB)",
                (after_bytes - before_bytes) / MEBIBYTE,
                MAX_STAYING_BYTES / MEBIBYTE,
                unit=" MiB",
                facts={"before": before_bytes / MEBIBYTE},
            ),
            Figure(
                "memory at its peak over the largest body",
                (peak_bytes - before_bytes) / body_bytes,
                float(MAX_PEAK_BODIES),
            ),
            Figure("too large requests that were not refused", float(len(taken)), 0.0, unit=""),
        ),
        tuple(beside.notes),
    )
