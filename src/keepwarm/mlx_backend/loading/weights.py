"""A model's weights as they will compute: dequantised on the CPU, in one dtype, in memory."""

from dataclasses import dataclass
from typing import cast

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.utils import dequantize_model
from mlx_lm.utils import load_model as load_mlx_model

from keepwarm.core.errors import ModelLoadError
from keepwarm.mlx_backend.compute.slab import MX_DTYPES
from keepwarm.mlx_backend.loading.model_folder import ModelFolder, first_line


@dataclass(frozen=True, slots=True)
class LoadedWeights:
    """The model as it will compute."""

    model: nn.Module
    compute_dtype: str
    dequantised: bool


def open_model(folder: ModelFolder) -> nn.Module:
    """Return mlx-lm's module, whose weights are not read yet. Raises ModelLoadError."""
    try:
        model, _ = load_mlx_model(folder.path, lazy=True)
    # What mlx-lm and MLX raise for a config or for weights that do not belong together.
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise ModelLoadError(
            str(folder.path),
            f"mlx-lm cannot build the model ({type(error).__name__}: {first_line(error)})",
            "Check that config.json belongs to these weights, or fetch the model again",
        ) from error
    # mlx-lm draws random weights that are never computed, and each draw makes the chain of lazy
    # keys behind this state longer: 1.4 MB for every load of SmolLM2, measured with MLX 0.32.4.
    mx.eval(mx.random.state)
    return model


def bare_model(folder: ModelFolder) -> nn.Module:
    """Return mlx-lm's model as MLX computes it here: what other ways are compared with."""
    return ready_weights(folder, open_model(folder), None).model


def ready_weights(folder: ModelFolder, model: nn.Module, dtype: str | None) -> LoadedWeights:
    """Evaluate the model's weights as they will compute. Raises ModelLoadError.

    On the CPU device quantised weights are dequantised, because `quantized_matmul` makes 2 GFLOP/s
    there whatever the BLAS (MLX 0.32.4), and all are float32 unless `dtype` says otherwise.
    """
    dequantised = mx.default_device() == mx.cpu and _is_quantised(model)
    if dequantised:
        _dequantise(folder, model, dtype or "float32")
    elif mx.default_device() == mx.cpu or dtype is not None:
        model.set_dtype(MX_DTYPES[dtype or "float32"])
    _materialise(folder, model)
    return LoadedWeights(model, _compute_dtype(model), dequantised)


def _is_quantised(model: nn.Module) -> bool:
    return not all(map(_is_floating, _parameters(model)))


def _parameters(model: nn.Module) -> list[mx.array]:
    return [
        array for _, array in cast("list[tuple[str, mx.array]]", tree_flatten(model.parameters()))
    ]


def _dequantise(folder: ModelFolder, model: nn.Module, dtype: str) -> None:
    # The scales first: float16 scales would round the weights once more.
    model.set_dtype(mx.float32)
    if not any("global_scale" in module for _, module in model.named_modules()):
        dequantize_model(model)
    if _is_quantised(model):
        raise ModelLoadError(
            str(folder.path / "config.json"),
            f"its quantisation ({folder.quantisation}) cannot be undone, and the CPU device is "
            "too slow for quantised weights",
            "Use an unquantised or an MLX affine-quantised copy of the model, or a GPU",
        )
    model.set_dtype(MX_DTYPES[dtype])


def _is_floating(array: mx.array) -> bool:
    return bool(mx.issubdtype(array.dtype, mx.floating))


def _materialise(folder: ModelFolder, model: nn.Module) -> None:
    try:
        mx.eval(model.parameters())
    except RuntimeError as error:
        raise ModelLoadError(
            str(folder.path),
            f"the weights cannot be read ({first_line(error)})",
            "Fetch the model's safetensors files again",
        ) from error


def _compute_dtype(model: nn.Module) -> str:
    """Return the dtypes of the floating-point parameters, in a fixed order: one, as a rule."""
    dtypes = {dtype_name(array) for array in _parameters(model) if _is_floating(array)}
    return "+".join(sorted(dtypes))


def dtype_name(array: mx.array) -> str:
    """Return the dtype without its module, like float16."""
    return str(array.dtype).removeprefix("mlx.core.")
