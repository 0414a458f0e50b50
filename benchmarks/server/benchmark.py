"""What the server costs on top of the engine, and what it answers to anything at all."""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.server.fuzz import run_fuzz
from benchmarks.server.process import FAKE, STEP_S, bench_settings, server_of, source_of
from benchmarks.server.streams import (
    Connection,
    Timeline,
    in_turns,
    median_tpot_s,
    median_ttft_s,
    rounds_directly,
    rounds_over_http,
)
from keepwarm.bench.progress import OnProgress, no_progress
from keepwarm.bench.prompts import passages
from keepwarm.bench.report import Figure, Report
from keepwarm.bench.requiring import PathNotTaken, require
from keepwarm.engine.batch_engine import BlockPoolBatchEngine
from keepwarm.wiring import build_engine

NUM_STREAMS = 8
MAX_ADDED_TTFT_MS = 3.0
MAX_TPOT_RATIO = 1.03
MAX_CROWD_RATIO = 1.05
PROMPT_CHARACTERS = 100
PAUSE_S = 0.15
"""How many seconds streams wait at most before they begin: eight at once would wait for each other.
"""
MAX_SHOWN = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerPlan:
    """How often each side is measured, and how much.

    HTTP and the bare engine take turns: `num_repeats` times for the time to the first token,
    `num_pairs` times for the time per token, which differs by 6% from one run to the next.
    """

    num_rounds: int = 40
    num_repeats: int = 5
    num_pairs: int = 15
    num_tokens: int = 64
    num_idle: int = 200
    num_queued: int = 50
    num_generated: int = 20_000
    seed: int = 0


QUICK = partial(
    ServerPlan,
    num_rounds=4,
    num_repeats=1,
    num_pairs=1,
    num_tokens=16,
    num_idle=20,
    num_queued=8,
    num_generated=300,
)
"""Small sizes, to see that it works."""


def run_server(model: str, plan: ServerPlan, on_progress: OnProgress = no_progress) -> Report:
    """Measure a server on this model and one on the fake generator."""
    on_progress("time to the first token without compute", 0, 5)
    added = _added_ttft(plan)
    figures = [added]
    with _bench_home() as home, server_of(model, home / "s", max_rows=NUM_STREAMS) as port:
        with _engine(model, home / "e") as engine:
            for number, num_streams in enumerate((NUM_STREAMS, 1), 1):
                on_progress(f"time per token, {num_streams} streams", number, 5)
                figures.append(_tpot(model, port, engine, plan, num_streams))
        on_progress("idle connections and a queue", 3, 5)
        figures.append(_crowd(model, port, plan))
    on_progress(f"{plan.num_generated:,} generated requests", 4, 5)
    generated, problems = _generated(plan)
    return Report((*figures, generated), problems)


def _added_ttft(plan: ServerPlan) -> Figure:
    prompts = _prompts(NUM_STREAMS)
    options: dict[str, Any] = {"num_tokens": 16, "num_rounds": plan.num_rounds, "pause_s": PAUSE_S}
    with (
        _bench_home() as home,
        server_of(FAKE, home / "s", max_rows=NUM_STREAMS) as port,
        _engine(FAKE, home / "e") as engine,
    ):

        def over_http() -> float:
            return median_ttft_s(asyncio.run(rounds_over_http(port, FAKE, prompts, **options)))

        def directly() -> float:
            return median_ttft_s(rounds_directly(engine, prompts, **options))

        http_s, direct_s = in_turns(over_http, directly, num_repeats=plan.num_repeats)
    return Figure(
        f"TTFT over HTTP less the engine's own, {NUM_STREAMS} streams, idle steps of "
        f"{1e3 * STEP_S:g} ms (ms)",
        1e3 * (http_s - direct_s),
        MAX_ADDED_TTFT_MS,
        unit="ms",
        facts={"http_ms": 1e3 * http_s, "engine_ms": 1e3 * direct_s},
    )


def _tpot(
    model: str, port: int, engine: BlockPoolBatchEngine, plan: ServerPlan, num_streams: int
) -> Figure:
    prompts = _prompts(num_streams)
    options = {"num_tokens": plan.num_tokens, "num_rounds": 1}

    def over_http() -> float:
        return median_tpot_s(asyncio.run(rounds_over_http(port, model, prompts, **options)))

    def directly() -> float:
        return median_tpot_s(rounds_directly(engine, prompts, **options))

    over_http()
    directly()
    http_s, direct_s = in_turns(over_http, directly, num_repeats=plan.num_pairs)
    return Figure(
        f"time per token over HTTP over the engine's own, {num_streams} streams",
        http_s / direct_s,
        MAX_TPOT_RATIO,
        facts={"http_ms": 1e3 * http_s, "engine_ms": 1e3 * direct_s},
    )


def _crowd(model: str, port: int, plan: ServerPlan) -> Figure:
    """Compare streams beside idle connections and queued requests with streams alone.

    Measured is the middle of the streams: earlier the others arrive, and when the first stream ends
    they are queued no more, so all must last.
    """
    lasting = _lasting_prompts(port, model, plan)

    def measure(*, crowded: bool) -> float:
        timelines = asyncio.run(_beside(port, model, lasting, plan, crowded=crowded))
        middles = [t.middle_tpot_s for t in timelines if t.middle_tpot_s is not None]
        require(len(middles) == NUM_STREAMS, f"only {len(middles)} streams lasted")
        return median(middles)

    alone_s, crowded_s = in_turns(
        partial(measure, crowded=False), partial(measure, crowded=True), num_repeats=plan.num_pairs
    )
    return Figure(
        f"time per token beside {plan.num_idle} idle connections and {plan.num_queued} queued "
        "requests over alone",
        crowded_s / alone_s,
        MAX_CROWD_RATIO,
        facts={"crowded_ms": 1e3 * crowded_s, "alone_ms": 1e3 * alone_s},
    )


def _lasting_prompts(port: int, model: str, plan: ServerPlan) -> list[str]:
    """Find prompts whose replies do not end by themselves."""
    lasting: list[str] = []
    for prompt in _prompts(3 * NUM_STREAMS):
        options = {"num_tokens": plan.num_tokens, "num_rounds": 1}
        (timeline,) = asyncio.run(rounds_over_http(port, model, [prompt], **options))
        if timeline.num_tokens == plan.num_tokens:
            lasting.append(prompt)
        if len(lasting) == NUM_STREAMS:
            return lasting
    raise PathNotTaken(f"only {len(lasting)} replies have {plan.num_tokens} tokens")


async def _beside(
    port: int, model: str, prompts: Sequence[str], plan: ServerPlan, *, crowded: bool
) -> list[Timeline]:
    """Run the streams once, `crowded` or alone."""
    idle = [await Connection.open(port) for _ in range(plan.num_idle if crowded else 0)]
    running = asyncio.ensure_future(
        rounds_over_http(port, model, prompts, num_tokens=plan.num_tokens, num_rounds=1)
    )
    await asyncio.sleep(0.05)
    others = _prompts(plan.num_queued if crowded else 0)
    queued = asyncio.ensure_future(
        rounds_over_http(port, model, others, num_tokens=1, num_rounds=1)
    )
    timelines = await running
    await queued
    for connection in idle:
        connection.close()
    return timelines


def _generated(plan: ServerPlan) -> tuple[Figure, tuple[str, ...]]:
    # A reply without a limit would go on for the fake's whole context.
    limits = {"server__deadline_s": 5.0}
    with _bench_home() as home, server_of(FAKE, home, max_rows=NUM_STREAMS, **limits) as port:
        report = run_fuzz(port, plan.num_generated, seed=plan.seed)
    figure = Figure(
        f"{plan.num_generated:,} generated requests that were answered wrongly",
        float(len(report.problems)),
        0.0,
        unit="",
        facts={f"status_{status}": count for status, count in sorted(report.statuses.items())},
    )
    return figure, tuple(report.problems[:MAX_SHOWN])


@contextmanager
def _engine(model: str, home: Path) -> Iterator[BlockPoolBatchEngine]:
    """Build an engine as the server does, in this thread."""
    settings = bench_settings(model, max_rows=NUM_STREAMS, more={})
    engine, close = build_engine(settings, home, source_of(model))
    try:
        yield engine
    finally:
        close()


@contextmanager
def _bench_home() -> Iterator[Path]:
    with TemporaryDirectory(prefix="keepwarm-bench-http-") as name:
        yield Path(name)


def _prompts(number: int) -> list[str]:
    text = " ".join(passages())
    step = max((len(text) - PROMPT_CHARACTERS) // max(number, 1), 1)
    return [text[n * step :][:PROMPT_CHARACTERS] for n in range(number)]
