"""Keepwarm: a local LLM server on MLX in which every agent keeps its memory warm."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from keepwarm.core.pool import BlockPool
    from keepwarm.engine.batch_engine import BlockPoolBatchEngine
    from keepwarm.mlx_backend.loading.loader import load_model
    from keepwarm.store.agent_cache_store import AgentCacheStore

__version__ = "0.1.0"

__all__ = ["AgentCacheStore", "BlockPool", "BlockPoolBatchEngine", "__version__", "load_model"]

# Loaded on first use, so that importing `keepwarm` needs no MLX.
_HOMES = {
    "AgentCacheStore": "keepwarm.store.agent_cache_store",
    "BlockPool": "keepwarm.core.pool",
    "BlockPoolBatchEngine": "keepwarm.engine.batch_engine",
    "load_model": "keepwarm.mlx_backend.loading.loader",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
