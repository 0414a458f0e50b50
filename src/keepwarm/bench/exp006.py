"""EXP-006: how long it takes until an agent's KV is where the next token needs it.

Hot: the agent has its slab; the call is the pool's and the index's work and the first write in
place. Gathered: the agent was demoted; the call also takes a spare slab and copies the blocks into
it. Beside them, in turns, a plain copy of the same bytes into recycled memory. No model is needed:
this device's own generator has its slabs, and each step writes KV and computes nothing.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx import nn
from numpy.typing import NDArray
from rich.table import Table

from keepwarm.bench.progress import OnProgress, no_progress
from keepwarm.bench.recording import raw_kv
from keepwarm.bench.report import mark
from keepwarm.bench.timing import Percentiles, timed
from keepwarm.core.agent import AgentBlocks
from keepwarm.core.layout import BLOCK_TOKENS, CacheLayout, LayerLayout
from keepwarm.core.pool import BlockPool
from keepwarm.core.ports import GREEDY, BatchGenerator, Draw, LoadedModel, RowId, RowInput, Slab
from keepwarm.core.stored import KVFamily
from keepwarm.kv.generator_source import GeneratorSource
from keepwarm.kv.tiers import Tiers
from keepwarm.mlx_backend.compute.host_slab import HostSlab
from keepwarm.mlx_backend.compute.native_batch import Logits, NativeBatchGenerator
from keepwarm.mlx_backend.compute.native_model import NativeModel
from keepwarm.mlx_backend.compute.payload import KVPayload, RawArray
from keepwarm.mlx_backend.compute.row_batch import RowBatchGenerator
from keepwarm.mlx_backend.compute.slab import RowSlab
from keepwarm.mlx_backend.loading.native import shared_threads, usable_library
from keepwarm.native.library import Library
from keepwarm.native.structures import Model
from keepwarm.testing.tokenizer import FakeTokenizer

MAX_HOT_P95_S = 0.005
MAX_GATHERED_RATIO = 1.3


@dataclass(frozen=True, slots=True)
class Shape:
    """The KV of `num_blocks` blocks of a model."""

    num_blocks: int
    layout: CacheLayout

    @classmethod
    def of(
        cls, num_blocks: int, num_layers: int, *, num_heads: int = 3, dim: int = 64, dtype: str
    ) -> "Shape":
        layer = LayerLayout(num_heads, dim, dim)
        return cls(num_blocks, CacheLayout((layer,) * num_layers, dtype))

    @property
    def name(self) -> str:
        return f"{self.num_blocks}x{len(self.layout.layers)}"

    @property
    def num_tokens(self) -> int:
        return self.num_blocks * BLOCK_TOKENS

    @property
    def nbytes(self) -> int:
        return self.num_blocks * self.layout.block_bytes


SHAPES = (
    Shape.of(1, 12, dtype="float32"),
    Shape.of(4, 24, dtype="float32"),
    Shape.of(8, 30, dtype="float32"),
    Shape.of(16, 30, dtype="float32"),
    Shape.of(32, 48, num_heads=8, dim=128, dtype="float16"),
)


@dataclass(frozen=True, slots=True)
class Sizes:
    """Which shapes are measured, and how often."""

    shapes: tuple[Shape, ...] = SHAPES
    num_warm_ups: int = 10
    num_calls: int = 100


FULL_SIZES = Sizes()
QUICK_SIZES = Sizes(SHAPES[:-1], num_calls=20)
TARGET_SHAPE = SHAPES[-1].name
"""The shape at which the figures have to hold."""


@dataclass(frozen=True, slots=True)
class ShapeResult:
    """One shape's times. `slab_moved`: a buffer has another address after the calls; None where
    that is unknown.
    """

    shape: str
    nbytes: int
    num_calls: int
    hot: Percentiles
    gathered: Percentiles
    plain_copy: Percentiles
    slab_moved: bool | None
    same_bits: bool

    @property
    def gathered_ratio(self) -> float:
        return self.gathered.p50_s / self.plain_copy.p50_s

    @property
    def passed(self) -> bool:
        if self.slab_moved or not self.same_bits:
            return False
        fast = self.hot.p95_s < MAX_HOT_P95_S and self.gathered_ratio <= MAX_GATHERED_RATIO
        return fast or self.shape != TARGET_SHAPE

    def rows(self) -> Iterator[tuple[str, Percentiles]]:
        """Yield what was timed, by name."""
        yield "hot", self.hot
        yield "gathered", self.gathered
        yield "plain copy", self.plain_copy


@dataclass(frozen=True, slots=True)
class Exp006Result:
    results: tuple[ShapeResult, ...]

    @property
    def passed(self) -> bool:
        return all(result.passed for result in self.results)

    @property
    def notes(self) -> tuple[str, ...]:
        return ()

    def table(self, title: str) -> Table:
        """Return three rows for each shape."""
        table = Table(
            title=title,
            caption="ratio: the median over that of a plain copy of the same bytes",
        )
        for heading in ("blocks x layers", "MB", "what"):
            table.add_column(heading)
        for heading in ("p50", "p95", "p99", "ratio", "verdict"):
            table.add_column(heading, justify="right")
        for item in self.results:
            for name, calls in item.rows():
                first = name == "hot"
                times_s = (calls.p50_s, calls.p95_s, calls.p99_s)
                table.add_row(
                    item.shape if first else "",
                    f"{item.nbytes / 1e6:,.0f}" if first else "",
                    name,
                    *(f"{1e3 * seconds:.2f}" for seconds in times_s),
                    f"{item.gathered_ratio:.2f}" if name == "gathered" else "",
                    mark(item.passed) if first else "",
                    end_section=name == "plain copy",
                )
        return table


def run_exp006(sizes: Sizes, on_progress: OnProgress = no_progress) -> Exp006Result:
    results: list[ShapeResult] = []
    num_shapes = len(sizes.shapes)
    for number, shape in enumerate(sizes.shapes):
        on_progress(f"{shape.name} blocks x layers", number, num_shapes)
        results.append(_measure(shape, sizes.num_warm_ups, sizes.num_calls))
    on_progress("done", num_shapes, num_shapes)
    return Exp006Result(tuple(results))


def _measure(shape: Shape, num_warm_ups: int, num_calls: int) -> ShapeResult:
    bench = _Bench(shape)
    num_all = num_warm_ups + num_calls
    before = bench.addresses()
    hot = [bench.time_hot() for _ in range(num_all)]
    moved = None if before is None else before != bench.addresses()
    bench.demote()
    pairs = [(bench.time_gathered(), bench.time_plain_copy()) for _ in range(num_all)]
    gathered, copied = zip(*pairs, strict=True)
    return ShapeResult(
        shape=shape.name,
        nbytes=shape.nbytes,
        num_calls=num_calls,
        hot=Percentiles.of(hot[num_warm_ups:]),
        gathered=Percentiles.of(gathered[num_warm_ups:]),
        plain_copy=Percentiles.of(copied[num_warm_ups:]),
        slab_moved=moved,
        same_bits=bench.holds_what_was_put_in(),
    )


class _KVWriter(nn.Module):
    """A model that computes nothing: each layer writes one token's keys and values."""

    def __init__(self, layout: CacheLayout) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        dtype = {"float32": mx.float32, "float16": mx.float16}[layout.dtype]
        self._kv = [
            (
                mx.ones((1, layer.num_kv_heads, 1, layer.key_dim), dtype),
                mx.ones((1, layer.num_kv_heads, 1, layer.value_dim), dtype),
            )
            for layer in layout.layers
        ]
        self._logits = mx.zeros((1, 1, 8))
        mx.eval(self._kv, self._logits)

    def __call__(self, _token_ids: mx.array, *, cache: Sequence[Any]) -> mx.array:
        for layer, (keys, values) in zip(cache, self._kv, strict=True):
            layer.update_and_fetch(keys, values)
        return self._logits


class _HostWriter(NativeBatchGenerator):
    """The native generator over a model that computes nothing: each step writes one token's KV."""

    def logits(self, inputs: Sequence[RowInput]) -> Logits:
        for item in inputs:
            slab = self._rows[item.row]
            for array in slab.arrays():
                array[:, slab.num_tokens] = 1
            slab.num_tokens += 1
        return np.zeros((len(inputs), 8), np.float32)


def _writer(layout: CacheLayout, capacity_tokens: int) -> LoadedModel:
    """Return a model that computes nothing and writes the KV that it is given."""
    found = usable_library()

    def generator(*, deterministic: bool) -> BatchGenerator:
        if isinstance(found, Library):
            no_model = NativeModel(Model(), ())
            return _HostWriter(no_model, layout, shared_threads(found))
        return RowBatchGenerator(_KVWriter(layout), layout)

    tokenizer = FakeTokenizer()
    return LoadedModel(
        name="exp-006",
        fingerprint="exp-006",
        layout=layout,
        max_context_tokens=capacity_tokens,
        vocab_size=tokenizer.vocab_size,
        tokenizer=tokenizer,
        batch_gen_factory=generator,
    )


class _Bench:
    """Owns one agent's line and the memory that the plain copy goes to."""

    _ROW = RowId(1)

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._capacity = shape.num_tokens + BLOCK_TOKENS
        self._model = GeneratorSource(_writer(shape.layout, self._capacity))
        self._generator = self._model.generator
        slab_bytes = self._generator.slab_bytes(self._capacity)
        self._tiers = Tiers(
            BlockPool(2 * slab_bytes + shape.nbytes),
            self._model,
            family=KVFamily("exp-006", shape.layout),
        )
        self._ids = np.random.default_rng(6).integers(0, 1 << 15, shape.num_tokens).tolist()
        self._line = self._fill()
        self._source: NDArray[np.uint8] = np.ones(shape.nbytes, np.uint8)
        self._target: NDArray[np.uint8] = np.zeros(shape.nbytes, np.uint8)

    def time_hot(self) -> float:
        seconds = timed(self._make_current)
        self._rest()
        return seconds

    def time_gathered(self) -> float:
        seconds = timed(self._make_current)
        self._rest()
        self.demote()
        return seconds

    def time_plain_copy(self) -> float:
        return timed(lambda: np.copyto(self._target, self._source))

    def demote(self) -> None:
        """Turn the slab into a spare: memory that the next gathering recycles."""
        self._tiers.demote(self._line)

    def addresses(self) -> list[int] | None:
        """Return where the slab's buffers are; None where the host does not see the device's
        memory.
        """
        if mx.default_device() != mx.cpu and not mx.metal.is_available():
            return None
        slab = cast("RowSlab | HostSlab", self._line.slab)
        return [_address(array) for array in slab.arrays()]

    def holds_what_was_put_in(self) -> bool:
        """Whether the first block is, bit for bit, what it was before all calls."""
        self._tiers.make_hot(self._line, self._ids, self._capacity)
        self._tiers.promotion.restore(self._line)
        back = raw_kv(self._generator.extract(self._slab, 0, BLOCK_TOKENS))
        put_in = _noise(self._shape.layout, seed=0).arrays
        return all(np.array_equal(a, b) for a, b in zip(back, put_in, strict=True))

    @property
    def _slab(self) -> Slab:
        return cast("Slab", self._line.slab)

    def _fill(self) -> AgentBlocks:
        line = self._tiers.new_line()
        self._tiers.make_hot(line, self._ids, self._capacity)
        slab = cast("Slab", line.slab)
        for depth in range(self._shape.num_blocks):
            self._generator.reconstruct(slab, [_noise(self._shape.layout, seed=depth)])
        self._tiers.advance(line, self._ids)
        self._tiers.park(line)
        return line

    def _make_current(self) -> None:
        """Do what the engine does between admission and the first decode, and the first write."""
        self._tiers.make_hot(self._line, self._ids, self._capacity)
        if self._line.num_to_restore:
            self._tiers.promotion.restore(self._line)
        self._generator.open_row(self._ROW, self._slab)
        self._generator.step([RowInput(self._ROW, (0,), (Draw(GREEDY, 0),))])

    def _rest(self) -> None:
        slab = self._generator.close_row(self._ROW)
        self._generator.trim(slab, self._shape.num_tokens)
        self._tiers.park(self._line)


def _noise(layout: CacheLayout, *, seed: int) -> KVPayload:
    """Return a block of random bits, with memory of its own for each array."""
    random = np.random.default_rng(seed)
    shapes = [
        (layer.num_kv_heads, BLOCK_TOKENS, dim)
        for layer in layout.layers
        for dim in (layer.key_dim, layer.value_dim)
    ]
    return KVPayload(BLOCK_TOKENS, tuple(_bits(random, shape, layout.dtype) for shape in shapes))


def _bits(random: np.random.Generator, shape: tuple[int, ...], dtype: str) -> RawArray:
    if dtype == "float32":
        return random.integers(0, 1 << 15, shape, dtype=np.uint32)
    return random.integers(0, 1 << 15, shape, dtype=np.uint16)


def _address(array: mx.array | RawArray) -> int:
    return int(np.frombuffer(cast("bytes", array), np.uint8).ctypes.data)
