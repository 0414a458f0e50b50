"""The process of a server: its socket, its event loop, and its end."""

import asyncio
import os
import resource
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import NoReturn

import uvicorn
from rich.console import Console
from uvicorn.server import HANDLED_SIGNALS

from keepwarm.config import Settings
from keepwarm.core.errors import ConfigError
from keepwarm.home import keepwarm_home
from keepwarm.server.edge.sockets import uvicorn_config
from keepwarm.server.operations.logs import configure_logs
from keepwarm.server.settings import ServerConfig
from keepwarm.wiring import RunningServer, start_server

FILES_BESIDE_CONNECTIONS = 512
"""How many files the store, the model and refused connections may have open."""
_WATCH_S = 0.5


class _Server(uvicorn.Server):
    """Ends with Keepwarm's exit code: uvicorn's own would raise the signal again at the end."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        kept = {number: signal.signal(number, self.handle_exit) for number in HANDLED_SIGNALS}
        try:
            yield
        finally:
            for number, handler in kept.items():
                signal.signal(number, handler)


def run_server(settings: Settings) -> bool:
    """Serve until a signal says stop. Returns whether everything was saved at the end.

    Raises ConfigError where it cannot listen, and what loading and opening raise.
    """
    configure_logs(settings.server.log_format)
    _allow_files(settings.server.max_connections + FILES_BESIDE_CONNECTIONS)
    # On this thread, which outlives all others: a library may tie things to the thread that imports
    # it, as mlx-lm its compiled functions.
    import_module("keepwarm.mlx_backend.loading.loader")
    with _bound(settings.server) as listener, asyncio.Runner(loop_factory=_new_loop) as runner:
        return runner.run(_serve(settings, listener))


async def _serve(settings: Settings, listener: socket.socket) -> bool:
    console = Console(stderr=True)
    with console.status(f"Loading {settings.model.name} and the agents' catalogue"):
        running = await start_server(settings, keepwarm_home())
    server = _Server(uvicorn_config(running.app, settings.server))
    _announce(console, running, listener, settings.server)
    watching = asyncio.create_task(_stop_with_engine(running, server))
    await server.serve(sockets=[listener])
    watching.cancel()
    if not running.engine.has_ended:
        _leave_at_once()
    return running.has_stopped_well


def _allow_files(wanted: int) -> None:
    """Raise the limit of open files, as far as the system allows: its default may be too low."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _leave_at_once() -> NoReturn:
    """End the process when it is told to stop twice: the engines' thread cannot be ended."""
    sys.stderr.write("keepwarm: stopped at once; what was not saved is computed again\n")
    os._exit(1)


async def _stop_with_engine(running: RunningServer, server: uvicorn.Server) -> None:
    """Stop the server when its engine has ended for good: it could answer nothing."""
    while not running.engine.has_ended:  # noqa: ASYNC110 - a thread ends, and sets no event here
        await asyncio.sleep(_WATCH_S)
    server.should_exit = True


def _announce(
    console: Console, running: RunningServer, listener: socket.socket, settings: ServerConfig
) -> None:
    host, port = listener.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    console.print(f"[bold]keepwarm[/bold] serves [bold]{running.model}[/bold] at {url}/v1")
    if not settings.is_loopback and not settings.api_keys:
        console.print("  [yellow]anyone who reaches this address may use it: see server.api_keys")
    if settings.api_keys and not any(map(settings.is_admin, settings.api_keys)):
        console.print("  [yellow]no key may load models or see /metrics: see server.admins")
    console.print(f"  page {url}/   API {url}/docs   agents kept: {running.num_agents}")


def _bound(config: ServerConfig) -> socket.socket:
    """Listen, before the model is loaded, so that a port in use is reported at once."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        return socket.create_server((config.host, config.port), family=family, backlog=2048)
    except OSError as error:
        problem = f"cannot listen on {config.host}:{config.port}: {error.strerror}"
        raise ConfigError("server.port", f"{problem}; choose another with --port") from error


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:  # some platforms have none
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()
