"""A server on two models of which one fits into memory, for the benchmarks of swapping."""

import asyncio
import json
import shutil
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import mlx.core as mx

from keepwarm.bench.requiring import require
from keepwarm.config import Settings, load_settings
from keepwarm.core.ports import LoadedModel, Tokenizer
from keepwarm.home import keepwarm_home
from keepwarm.mlx_backend.loading.loader import resolve
from keepwarm.mlx_backend.loading.memory_estimate import estimate_bytes
from keepwarm.service.async_engine import AsyncEngine
from keepwarm.service.model_registry import Model, ModelState
from keepwarm.service.model_swapper import ModelSwapper
from keepwarm.wiring import MLXSource, start_server

OTHER = "other"
NOISE = 0.1
"""The noise on every number in the other model's weights, as a share of it."""
KV_BUDGET_BYTES = 1 << 31
ROOM_FOR = 1.5
"""How many of the two models fit into memory."""


@dataclass(frozen=True, slots=True)
class ModelPair:
    """A model, and a folder with another one of the same shapes."""

    first: str
    other: Path

    @classmethod
    def beside(cls, model: str, folder: Path, *, seed: int) -> "ModelPair":
        """Make the other model: the same files, with seeded noise on the weights."""
        original = resolve(model, keepwarm_home())
        shutil.copytree(original, folder, ignore=shutil.ignore_patterns("*.safetensors"))
        for number, file in enumerate(sorted(original.glob("*.safetensors"))):
            _copy_with_noise(file, folder / file.name, mx.random.key(seed + number))
        return cls(model, folder)

    @property
    def limit_bytes(self) -> int:
        """Return a limit of memory that is too small for both."""
        return int(ROOM_FOR * estimate_bytes(self.other))


def _copy_with_noise(source: Path, target: Path, key: mx.array) -> None:
    """Copy weights; dtypes, shapes and packed integers stay."""
    arrays, metadata = cast(
        "tuple[dict[str, mx.array], dict[str, str]]", mx.load(str(source), return_metadata=True)
    )
    for name, array in sorted(arrays.items()):
        key, own_key = mx.random.split(key)
        if mx.issubdtype(array.dtype, mx.floating):
            noise = NOISE * mx.random.normal(array.shape, key=own_key)
            arrays[name] = (array.astype(mx.float32) * (1.0 + noise)).astype(array.dtype)
    mx.save_safetensors(str(target), arrays, metadata)


class WatchedSource:
    """Implements `ModelSource` with the server's own, and notes when it did what.

    `measured_s`, `began_s` and `loaded_s` are times of the performance counter.
    """

    def __init__(self) -> None:
        self._source = MLXSource()
        self._tokenizer: Tokenizer | None = None
        self.measured_s = self.began_s = self.loaded_s = 0.0

    def measure(self, model: Model) -> int:
        needed_bytes = self._source.measure(model)
        self.measured_s = time.perf_counter()
        return needed_bytes

    def load(self, model: Model) -> LoadedModel:
        self.began_s = time.perf_counter()
        loaded = self._source.load(model)
        self.loaded_s = time.perf_counter()
        # The first engine keeps this one, too: another would be a third in memory.
        self._tokenizer = self._tokenizer or loaded.tokenizer
        return loaded

    def memory_bytes(self) -> int:
        return self._source.memory_bytes()

    def leave_thread(self) -> None:
        self._source.leave_thread()

    @property
    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer of the model that was loaded first; both have the same."""
        if self._tokenizer is None:
            raise AssertionError("nothing was loaded")
        return self._tokenizer


@dataclass(frozen=True, slots=True)
class House:
    """A server on both models, one of which fits into memory: the first, to begin with."""

    pair: ModelPair
    engine: AsyncEngine
    models: ModelSwapper
    source: WatchedSource

    @property
    def sources(self) -> dict[str, str]:
        """Return what each model is loaded from, by its name."""
        return {self.pair.first: self.pair.first, OTHER: str(self.pair.other)}

    async def swap_to(self, name: str) -> None:
        """Load the model, with no request running, so that nothing drains."""
        # A reply of one token may be read before the event loop has taken its request off.
        await asyncio.sleep(0)
        require(not self.engine.num_requests, f"{self.engine.num_requests} requests are running")
        await self.models.load(name)
        ready = [m.name for m in self.models.registry if m.state is ModelState.READY]
        require(ready == [name], f"{ready} are in memory and not {name!r} alone")


@asynccontextmanager
async def house_of(pair: ModelPair, home: Path, **more: object) -> AsyncIterator[House]:
    """Start a server on the pair. `more` are settings, with `__` for the dot."""
    source = WatchedSource()
    running = await start_server(_settings(pair, home, more), home, source=source)
    if running.engine.models is None:
        raise AssertionError("the server has no models")
    try:
        yield House(pair, running.engine, running.engine.models, source)
    finally:
        await running.engine.stop(0.0)


def _settings(pair: ModelPair, home: Path, more: Mapping[str, object]) -> Settings:
    home.mkdir()
    config_file = home / "keepwarm.toml"
    source = json.dumps(str(pair.other), ensure_ascii=False)
    config_file.write_text(f"[models.{OTHER}]\nsource = {source}\n", "utf-8")
    flags: dict[str, object] = {
        "model.name": pair.first,
        "model.memory_bytes": pair.limit_bytes,
        "memory.budget_bytes": KV_BUDGET_BYTES,
        "engine.always_restore": True,  # a tiny model computes faster than disks read
    }
    flags |= {name.replace("__", "."): value for name, value in more.items()}
    return load_settings(flags, config_file=config_file, environment={})
