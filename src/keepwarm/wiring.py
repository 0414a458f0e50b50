"""Puts a server together: store and engines on their thread, models, and the application."""

import itertools
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from starlette.types import ASGIApp

from keepwarm.config import Settings
from keepwarm.core.agent_store import AgentStore
from keepwarm.core.errors import ModelUnavailable
from keepwarm.core.pool import BlockPool
from keepwarm.core.ports import LoadedModel
from keepwarm.engine.agents.book import AgentBook
from keepwarm.engine.batch_engine import BlockPoolBatchEngine
from keepwarm.fleet.fleet import Fleet, NewEngine, Weights
from keepwarm.server.app import build_app
from keepwarm.server.operations.metrics import Metrics
from keepwarm.server.reply.transfers import Transfers
from keepwarm.server.serving import Shared
from keepwarm.service.async_engine import AsyncEngine
from keepwarm.service.model_registry import AutoLoad, Model, ModelRegistry, ModelSettings
from keepwarm.service.model_swapper import ModelSource, ModelSwapper
from keepwarm.store.agent_cache_store import AgentCacheStore
from keepwarm.store.disk.home_lock import HomeUnusable

if TYPE_CHECKING:
    from keepwarm.mlx_backend.loading.computation import Wanted

STORE_FOLDER = "agents"
TRANSFERS_FOLDER = "transfers"
SHARE_OF_MEMORY = 4
SWITCH_S = 0.0005
"""Python's switch interval: how long the engines' thread may keep the event loop's from running.
Python's default is 5 ms."""


class MLXSource:
    """Implements `ModelSource` with the embedded model, folders and hub ids."""

    def measure(self, model: Model) -> int:
        """Fetch or convert the model, and estimate its bytes. Raises ModelLoadError."""
        from keepwarm.home import keepwarm_home
        from keepwarm.mlx_backend.loading.loader import resolve
        from keepwarm.mlx_backend.loading.memory_estimate import estimate_bytes

        return estimate_bytes(resolve(model.source, keepwarm_home()), wanted_of(model.settings))

    def load(self, model: Model) -> LoadedModel:
        """Load the model; closing it gives its memory back to the system. Raises ModelLoadError."""
        from keepwarm.mlx_backend.loading.loader import load_model
        from keepwarm.mlx_backend.memory import release_memory

        settings = model.settings
        loaded = load_model(
            model.source,
            dtype=settings.dtype or None,
            kv_dtype=settings.kv_dtype or None,
            native=settings.native,
        )
        restore_limits = loaded.close

        def close() -> None:
            restore_limits()
            release_memory()

        return replace(loaded, close=close)

    def memory_bytes(self) -> int:
        """Return the device's memory, for weights and KV."""
        from keepwarm.mlx_backend.memory import device_bytes

        return device_bytes()

    def leave_thread(self) -> None:
        """Drop what MLX keeps for this thread, which ends now."""
        from keepwarm.mlx_backend.memory import leave_thread

        leave_thread()


def wanted_of(settings: ModelSettings) -> "Wanted":
    """Say how a model with these settings is to be computed."""
    from keepwarm.mlx_backend.loading.computation import Wanted

    return Wanted(settings.dtype or None, settings.kv_dtype or None, settings.native)


@dataclass(frozen=True, slots=True)
class RunningServer:
    """An application with its engine running; `num_agents` were there when it was opened."""

    app: ASGIApp
    engine: AsyncEngine
    model: str
    num_agents: int

    @property
    def has_stopped_well(self) -> bool:
        """Whether the application has shut down and everything was saved."""
        return self.engine.has_stopped_well


async def start_server(
    settings: Settings, home: Path, *, source: ModelSource | None = None
) -> RunningServer:
    """Open the home and load the default model. Raises what opening and loading raise."""
    sys.setswitchinterval(SWITCH_S)
    metrics = Metrics()
    source = source or MLXSource()
    engine = AsyncEngine(
        _fleet_opener(settings, home, memory_budget(settings, source.memory_bytes())),
        on_end=metrics.observe_end,
        leave_thread=source.leave_thread,
        max_waiting=settings.engine.max_waiting,
    )
    await engine.start()
    try:
        models = _swapper(settings, source, engine)
        engine.start_models(models)
        try:
            await models.load(models.registry.default.name)
        except ModelUnavailable as error:
            raise error.cause from None
        # The home is locked by now, so no other server uses the files that an earlier run left.
        shutil.rmtree(home / TRANSFERS_FOLDER, ignore_errors=True)
        agents = await engine.call(lambda fleet: fleet.agents())
        models.registry.remember(agent.model or settings.model.name for agent in agents)
    except BaseException:
        await engine.stop(0.0)
        raise
    transfers = Transfers(home / TRANSFERS_FOLDER, settings.disk.free_floor_bytes)
    shared = Shared(engine, models, settings.server, metrics, transfers, int(time.time()))
    return RunningServer(build_app(shared), engine, models.registry.default.name, len(agents))


def registry_of(settings: Settings) -> ModelRegistry:
    """List the default model, and those that have settings of their own."""
    name = settings.model.name
    known = dict(settings.models)
    default = known.pop(name, ModelSettings())
    default = replace(
        default,
        dtype=default.dtype or settings.model.dtype,
        kv_dtype=default.kv_dtype or settings.model.kv_dtype,
        native=default.native and settings.model.native,
        aliases=(*default.aliases, *settings.server.model_aliases),
    )
    models = [Model(name, default), *(Model(*item) for item in known.items())]
    return ModelRegistry(name, models, may_add=settings.model.auto_load is AutoLoad.ANY)


def build_engine(
    settings: Settings, home: Path, source: ModelSource | None = None
) -> tuple[BlockPoolBatchEngine, Callable[[], None]]:
    """Build an engine on the default model, in this thread, and what closes it and its store."""
    source = source or MLXSource()
    with ExitStack() as opened:
        loaded = source.load(registry_of(settings).default)
        opened.callback(loaded.close)
        store = _open_store(settings, home)
        opened.callback(store.close)
        pool = BlockPool(memory_budget(settings, source.memory_bytes()))
        engine = _engine_maker(settings)(loaded, pool, store, AgentBook(store), itertools.count(1))
        return engine, opened.pop_all().close


def _open_store(settings: Settings, home: Path) -> AgentCacheStore:
    """Open the agents' store. Raises HomeUnusable where the disk refuses, and HomeInUse."""
    path = home / STORE_FOLDER
    try:
        return AgentCacheStore(path, config=settings.disk)
    except OSError as error:
        raise HomeUnusable(path, error) from error


def memory_budget(settings: Settings, memory_bytes: int) -> int:
    """Return the bytes for KV: as configured, or a quarter of the device's memory."""
    return settings.memory.budget_bytes or memory_bytes // SHARE_OF_MEMORY


def _swapper(settings: Settings, source: ModelSource, engine: AsyncEngine) -> ModelSwapper:
    given_bytes, memory_bytes = settings.model.memory_bytes, source.memory_bytes()
    return ModelSwapper(
        registry_of(settings),
        source,
        engine.call,
        limit_bytes=given_bytes or max(memory_bytes - memory_budget(settings, memory_bytes), 0),
        patience_s=settings.model.patience_s,
        may_load=settings.model.auto_load is not AutoLoad.NEVER,
        max_waiting=settings.engine.max_waiting,
    )


def _fleet_opener(
    settings: Settings, home: Path, budget_bytes: int
) -> Callable[[], tuple[Fleet, Callable[[], None]]]:
    weights = Weights()

    def open_fleet() -> tuple[Fleet, Callable[[], None]]:
        """Open the fleet, on the engines' thread; after a bug, over the weights that are loaded."""
        store = _open_store(settings, home)
        with ExitStack() as opened:
            opened.callback(store.close)
            fleet = Fleet(
                _engine_maker(settings),
                default=settings.model.name,
                store=store,
                budget_bytes=budget_bytes,
                weights=weights,
                builds_when_idle=settings.model.build_when_idle,
            )
            return fleet, opened.pop_all().close

    return open_fleet


def _engine_maker(settings: Settings) -> NewEngine:
    def new_engine(
        loaded: LoadedModel,
        pool: BlockPool,
        store: AgentStore,
        book: AgentBook,
        request_ids: Iterator[int],
    ) -> BlockPoolBatchEngine:
        return BlockPoolBatchEngine(
            loaded,
            pool=pool,
            store=store,
            config=settings.engine,
            deterministic=settings.model.deterministic,
            book=book,
            request_ids=request_ids,
            recorded_as="" if loaded.name == settings.model.name else loaded.name,
        )

    return new_engine
