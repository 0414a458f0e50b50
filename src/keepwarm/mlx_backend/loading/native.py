"""Whether the native step computes a model here: tried at load, and compared with MLX's logits."""

from dataclasses import dataclass
from functools import cache, partial

import mlx.core as mx
import numpy as np
from mlx import nn

from keepwarm.core.layout import BLOCK_TOKENS, CacheLayout, LayerLayout
from keepwarm.core.ports import GREEDY, BatchGenFactory, Draw, RowId, RowInput
from keepwarm.mlx_backend.compute.native_batch import Logits, NativeBatchGenerator
from keepwarm.mlx_backend.compute.native_model import NativeModel, pack_model
from keepwarm.mlx_backend.compute.native_parts import NotNative, native_parts
from keepwarm.mlx_backend.loading.weights import dtype_name
from keepwarm.mlx_backend.memory import release_memory
from keepwarm.native.library import (
    Library,
    Missing,
    NativeError,
    Threads,
    library,
    num_cores,
)

_PROBE_IDS = (1, 3, 8, 13)
_TOLERANCE = {"float32": 1e-2, "float16": 5e-2, "bfloat16": 2e-1}
"""The allowed difference over the logits' spread, by the type that MLX computes in. An activation
or a scale that the native step does not know changes logits by about the spread; KV in float16 by a
thousandth of it."""

ORDER = 1
"""The order of summation: a part of the fingerprint, raised when the native step's bits change."""


@dataclass(frozen=True, slots=True)
class Native:
    """The native step for one model."""

    factory: BatchGenFactory
    layout: CacheLayout
    vocab_size: int
    target: str


def usable_library() -> Library | Missing:
    """Return the library where models are computed on the CPU, whatever the model."""
    if mx.default_device() != mx.cpu:
        return Missing("a GPU computes here")
    return library()


def native_step(
    model: nn.Module, found: Library, *, max_context_tokens: int, kv_dtype: str
) -> Native | Missing:
    """Build the native step for mlx-lm's lazily opened model; or say why there is none.

    The model's weights are moved: it is of no use afterwards, whatever the answer.
    """
    try:
        return _tried(model, found, max_context_tokens=max_context_tokens, kv_dtype=kv_dtype)
    except NotNative as error:
        return Missing(str(error))
    except NativeError as error:
        return Missing(f"its shapes do not fit ({error})")
    finally:
        release_memory()


@cache
def shared_threads(found: Library) -> Threads:
    """Return the threads of all models of the process, as many as it may use cores."""
    return Threads(found, num_cores())


def _tried(model: nn.Module, found: Library, *, max_context_tokens: int, kv_dtype: str) -> Native:
    parts = native_parts(model)
    parts.nbytes(found, max_context_tokens)  # refuses shapes before anything is read
    expected, dtype = _logits_of_mlx(model)
    packed = pack_model(
        parts, found, num_positions=max_context_tokens, is_kv_float16=kv_dtype == "float16"
    )
    layout = _layout_of(packed, kv_dtype)
    factory = partial(NativeBatchGenerator, packed, layout, shared_threads(found))
    _require_alike(_logits_of_step(factory()), expected, _TOLERANCE[dtype])
    return Native(factory, layout, packed.vocabulary, found.target)


def _layout_of(packed: NativeModel, kv_dtype: str) -> CacheLayout:
    structure = packed.structure
    layer = LayerLayout(structure.num_kv_heads, structure.head_dim, structure.head_dim)
    return CacheLayout(layers=(layer,) * structure.num_layers, dtype=kv_dtype)


def _logits_of_mlx(model: nn.Module) -> tuple[Logits, str]:
    """Return MLX's logits (ids, vocabulary), and the type that it computed them in.

    Next to quantised words everything else is made float32 for the length of the call: MLX
    multiplies them 50 times slower in float16 on the CPU, and it costs little memory.
    """
    held = model.parameters()
    if any(isinstance(module, nn.QuantizedLinear) for _, module in model.named_modules()):
        model.set_dtype(mx.float32)
    logits = model(mx.array([_PROBE_IDS]))[0]
    dtype = dtype_name(logits)
    expected = np.array(logits.astype(mx.float32))
    model.update(held)
    return expected, dtype


def _logits_of_step(generator: NativeBatchGenerator) -> Logits:
    row = RowId(0)
    draws = tuple(Draw(GREEDY, index) for index in range(len(_PROBE_IDS)))
    generator.open_row(row, generator.new_slab(BLOCK_TOKENS))
    logits = generator.logits([RowInput(row, _PROBE_IDS, draws)])
    generator.close_row(row)
    return logits


def _require_alike(found: Logits, expected: Logits, tolerance: float) -> None:
    if found.shape != expected.shape:
        raise NotNative(f"MLX gives {expected.shape[-1]} logits, its shapes say {found.shape[-1]}")
    difference = float(np.abs(found - expected).max())
    spread = float(expected.max() - expected.min())
    if not difference <= tolerance * spread:  # NaN is not within anything
        raise NotNative(f"its logits differ from MLX's by {difference:.3g} of {spread:.3g}")
