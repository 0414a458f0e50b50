"""The demo's process with the model, which is killed in the middle of a sentence."""

from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from keepwarm.core.errors import KeepwarmError
from keepwarm.core.events import Completed, Failed
from keepwarm.core.pool import BlockPool
from keepwarm.core.ports import LoadedModel

if TYPE_CHECKING:
    from keepwarm.engine.batch_engine import BlockPoolBatchEngine

RAM_BYTES = 1 << 30
DISK_BYTES = 2 << 30
READY = "ready"


@dataclass(frozen=True, slots=True)
class Say:
    """Run a request: the arguments of `submit`. `from_nothing`: on an engine without memory."""

    request: dict[str, Any]
    from_nothing: bool = False


@dataclass(frozen=True, slots=True)
class Demote:
    """Turn the agent's slab into blocks, as other agents' need for memory would."""

    agent_id: str


@dataclass(frozen=True, slots=True)
class Stop:
    """Save everything and end."""


Order = Say | Demote | Stop


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why the process has ended."""

    reason: str


def play(orders: Connection, model: str, folder: str) -> None:
    """Obey orders until Stop; the events of a request are sent back, up to its Completed.

    An error that Keepwarm raises on purpose is sent back as a Refusal.
    """
    try:
        _play(orders, model, folder)
    except KeepwarmError as error:
        orders.send(Refusal(str(error)))


def _play(orders: Connection, model: str, folder: str) -> None:
    from keepwarm import AgentCacheStore, BlockPoolBatchEngine, load_model
    from keepwarm.store.agent_cache_store import StoreConfig

    loaded = load_model(model)
    config = StoreConfig(disk_budget_bytes=DISK_BYTES)
    with AgentCacheStore(folder, config=config) as store:
        engine = BlockPoolBatchEngine(loaded, pool=BlockPool(RAM_BYTES), store=store)
        orders.send(READY)
        while not isinstance(order := orders.recv(), Stop):
            if isinstance(order, Demote):
                engine.demote(order.agent_id)
            else:
                _say(orders, _forgetful(loaded) if order.from_nothing else engine, order.request)
        engine.close()


def _forgetful(loaded: LoadedModel) -> "BlockPoolBatchEngine":
    from keepwarm import BlockPoolBatchEngine

    return BlockPoolBatchEngine(loaded, pool=BlockPool(RAM_BYTES))


def _say(orders: Connection, engine: "BlockPoolBatchEngine", request: dict[str, Any]) -> None:
    engine.submit(**request)
    while True:
        for event in engine.step():
            if isinstance(event, Failed):
                raise event.error
            orders.send(event)
            if isinstance(event, Completed):
                return
