"""A payload: copies of KV as raw bits in host memory."""

import math
import sys
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from keepwarm.core.errors import InvariantBroken
from keepwarm.core.layout import CacheLayout
from keepwarm.core.ports import Payload

RawArray = NDArray[np.uint16] | NDArray[np.uint32]
"""KV as bits: numpy has no bfloat16, and bits make comparisons exact."""

RAW_DTYPES = {"float32": np.uint32, "float16": np.uint16, "bfloat16": np.uint16}


@dataclass(frozen=True, slots=True, eq=False)
class KVPayload:
    """The KV of a run of tokens: one array of (heads, tokens, dim) for each K and each V.

    `arrays` holds the keys and the values of layer 0, then of layer 1, and so on. They are separate
    allocations so that a slab can become payloads layer by layer.
    """

    num_tokens: int
    arrays: tuple[RawArray, ...]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)


def own_payload(payload: Payload) -> KVPayload:
    """Return the payload as one of this backend. Raises InvariantBroken."""
    if not isinstance(payload, KVPayload):
        raise InvariantBroken(f"{payload!r} is no payload of this generator")
    return payload


def pack(payload: KVPayload) -> tuple[memoryview, ...]:
    """Return the bytes of each array, not copied."""
    return tuple(array.data.cast("B") for array in payload.arrays)


def cut(payload: KVPayload, start: int, stop: int) -> KVPayload:
    """Return a copy of the positions [start, stop) of a payload."""
    if not 0 <= start <= stop <= payload.num_tokens:
        raise InvariantBroken(f"[{start}, {stop}) is not within {payload.num_tokens} tokens")
    return KVPayload(stop - start, tuple(array[:, start:stop].copy() for array in payload.arrays))


def unpack(layout: CacheLayout, num_tokens: int, data: memoryview) -> KVPayload:
    """Return the payload whose arrays lie end to end in `data`, which they keep alive and do not
    copy.
    """
    tensors = layout.tensors(num_tokens)
    if data.nbytes != sum(tensor.nbytes for tensor in tensors):
        raise InvariantBroken(f"{data.nbytes} bytes are no payload of {num_tokens} tokens")
    arrays: list[RawArray] = []
    start = 0
    for tensor in tensors:
        piece = data[start : start + tensor.nbytes]
        arrays.append(np.frombuffer(piece, RAW_DTYPES[layout.dtype]).reshape(tensor.shape))
        start += tensor.nbytes
    return KVPayload(num_tokens, tuple(arrays))


def largest_difference(layout: CacheLayout, a: KVPayload, b: KVPayload) -> float:
    """Return the largest absolute difference of two payloads, layer by layer.

    0.0 for equal bits only, and inf where a NaN is involved.
    """
    if a.num_tokens != b.num_tokens:
        raise InvariantBroken(f"{a.num_tokens} tokens were compared with {b.num_tokens}")
    pairs = zip(a.arrays, b.arrays, strict=True)
    return max((_difference(x, y, layout.dtype) for x, y in pairs), default=0.0)


def _difference(a: RawArray, b: RawArray, dtype: str) -> float:
    differing = a != b
    if not differing.any():
        return 0.0
    with np.errstate(invalid="ignore", over="ignore"):
        largest = float(np.abs(_floats(a[differing], dtype) - _floats(b[differing], dtype)).max())
    if math.isnan(largest):
        return math.inf
    return max(largest, sys.float_info.min)  # 0.0 and -0.0 are equal numbers of other bits


def _floats(raw: RawArray, dtype: str) -> NDArray[np.float64]:
    """Raw bits as numbers; bfloat16's are the upper half of a float32's."""
    if dtype == "bfloat16":
        return (raw.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return raw.view(dtype).astype(np.float64)
