"""How a model is computed here: by the native step, or by MLX; and what that makes of its KV."""

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache, partial

import mlx.core as mx
from mlx import nn

from keepwarm.core.errors import ConfigError
from keepwarm.core.layout import CacheLayout
from keepwarm.core.ports import BatchGenFactory
from keepwarm.mlx_backend.compute.native_parts import NativeParts, NotNative, native_parts
from keepwarm.mlx_backend.compute.row_batch import RowBatchGenerator
from keepwarm.mlx_backend.compute.seam_probe import check_seam
from keepwarm.mlx_backend.compute.slab import MX_DTYPES
from keepwarm.mlx_backend.loading.kv_layout import feed_one_token
from keepwarm.mlx_backend.loading.model_folder import ModelFolder
from keepwarm.mlx_backend.loading.native import ORDER, Native, native_step, usable_library
from keepwarm.mlx_backend.loading.weights import bare_model, open_model, ready_weights
from keepwarm.native.library import Library, Missing

KV_DTYPES = ("float16", "float32")
"""The types of the native step's KV; the first is the default."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the settings ask for. Raises ConfigError.

    `dtype`: the type that MLX computes in; asking for one rules out the native step. `kv_dtype`:
    the type of the native step's KV. `native`: whether the native step may be used.
    """

    dtype: str | None = None
    kv_dtype: str | None = None
    native: bool = True

    def __post_init__(self) -> None:
        _require(self.dtype, MX_DTYPES, "dtype")
        _require(self.kv_dtype, KV_DTYPES, "kv_dtype")

    def library(self) -> Library | Missing:
        """Return the native library where it may be used, whatever the model."""
        if not self.native:
            return Missing("it is switched off by the setting `native`")
        if self.dtype is not None:
            return Missing(f"it computes in no other dtype, and {self.dtype} was asked for")
        return usable_library()


@dataclass(frozen=True, slots=True)
class Computation:
    """The way in which a model is computed here.

    `by`: for people, with the reason. `bare`: returns mlx-lm's own model. `compute_dtype` and
    `dequantised` are what the fingerprint says of it.
    """

    factory: BatchGenFactory
    layout: CacheLayout
    vocab_size: int
    by: str
    bare: Callable[[], nn.Module]
    compute_dtype: str
    dequantised: bool = False
    is_native: bool = False


def computation_of(folder: ModelFolder, wanted: Wanted) -> Computation:
    """Load the model by the best way that there is. Raises ModelLoadError and UnsupportedModel."""
    found = wanted.library()
    if isinstance(found, Library):
        native = native_step(
            open_model(folder),
            found,
            max_context_tokens=folder.max_context_tokens,
            kv_dtype=wanted.kv_dtype or KV_DTYPES[0],
        )
        if isinstance(native, Native):
            return _natively(folder, native)
        found = native
    return _on_mlx(folder, wanted, found)


def native_outlook(folder: ModelFolder, wanted: Wanted) -> tuple[NativeParts, Library] | Missing:
    """Say whether the native step knows the model, from its modules, without reading weights.

    Loading also compares logits. Raises ModelLoadError.
    """
    found = wanted.library()
    if isinstance(found, Missing):
        return found
    try:
        parts = native_parts(open_model(folder))
        parts.nbytes(found, folder.max_context_tokens)
    except NotNative as error:
        return Missing(str(error))
    return parts, found


def outlook_in_words(folder: ModelFolder, wanted: Wanted) -> str:
    """Say which way the model will be computed here, and why. Raises ModelLoadError."""
    outlook = native_outlook(folder, wanted)
    if isinstance(outlook, Missing):
        return _with_reason("MLX", outlook)
    return _said_of_native(outlook[1].target, wanted.kv_dtype or KV_DTYPES[0])


def _natively(folder: ModelFolder, native: Native) -> Computation:
    return Computation(
        factory=native.factory,
        layout=native.layout,
        vocab_size=native.vocab_size,
        by=_said_of_native(native.target, native.layout.dtype),
        bare=cache(partial(bare_model, folder)),
        compute_dtype=f"native, order {ORDER}",
        is_native=True,
    )


def _on_mlx(folder: ModelFolder, wanted: Wanted, missing: Missing) -> Computation:
    weights = ready_weights(folder, open_model(folder), wanted.dtype)
    first = feed_one_token(folder, weights.model)
    check_seam(weights.model, first.layout, str(folder.path))
    if wanted.kv_dtype not in (None, first.layout.dtype):
        _log.warning(
            "%s: KV in %s was asked for, and MLX keeps it in %s",
            folder.path,
            wanted.kv_dtype,
            first.layout.dtype,
        )
    return Computation(
        factory=partial(RowBatchGenerator, weights.model, first.layout),
        layout=first.layout,
        vocab_size=first.vocab_size,
        by=_with_reason(f"MLX in {weights.compute_dtype}, KV in {first.layout.dtype}", missing),
        bare=lambda: weights.model,
        compute_dtype=weights.compute_dtype,
        dequantised=weights.dequantised,
    )


def _said_of_native(target: str, kv_dtype: str) -> str:
    return f"the native step ({target}), KV in {kv_dtype}"


def _with_reason(said: str, missing: Missing) -> str:
    if mx.default_device() != mx.cpu:
        return said
    return ". ".join(filter(None, (f"{said}; no native step: {missing.reason}", missing.remedy)))


def _require(value: str | None, known: Collection[str], key: str) -> None:
    if value is not None and value not in known:
        raise ConfigError(key, f"{value!r} is not one of {sorted(known)}")
