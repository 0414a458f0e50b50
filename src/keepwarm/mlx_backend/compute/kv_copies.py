"""Copies KV between MLX arrays and host memory: through the host, or through the device."""

import functools
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from typing import Protocol, cast

import mlx.core as mx
import numpy as np

from keepwarm.core.layout import CacheLayout
from keepwarm.mlx_backend.compute.payload import RAW_DTYPES, RawArray
from keepwarm.mlx_backend.compute.slab import MX_DTYPES

_MX_RAW_DTYPES = {"float32": mx.uint32, "float16": mx.uint16, "bfloat16": mx.uint16}

_PARALLEL_BYTES = 32 << 20
"""How many bytes are copied by several threads. A record from the disk is less, because its copy
runs beside the I/O thread, which reads the next one."""


class KVCopies(Protocol):
    """Copies KV from and to an MLX array, bit for bit. The engine's thread calls it."""

    def read(self, array: mx.array, start: int, stop: int) -> RawArray:
        """Return a copy of the positions [start, stop) of (1, heads, tokens, dim)."""
        ...

    def write(
        self, arrays: Sequence[mx.array], start: int, pieces: Sequence[Sequence[RawArray]]
    ) -> list[mx.array]:
        """Write each array's pieces end to end from position `start`; return the arrays.

        Nothing else may refer to the arrays.
        """
        ...


def write_pieces(
    raws: Sequence[RawArray], start: int, pieces: Sequence[Sequence[RawArray]]
) -> None:
    """Copy each array's pieces into it, end to end along its tokens from `start` on."""
    columns = list(zip(raws, pieces, strict=True))
    if sum(piece.nbytes for column in pieces for piece in column) < _PARALLEL_BYTES:
        _write_columns(columns, start)
    else:
        # A share for each thread: a task for each small column would cost more than its copy.
        shares = [columns[number :: _num_copiers()] for number in range(_num_copiers())]
        list(_copiers().map(_write_columns, shares, repeat(start)))


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
    """Return the threads that copy between two steps, while the engine's thread waits for them."""
    return ThreadPoolExecutor(_num_copiers(), thread_name_prefix="keepwarm-copy")


@functools.cache
def _num_copiers() -> int:
    return min(len(os.sched_getaffinity(0)) if sys.platform == "linux" else 4, 4)


class HostCopies:
    """Reads and writes the arrays' own memory, where the host sees it (CPU; unified memory).

    Without an MLX operation, at the speed of memory. A raw view is dropped before a call returns.
    Pieces are too small for memcpy's non-temporal stores, so one thread would reach two thirds of a
    long copy's speed; large writes are shared by several (docs/adr/0002-row-owned-batches.md).
    """

    def __init__(self, layout: CacheLayout) -> None:
        self._dtype = RAW_DTYPES[layout.dtype]

    def read(self, array: mx.array, start: int, stop: int) -> RawArray:
        return self._raw(array)[:, start:stop].copy()

    def write(
        self, arrays: Sequence[mx.array], start: int, pieces: Sequence[Sequence[RawArray]]
    ) -> list[mx.array]:
        write_pieces([self._raw(array) for array in arrays], start, pieces)
        return list(arrays)

    def _raw(self, array: mx.array) -> RawArray:
        _, heads, tokens, dim = array.shape
        # MLX arrays have the buffer protocol; their type stubs (0.32.4) do not say so.
        flat = np.frombuffer(cast("bytes", array), dtype=self._dtype)
        return flat.reshape(heads, tokens, dim)


class DeviceCopies:
    """Reads and writes through MLX operations, for devices whose memory the host does not share."""

    def __init__(self, layout: CacheLayout) -> None:
        self._dtype = MX_DTYPES[layout.dtype]
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
    """Return the host's copies where device and host share memory (CPU, Metal), or the device's."""
    if device == mx.cpu or mx.metal.is_available():
        return HostCopies(layout)
    return DeviceCopies(layout)
