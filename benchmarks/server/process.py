"""A server process for the benchmarks, on the fake generator without compute or on a model.

It prints its port when it listens, and ends when its input is closed.
"""

import asyncio
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.loops.auto import auto_loop_factory

from keepwarm.bench.child_process import ChildProcess
from keepwarm.bench.requiring import PathNotTaken
from keepwarm.config import Settings, load_settings
from keepwarm.core.ports import BatchGenerator, LoadedModel, RowInput
from keepwarm.server.edge.sockets import uvicorn_config
from keepwarm.service.model_swapper import ModelSource
from keepwarm.testing.generator import FAKE_LAYOUT, FakeBatchGenerator
from keepwarm.testing.models import FixedSource
from keepwarm.testing.tokenizer import FakeTokenizer
from keepwarm.wiring import MLXSource, start_server

FAKE = "fake"
STOP_S = 60.0
STEP_S = 0.004


def bench_settings(model: str, *, max_rows: int, more: Mapping[str, object]) -> Settings:
    given = {"model.name": model, "engine.max_rows": max_rows, **more}
    return load_settings({"memory.budget_bytes": 1 << 31, **given}, environment={})


def source_of(model: str) -> ModelSource:
    """Return what loads the model."""
    return FixedSource(_fake_model()) if model == FAKE else MLXSource()


class _PacedGenerator(FakeBatchGenerator):
    """The fake with decode steps as long as a small model's, in which it sleeps."""

    def step(self, inputs: Sequence[RowInput]) -> list[list[int]]:
        if any(item.draws for item in inputs):
            time.sleep(STEP_S)
        return super().step(inputs)


def _fake_model() -> LoadedModel:
    """Return a model that replies whole characters and never ends on its own."""
    tokenizer = FakeTokenizer()

    def generator(*, deterministic: bool) -> BatchGenerator:
        return _PacedGenerator(script=list(b"abcdefg "), deterministic=deterministic)

    return LoadedModel(
        name=FAKE,
        fingerprint=FAKE,
        layout=FAKE_LAYOUT,
        max_context_tokens=100_000,
        vocab_size=tokenizer.vocab_size,
        tokenizer=tokenizer,
        batch_gen_factory=generator,
    )


@dataclass(frozen=True, slots=True)
class BenchServer:
    """A running server in a process of its own."""

    port: int
    pid: int

    def rss_bytes(self) -> int:
        """Return its resident memory now (Linux)."""
        pages = Path(f"/proc/{self.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def server_of(model: str, home: Path, *, max_rows: int, **more: object) -> Iterator[int]:
    """Run a server as `running_server` does, and yield its port."""
    with running_server(model, home, max_rows=max_rows, **more) as server:
        yield server.port


@contextmanager
def running_server(
    model: str, home: Path, *, max_rows: int, **more: object
) -> Iterator[BenchServer]:
    """Run a server until the block ends. `more` are settings, with `__` for the dot."""
    settings = [f"{name.replace('__', '.')}={value}" for name, value in more.items()]
    arguments = [model, str(home), str(max_rows), *settings]
    with ChildProcess("-m", "benchmarks.server.process", *arguments) as process:
        line = process.read_line()
        if not line.isdecimal():
            raise PathNotTaken(f"the server of {model} did not start: {process.complaints()}")
        try:
            yield BenchServer(int(line), process.pid)
        finally:
            process.tell()
            process.wait(STOP_S)


def serve(settings: Settings, home: Path, *, announce: Callable[[int], object]) -> None:
    """Serve in this process until it is told to stop; `announce` is called with the port."""
    with _listening() as (listener, runner):
        runner.run(_serve(settings, home, listener, announce))


async def _serve(
    settings: Settings,
    home: Path,
    listener: socket.socket,
    announce: Callable[[int], object],
    wait_for_end: Callable[[], object] | None = None,
) -> None:
    running = await start_server(settings, home, source=source_of(settings.model.name))
    server = uvicorn.Server(uvicorn_config(running.app, settings.server))
    announce(listener.getsockname()[1])

    async def stop_at_end() -> None:
        if wait_for_end is not None:
            await asyncio.to_thread(wait_for_end)
            server.should_exit = True

    watching = asyncio.create_task(stop_at_end())
    await server.serve(sockets=[listener])
    await watching


@contextmanager
def _listening() -> Iterator[tuple[socket.socket, asyncio.Runner]]:
    with (
        socket.create_server(("127.0.0.1", 0), backlog=2048) as listener,
        asyncio.Runner(loop_factory=auto_loop_factory()) as runner,
    ):
        yield listener, runner


def _print(port: int) -> None:
    print(port, flush=True)  # noqa: T201 - for the process that asked


def _main(model: str, home: str, max_rows: str, *more: str) -> None:
    pairs: dict[str, Any] = dict(item.split("=", 1) for item in more)
    settings = bench_settings(model, max_rows=int(max_rows), more=pairs)
    with _listening() as (listener, runner):
        runner.run(_serve(settings, Path(home), listener, _print, sys.stdin.read))


if __name__ == "__main__":
    _main(*sys.argv[1:])
