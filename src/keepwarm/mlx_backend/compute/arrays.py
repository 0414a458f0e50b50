"""Slabs and payloads: a line's KV as MLX arrays, and copies of it as host bytes.

Reconstruct (payloads to slab) and extract (slab to payloads) are inverses, bit for bit. A slab's
arrays never leave it: a payload is a copy, because a live view of a slab makes MLX's next in-place
write copy the whole slab, and a borrowed buffer would see later writes.
"""

import functools
import math
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from typing import Protocol, cast

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import KVCache
from numpy.typing import NDArray

from keepwarm.core.errors import InvariantBroken
from keepwarm.core.layout import CacheLayout, LayerLayout

RawArray = NDArray[np.uint16] | NDArray[np.uint32]

_MX_DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
_RAW_DTYPES = {"float32": np.uint32, "float16": np.uint16, "bfloat16": np.uint16}
# A record from the disk is less: its copy runs beside the thread that reads the next one.
_PARALLEL_BYTES = 32 << 20
_MX_RAW_DTYPES = {"float32": mx.uint32, "float16": mx.uint16, "bfloat16": mx.uint16}


@dataclass(frozen=True, slots=True, eq=False)
class KVPayload:
    """KV of a run of tokens as raw bits: one array of (heads, tokens, dim) for each K and each V.

    `arrays` holds the keys and the values of layer 0, then of layer 1, and so on. They are separate
    allocations so that a slab can become payloads layer by layer.
    """

    num_tokens: int
    arrays: tuple[RawArray, ...]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)


EARLY_START_LAYERS = 2


def starts_early(index: int) -> bool:
    """Whether the layers so far are set going while Python still builds the graph of the others.

    Building SmolLM2's graph takes a tenth of a decode step. For single rows and chunks only: with
    many rows (attention_hook.py) it does not pay, because Python and MKL's threads then want the
    same cores. A GPU's command buffers are left alone.
    """
    return mx.default_device() == mx.cpu and index % EARLY_START_LAYERS == 0


class LayerCache(KVCache):
    """mlx-lm's KVCache for one layer, with its full capacity allocated up front.

    `starts_early`: evaluation of all up to this layer begins when the layer is reached.
    """

    keys: mx.array
    values: mx.array
    offset: int

    def __init__(
        self, layer: LayerLayout, num_tokens: int, dtype: mx.Dtype, *, starts_early: bool
    ) -> None:
        self.starts_early = starts_early
        # KVCache's own __init__ would only set these three.
        self.offset = 0
        self._num_allocated = num_tokens
        self.keys = mx.zeros((1, layer.num_kv_heads, num_tokens, layer.key_dim), dtype)
        self.values = mx.zeros((1, layer.num_kv_heads, num_tokens, layer.value_dim), dtype)

    def append(self, keys: mx.array, values: mx.array) -> None:
        """Write (1, heads, tokens, dim) behind what is held, in place as nobody else holds it."""
        start, stop = self.offset, self.offset + keys.shape[2]
        if stop - start == self._num_allocated:
            # MLX does not write a slice that covers all: it takes the new array, strides and all.
            keys, values = mx.contiguous(keys), mx.contiguous(values)
        self.keys[..., start:stop, :] = keys
        self.values[..., start:stop, :] = values
        self.offset = stop

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.append(keys, values)
        if self.starts_early:
            mx.async_eval(self.keys, self.values)
        return self.held()

    def held(self) -> tuple[mx.array, mx.array]:
        """Keys and values of the tokens held: views, to be used up before the next write."""
        return self.keys[..., : self.offset, :], self.values[..., : self.offset, :]

    def release(self) -> None:
        """Free the arrays; the cache must not be used again."""
        del self.keys, self.values


class RowSlab:
    """One line's KV, a LayerCache for each layer.

    `padded_tokens` is what was allocated, at least `capacity_tokens`. Whoever holds the slab may
    write it; nobody may keep its arrays.
    """

    def __init__(self, layout: CacheLayout, capacity_tokens: int, padded_tokens: int) -> None:
        self.capacity_tokens = capacity_tokens
        self.padded_tokens = padded_tokens
        self.is_gone = False
        dtype = _MX_DTYPES[layout.dtype]
        self.layers = [
            LayerCache(layer, padded_tokens, dtype, starts_early=starts_early(index))
            for index, layer in enumerate(layout.layers)
        ]
        self._nbytes = layout.slab_bytes(padded_tokens)
        self._num_ready_layers = 0

    def __repr__(self) -> str:
        return f"RowSlab({self.num_tokens} of {self.capacity_tokens} tokens)"

    @property
    def num_tokens(self) -> int:
        return self.layers[0].offset

    @property
    def nbytes(self) -> int:
        return self._nbytes

    @property
    def is_ready(self) -> bool:
        return self._num_ready_layers == len(self.layers)

    def prepare(self, max_bytes: float) -> None:
        """Let MLX make the arrays of the next layers; at least of one."""
        layer_bytes = self._nbytes / len(self.layers)
        num_layers = max(1, int(min(max_bytes, self._nbytes) / layer_bytes))
        start = self._num_ready_layers
        mx.eval([(cache.keys, cache.values) for cache in self.layers[start : start + num_layers]])
        self._num_ready_layers = min(start + num_layers, len(self.layers))

    def set_num_tokens(self, num_tokens: int) -> None:
        for cache in self.layers:
            cache.offset = num_tokens

    def set_arrays(self, arrays: Sequence[mx.array]) -> None:
        for index, cache in enumerate(self.layers):
            cache.keys, cache.values = arrays[2 * index : 2 * index + 2]

    def arrays(self) -> list[mx.array]:
        """Keys and values in a payload's order. Drop the list before the next write."""
        return [array for cache in self.layers for array in (cache.keys, cache.values)]


class KVCopies(Protocol):
    """Moves KV between slabs and host memory. Two ways, one contract: the same bits."""

    def read(self, array: mx.array, start: int, stop: int) -> RawArray:
        """A copy of the positions [start, stop) of (1, heads, tokens, dim)."""
        ...

    def write(
        self, arrays: Sequence[mx.array], start: int, pieces: Sequence[Sequence[RawArray]]
    ) -> list[mx.array]:
        """Each array with its pieces in place from `start` on; nobody else may hold the arrays."""
        ...


def _write_columns(
    columns: Sequence[tuple[RawArray, Sequence[RawArray]]], first_position: int
) -> None:
    for raw, pieces in columns:
        start = first_position
        for piece in pieces:
            stop = start + piece.shape[1]
            raw[:, start:stop] = piece
            start = stop


@functools.cache
def _copiers() -> ThreadPoolExecutor:
    """Threads that copy between two steps, while the engine's thread waits for them."""
    return ThreadPoolExecutor(_num_copiers(), thread_name_prefix="keepwarm-copy")


@functools.cache
def _num_copiers() -> int:
    return min(len(os.sched_getaffinity(0)) if sys.platform == "linux" else 4, 4)


class HostCopies:
    """Reads and writes the arrays' own memory, where the host sees it (CPU; unified memory).

    No MLX operation: one copy at the speed of memory. A raw view is dropped before it returns.
    Pieces are too small for memcpy's stores past the cache, so one thread would reach two thirds of
    the speed of one long copy; much is copied by several (docs/adr/0002-row-owned-batches.md).
    """

    def __init__(self, layout: CacheLayout) -> None:
        self._dtype = _RAW_DTYPES[layout.dtype]

    def read(self, array: mx.array, start: int, stop: int) -> RawArray:
        return self._raw(array)[:, start:stop].copy()

    def write(
        self, arrays: Sequence[mx.array], start: int, pieces: Sequence[Sequence[RawArray]]
    ) -> list[mx.array]:
        raws = [self._raw(array) for array in arrays]
        columns = list(zip(raws, pieces, strict=True))
        if sum(piece.nbytes for column in pieces for piece in column) < _PARALLEL_BYTES:
            _write_columns(columns, start)
        else:
            # A share for each thread: a task for each small column would cost more than its copy.
            shares = [columns[number :: _num_copiers()] for number in range(_num_copiers())]
            list(_copiers().map(_write_columns, shares, repeat(start)))
        return list(arrays)

    def _raw(self, array: mx.array) -> RawArray:
        _, heads, tokens, dim = array.shape
        # MLX arrays speak the buffer protocol, which typeshed cannot know.
        flat = np.frombuffer(cast("bytes", array), dtype=self._dtype)
        return flat.reshape(heads, tokens, dim)


class DeviceCopies:
    """The same through MLX operations, for devices whose memory the host does not share."""

    def __init__(self, layout: CacheLayout) -> None:
        self._dtype = _MX_DTYPES[layout.dtype]
        self._raw_dtype = _MX_RAW_DTYPES[layout.dtype]

    def read(self, array: mx.array, start: int, stop: int) -> RawArray:
        part = mx.contiguous(array[0, :, start:stop]).view(self._raw_dtype)
        return np.array(part)

    def write(
        self, arrays: Sequence[mx.array], start: int, pieces: Sequence[Sequence[RawArray]]
    ) -> list[mx.array]:
        written = list(arrays)
        for array, column in zip(written, pieces, strict=True):
            position = start
            for piece in column:
                stop = position + piece.shape[1]
                array[0, :, position:stop] = mx.array(piece).view(self._dtype)
                position = stop
        mx.eval(written)
        return written


def copies_for(layout: CacheLayout, device: mx.Device) -> KVCopies:
    """The host's own copies on the CPU and on Metal, whose memory is one; else the device's."""
    if device == mx.cpu or mx.metal.is_available():
        return HostCopies(layout)
    return DeviceCopies(layout)


class SlabArrays:
    """Reconstruct, extract and the other moves between slabs and payloads."""

    def __init__(self, layout: CacheLayout, copies: KVCopies) -> None:
        self._layout = layout
        self._copies = copies

    def extract(self, slab: RowSlab, start: int, stop: int) -> KVPayload:
        if not 0 <= start <= stop <= slab.num_tokens:
            raise InvariantBroken(f"[{start}, {stop}) is not within {slab!r}")
        read = self._copies.read
        return KVPayload(stop - start, tuple(read(a, start, stop) for a in slab.arrays()))

    def reconstruct(self, slab: RowSlab, payloads: Sequence[KVPayload]) -> None:
        start = slab.num_tokens
        end = start + sum(payload.num_tokens for payload in payloads)
        if end > slab.capacity_tokens:
            raise InvariantBroken(f"{end} tokens overflow {slab!r}")
        slab.prepare(math.inf)
        columns = list(zip(*(payload.arrays for payload in payloads), strict=True))
        slab.set_arrays(self._copies.write(slab.arrays(), start, columns))
        slab.set_num_tokens(end)

    def copy_span(self, source: RowSlab, target: RowSlab, start: int, stop: int) -> None:
        if target.num_tokens != start:
            raise InvariantBroken(f"a span from {start} does not follow {target!r}")
        # By way of a copy: a view of the source would be live while MLX may write to it.
        self.reconstruct(target, [self.extract(source, start, stop)])

    def dismantle(self, slab: RowSlab, spans: Sequence[tuple[int, int]]) -> list[KVPayload]:
        """Extract the spans and free the slab, one layer at a time."""
        num_tokens = slab.num_tokens
        if any(not 0 <= start <= stop <= num_tokens for start, stop in spans):
            raise InvariantBroken(f"{spans} are not within {slab!r}")
        parts: list[list[RawArray]] = [[] for _ in spans]
        read = self._copies.read
        for cache in slab.layers:
            for part, (start, stop) in zip(parts, spans, strict=True):
                part += [read(cache.keys, start, stop), read(cache.values, start, stop)]
            cache.release()
        slab.is_gone = True
        lengths = (stop - start for start, stop in spans)
        return [KVPayload(n, tuple(part)) for n, part in zip(lengths, parts, strict=True)]

    def grow(self, slab: RowSlab, larger: RowSlab) -> None:
        """Move the KV into a larger, empty slab, one layer at a time."""
        num_tokens = slab.num_tokens
        for cache, target in zip(slab.layers, larger.layers, strict=True):
            keys = self._copies.read(cache.keys, 0, num_tokens)
            values = self._copies.read(cache.values, 0, num_tokens)
            cache.release()
            target.keys, target.values = self._copies.write(
                [target.keys, target.values], 0, [[keys], [values]]
            )
        slab.is_gone = True
        larger.set_num_tokens(num_tokens)
        larger.prepare(math.inf)


def cut(payload: KVPayload, start: int, stop: int) -> KVPayload:
    """A copy of the positions [start, stop) of a payload."""
    if not 0 <= start <= stop <= payload.num_tokens:
        raise InvariantBroken(f"[{start}, {stop}) is not within {payload.num_tokens} tokens")
    return KVPayload(stop - start, tuple(array[:, start:stop].copy() for array in payload.arrays))


def unpack(layout: CacheLayout, num_tokens: int, data: memoryview) -> KVPayload:
    """The payload whose arrays lie end to end in `data`; they keep it alive and do not copy it."""
    tensors = layout.tensors(num_tokens)
    if data.nbytes != sum(tensor.nbytes for tensor in tensors):
        raise InvariantBroken(f"{data.nbytes} bytes are no payload of {num_tokens} tokens")
    arrays: list[RawArray] = []
    start = 0
    for tensor in tensors:
        piece = data[start : start + tensor.nbytes]
        arrays.append(np.frombuffer(piece, _RAW_DTYPES[layout.dtype]).reshape(tensor.shape))
        start += tensor.nbytes
    return KVPayload(num_tokens, tuple(arrays))


def largest_difference(layout: CacheLayout, a: KVPayload, b: KVPayload) -> float:
    """The largest absolute difference of two payloads, layer by layer; 0.0 for equal bits only."""
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
    """Raw bits as numbers. numpy has no bfloat16: its bits are the upper half of a float32."""
    if dtype == "bfloat16":
        return (raw.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return raw.view(dtype).astype(np.float64)
