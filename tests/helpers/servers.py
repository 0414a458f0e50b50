"""Servers on free loopback ports: in a thread on the fake generator, or in their own process."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from description import check_described
from engines import DEVICE_S, FakeFactory, fake_loaded
from keepwarm.config import load_settings
from keepwarm.server.edge.sockets import uvicorn_config
from keepwarm.service.async_engine import AsyncEngine
from keepwarm.testing.models import FixedSource
from keepwarm.wiring import start_server
from waiting import PATIENCE_S, wait_until

MODEL = "fake"


def send(
    client: httpx.Client,
    agent: str = "ada",
    content: str = "Hello",
    *,
    headers: Mapping[str, str] | None = None,
    **fields: Any,
) -> httpx.Response:
    """Send a message to the agent; the reply has four tokens unless `fields` say otherwise."""
    body = {"content": content, "max_tokens": 4, **fields}
    return client.post(f"/v1/agents/{agent}/messages", json=body, headers=headers)


def say(
    client: httpx.Client, agent: str = "ada", content: str = "Hello", **more: Any
) -> dict[str, Any]:
    """Send a message as `send` does, and return the answer, whose status must be 200."""
    response = send(client, agent, content, **more)
    assert response.status_code == 200, response.text
    document: dict[str, Any] = response.json()
    return document


@dataclass(slots=True)
class FakeServer:
    """A server in a thread of this process, on the fake generator and a real store."""

    url: str
    engine: AsyncEngine
    factory: FakeFactory
    loop: asyncio.AbstractEventLoop
    server: uvicorn.Server

    def client(self, **options: Any) -> httpx.Client:
        """Open a client that checks each answer against the server's description."""
        hooks = {"response": [check_described]}
        # Without `verify`, which loads certificates: no server of these tests speaks TLS.
        base: dict[str, Any] = {"base_url": self.url, "timeout": PATIENCE_S, "verify": False}
        base["trust_env"] = False
        return httpx.Client(event_hooks=hooks, **base, **options)

    def call(self, function: Any) -> Any:
        """Call a function of the default model's engine on its thread, between two steps."""
        return self.call_fleet(lambda fleet: function(fleet.of(None)))

    def call_fleet(self, function: Any) -> Any:
        future = asyncio.run_coroutine_threadsafe(self.engine.call(function), self.loop)
        return future.result(PATIENCE_S)


@contextmanager
def fake_server(
    home: Path,
    *,
    factory: FakeFactory | None = None,
    loaded: Any = None,
    source: Any = None,
    send_buffer: int | None = None,
    config_file: Path | None = None,
    **flags: object,
) -> Iterator[FakeServer]:
    """Serve in a thread; `flags` are settings with `__` for the dot: `server__heartbeat_s=0.1`."""
    factory = factory or FakeFactory(pause_s=DEVICE_S)
    values = {name.replace("__", "."): value for name, value in flags.items()}
    settings = load_settings(
        {
            "model.name": MODEL,
            "memory.budget_bytes": 1 << 22,
            "server.default_temperature": 0.0,
            **values,
        },
        config_file=config_file,
        environment={},
    )
    model = loaded or fake_loaded(factory=factory)
    with _listener(send_buffer) as listener:
        opened: list[FakeServer] = []
        ready = threading.Event()
        failed: list[BaseException] = []

        async def serve() -> None:
            running = await start_server(settings, home, source=source or FixedSource(model))
            server = uvicorn.Server(uvicorn_config(running.app, settings.server))
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            loop = asyncio.get_running_loop()
            opened.append(FakeServer(url, running.engine, factory, loop, server))
            ready.set()
            await server.serve(sockets=[listener])

        def run() -> None:
            try:
                asyncio.run(serve())
            except BaseException as error:  # noqa: BLE001 - the test shows it
                failed.append(error)
            finally:
                ready.set()

        thread = threading.Thread(target=run, name="fake-server")
        thread.start()
        try:
            assert ready.wait(PATIENCE_S)
            if failed:
                raise failed[0]
            yield opened[0]
        finally:
            if opened:
                opened[0].server.should_exit = True
            thread.join(PATIENCE_S)
            assert not thread.is_alive()
        if failed:
            raise failed[0]


def _listener(send_buffer: int | None) -> socket.socket:
    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    if send_buffer is not None:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    return listener


@dataclass(slots=True)
class ServerProcess:
    """`keepwarm serve` as a user starts it."""

    url: str
    process: "subprocess.Popen[bytes]"
    log: Path

    def client(self, **options: Any) -> httpx.Client:
        base: dict[str, Any] = {"base_url": self.url, "timeout": PATIENCE_S, "trust_env": False}
        return httpx.Client(**base, **options)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(PATIENCE_S)

    def stop(self) -> None:
        """Send SIGTERM, as `kill PID` does; the server must end with exit code 0."""
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(PATIENCE_S)
        assert code == 0, f"exit code {code}:\n{self.log.read_text()}"


@contextmanager
def server_process(
    home: Path,
    log: Path,
    *arguments: str,
    environment: Mapping[str, str] | None = None,
) -> Iterator[ServerProcess]:
    """Serve SmolLM2 from a home of its own, on a port that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "keepwarm.cli.main", "serve", "--port", str(port), *arguments]
    # A server that is aborted leaves the stacks of its threads in the log.
    faults = {"PYTHONFAULTHANDLER": "1"}
    env = {**os.environ, **faults, "KEEPWARM_HOME": str(home), **(environment or {})}
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=env)
    server = ServerProcess(f"http://127.0.0.1:{port}", process, log)
    try:
        _wait_until_ready(server)
        yield server
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(PATIENCE_S)


def home_beside(home: Path, folder: Path) -> Path:
    """Make an empty home in `folder` that has the converted models of `home`."""
    models = home / "models"
    models.mkdir(parents=True, exist_ok=True)
    folder.mkdir(exist_ok=True)
    (folder / "models").symlink_to(models)
    return folder


def _wait_until_ready(server: ServerProcess) -> None:
    def is_ready() -> bool:
        assert server.process.poll() is None, server.log.read_text()
        try:
            return client.get("/health").status_code == 200
        except httpx.TransportError:
            return False

    with server.client() as client:
        wait_until(is_ready, lambda: time.sleep(0.1), explain=server.log.read_text)
