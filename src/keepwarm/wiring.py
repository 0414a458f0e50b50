"""Puts a server together: model, store and engine on their thread, and the application."""

import os
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from starlette.types import ASGIApp

from keepwarm.config import Settings
from keepwarm.core.pool import BlockPool
from keepwarm.core.ports import LoadedModel
from keepwarm.engine.batch_engine import BlockPoolBatchEngine
from keepwarm.engine.engine import Engine
from keepwarm.server.app import build_app
from keepwarm.server.metrics import Metrics
from keepwarm.server.serving import House, ModelCard
from keepwarm.store.agent_cache_store import AgentCacheStore

LoadModel = Callable[[Settings], LoadedModel]

STORE_FOLDER = "agents"
TRANSFERS_FOLDER = "transfers"
SHARE_OF_MEMORY = 4
SWITCH_S = 0.0005
"""How long the engine's thread may keep the event loop's from running; Python's own is 5 ms."""


def load_configured_model(settings: Settings) -> LoadedModel:
    """Raises ModelLoadError."""
    from keepwarm.mlx_backend.loader import load_model

    return load_model(settings.model.name, dtype=settings.model.dtype or None)


@dataclass(frozen=True, slots=True)
class RunningServer:
    """The application with its engine running; `num_agents` were there when it was opened."""

    app: ASGIApp
    engine: Engine
    model: str
    num_agents: int

    @property
    def has_stopped_well(self) -> bool:
        """Whether everything was saved by the shutdown that the application has had."""
        return self.engine.has_stopped_well


async def start_server(
    settings: Settings, home: Path, *, load: LoadModel = load_configured_model
) -> RunningServer:
    """Raises what loading and opening raise."""
    sys.setswitchinterval(SWITCH_S)
    cards: list[ModelCard] = []

    def open_engine() -> tuple[BlockPoolBatchEngine, Callable[[], None]]:
        engine, loaded, close = build_engine(settings, home, load)
        cards.append(
            ModelCard(loaded.name, loaded.max_context_tokens, int(time.time()), loaded.fingerprint)
        )
        return engine, close

    metrics = Metrics()
    engine = Engine(
        open_engine, on_end=metrics.observe_end, max_waiting=settings.engine.max_waiting
    )
    await engine.start()
    # The home is ours now; what an earlier run left half sent is nobody's.
    shutil.rmtree(home / TRANSFERS_FOLDER, ignore_errors=True)
    num_agents = len(await engine.call(lambda engine: engine.agents()))
    app = build_app(House(engine, cards[0], settings.server, metrics, home / TRANSFERS_FOLDER))
    return RunningServer(app, engine, cards[0].name, num_agents)


def build_engine(
    settings: Settings, home: Path, load: LoadModel
) -> tuple[BlockPoolBatchEngine, LoadedModel, Callable[[], None]]:
    """On the thread that will run it; also returns what closes store and model."""
    with ExitStack() as opened:
        loaded = load(settings)
        opened.callback(loaded.close)
        store = AgentCacheStore(home / STORE_FOLDER, config=settings.disk)
        opened.callback(store.close)
        engine = BlockPoolBatchEngine(
            loaded,
            pool=BlockPool(budget_bytes=memory_budget(settings)),
            store=store,
            config=settings.engine,
            deterministic=settings.model.deterministic,
        )
        return engine, loaded, opened.pop_all().close


def memory_budget(settings: Settings) -> int:
    """As configured, or a quarter of the machine's memory."""
    if settings.memory.budget_bytes:
        return settings.memory.budget_bytes
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // SHARE_OF_MEMORY
