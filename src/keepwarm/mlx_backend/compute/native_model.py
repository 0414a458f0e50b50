"""An mlx-lm model as the native step computes it: packed once, out of MLX's arrays."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from keepwarm.mlx_backend.compute.native_parts import (
    HEAD_NORMS,
    NativeParts,
    NotNative,
    packed_shape,
)
from keepwarm.native.library import Library
from keepwarm.native.structures import Layer, Model, Weight

_TABLE_STEP = 4096
_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class NativeModel:
    """The packed model. `structure` holds addresses in `memory`, which lives as long as it does."""

    structure: Model
    memory: Sequence[object]

    @property
    def vocabulary(self) -> int:
        return int(self.structure.vocabulary)


def pack_model(
    parts: NativeParts, library: Library, *, num_positions: int, is_kv_float16: bool
) -> NativeModel:
    """Move the weights out of the modules, one at a time, so that the model is held once.

    The modules are of no use afterwards, also where NotNative is raised: for weights that are not
    finite, or of shapes that cannot be packed.
    """
    return _Packing(library).packed(parts, num_positions, is_kv_float16=is_kv_float16)


class _Packing:
    """Owns the memory that it packs into."""

    def __init__(self, library: Library) -> None:
        self._library = library
        self._memory: list[object] = []

    def packed(self, parts: NativeParts, num_positions: int, *, is_kv_float16: bool) -> NativeModel:
        head_dim = parts.head_dim
        layers = (Layer * len(parts.layers))()
        self._memory.append(layers)
        for layer, module in zip(layers, parts.layers, strict=True):
            self._fill(layer, module)
        first = parts.layers[0].self_attn
        embedding = self._weight(parts.embedding)
        cosines, sines = self._tables(first.rope, head_dim, num_positions)
        structure = Model(
            num_layers=len(layers),
            dim=embedding.num_inputs,
            mlp_dim=layers[0].gate.num_outputs,
            vocabulary=embedding.num_outputs,
            num_heads=first.n_heads,
            num_kv_heads=first.n_kv_heads,
            head_dim=head_dim,
            is_kv_float16=is_kv_float16,
            num_positions=num_positions,
            norm_epsilon=parts.layers[0].input_layernorm.eps,
            attention_scale=first.scale,
            layers=layers,
            embedding=embedding,
            head=embedding if parts.head is None else self._weight(parts.head),
            final_norm=self._floats(parts.final_norm.weight),
            cosines=cosines,
            sines=sines,
        )
        return NativeModel(structure, self._memory)

    def _fill(self, layer: Layer, module: Any) -> None:
        attention = module.self_attn
        for name in ("q", "k", "v", "o"):
            setattr(layer, name, self._weight(attention[f"{name}_proj"]))
        for name in ("gate", "up", "down"):
            setattr(layer, name, self._weight(module.mlp[f"{name}_proj"]))
        layer.attention_norm = self._floats(module.input_layernorm.weight)
        layer.mlp_norm = self._floats(module.post_attention_layernorm.weight)
        for name in HEAD_NORMS:
            if name in attention:
                setattr(layer, name, self._floats(attention[name].weight))

    def _weight(self, module: Any) -> Weight:
        shape = packed_shape(module)
        arrays = [module[name] for name in ("weight", "scales", "biases") if name in module]
        for array in arrays:
            _require_finite(array)
        packed = self._aligned(shape.nbytes(self._library))
        raws = [_raw(array) for array in arrays]
        self._library.pack(shape.kind, shape.group, shape.num_inputs, raws, packed)
        bias = self._floats(module.bias) if "bias" in module else None
        module.clear()
        return Weight(
            shape.kind,
            shape.group,
            shape.scale,
            shape.num_outputs,
            shape.num_inputs,
            packed.ctypes.data,
            bias,
        )

    def _tables(self, rope: Any, head_dim: int, num_positions: int) -> tuple[int, int]:
        """Return cosines and sines as MLX's own rotation has them, with any kind of scaling.

        A head of ones and then zeros, rotated, is the cosines and then the sines.
        """
        halves = np.zeros((1, 1, _TABLE_STEP, head_dim), np.float32)
        halves[..., : head_dim // 2] = 1.0
        ones = mx.array(halves)
        cosines = np.empty((num_positions, head_dim // 2), np.float32)
        sines = np.empty_like(cosines)
        for start in range(0, num_positions, _TABLE_STEP):
            stop = min(start + _TABLE_STEP, num_positions)
            rotated = np.array(rope(ones, offset=start))[0, 0, : stop - start]
            cosines[start:stop], sines[start:stop] = np.split(rotated, 2, axis=-1)
        self._memory += [cosines, sines]
        return cosines.ctypes.data, sines.ctypes.data

    def _floats(self, array: mx.array) -> int:
        _require_finite(array)
        floats = np.array(array.astype(mx.float32))
        self._memory.append(floats)
        return int(floats.ctypes.data)

    def _aligned(self, nbytes: int) -> NDArray[np.uint8]:
        memory = np.empty(nbytes + _ALIGNMENT, np.uint8)
        start = -memory.ctypes.data % _ALIGNMENT
        self._memory.append(memory)
        return memory[start : start + nbytes]


def _require_finite(array: mx.array) -> None:
    if mx.issubdtype(array.dtype, mx.floating) and not bool(mx.isfinite(array).all()):
        raise NotNative("a weight is not a finite number")


def _raw(array: mx.array) -> NDArray[np.generic]:
    """Return the array's bits; numpy has no bfloat16."""
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)
