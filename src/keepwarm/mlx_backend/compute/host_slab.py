"""Slabs in the host's own memory: KV as raw bits, an array for each layer's keys and values."""

import ctypes
import math
from collections.abc import Iterator, Sequence

import numpy as np

from keepwarm.core.errors import InvariantBroken
from keepwarm.core.layout import CacheLayout
from keepwarm.mlx_backend.compute.kv_copies import write_pieces
from keepwarm.mlx_backend.compute.payload import RAW_DTYPES, KVPayload, RawArray

_PAGE_BYTES = 4096


class HostSlab:
    """One line's KV: (heads, capacity, dim) for the keys and the values of layer 0, 1, ...

    The arrays never move, so the native step keeps their addresses.
    """

    def __init__(self, layout: CacheLayout, capacity_tokens: int) -> None:
        self.capacity_tokens = capacity_tokens
        self.num_tokens = 0
        self.nbytes = layout.slab_bytes(capacity_tokens)
        dtype = RAW_DTYPES[layout.dtype]
        self._arrays: list[RawArray] = [
            np.empty((layer.num_kv_heads, capacity_tokens, dim), dtype)
            for layer in layout.layers
            for dim in (layer.key_dim, layer.value_dim)
        ]
        addresses = [array.ctypes.data for array in self._arrays]
        self._addresses = (ctypes.c_void_p * len(addresses))(*addresses)
        self.address = ctypes.addressof(self._addresses)
        """Where the arrays' addresses are, as the native step takes them."""
        self._num_ready = 0

    def __repr__(self) -> str:
        return f"HostSlab({self.num_tokens} of {self.capacity_tokens} tokens)"

    @property
    def is_gone(self) -> bool:
        return not self._arrays

    @property
    def is_ready(self) -> bool:
        return self._num_ready == len(self._arrays)

    def arrays(self) -> Sequence[RawArray]:
        """Return the arrays themselves: what is written into them is in the slab."""
        return self._arrays

    def prepare(self, max_bytes: float) -> None:
        """Touch the pages of the next arrays; at least of one."""
        while not self.is_ready and max_bytes > 0:
            array = self._arrays[self._num_ready]
            array.reshape(-1).view(np.uint8)[::_PAGE_BYTES] = 0
            self._num_ready += 1
            max_bytes -= array.nbytes

    def extract(self, start: int, stop: int) -> KVPayload:
        if not 0 <= start <= stop <= self.num_tokens:
            raise InvariantBroken(f"[{start}, {stop}) is not within {self!r}")
        return KVPayload(stop - start, tuple(array[:, start:stop].copy() for array in self._arrays))

    def append(self, payloads: Sequence[KVPayload]) -> None:
        """Copy the payloads' KV behind what is held."""
        end = self.num_tokens + sum(payload.num_tokens for payload in payloads)
        if end > self.capacity_tokens:
            raise InvariantBroken(f"{end} tokens overflow {self!r}")
        self.prepare(math.inf)
        pieces = list(zip(*(payload.arrays for payload in payloads), strict=True))
        write_pieces(self._arrays, self.num_tokens, pieces)
        self.num_tokens = end

    def append_span(self, source: "HostSlab", start: int, stop: int) -> None:
        """Copy [start, stop) of another slab behind what is held, which ends at `start`."""
        if self.num_tokens != start or not start <= stop <= source.num_tokens:
            raise InvariantBroken(f"[{start}, {stop}) of {source!r} does not follow {self!r}")
        self.prepare(math.inf)
        for own, other in zip(self._arrays, source._arrays, strict=True):
            own[:, start:stop] = other[:, start:stop]
        self.num_tokens = stop

    def dismantle(self, spans: Sequence[tuple[int, int]]) -> list[KVPayload]:
        """Extract the spans and free the slab, one array at a time."""
        if any(not 0 <= start <= stop <= self.num_tokens for start, stop in spans):
            raise InvariantBroken(f"{spans} are not within {self!r}")
        parts: list[list[RawArray]] = [[] for _ in spans]
        for array in self._let_go():
            for part, (start, stop) in zip(parts, spans, strict=True):
                part.append(array[:, start:stop].copy())
        return [
            KVPayload(stop - start, tuple(part))
            for (start, stop), part in zip(spans, parts, strict=True)
        ]

    def move_to(self, larger: "HostSlab") -> None:
        """Move the KV into a larger, empty slab, one array at a time."""
        num_tokens = self.num_tokens
        for array, target in zip(self._let_go(), larger._arrays, strict=True):
            target[:, :num_tokens] = array[:, :num_tokens]
        larger.num_tokens = num_tokens
        larger.prepare_rest_of(num_tokens)

    def prepare_rest_of(self, num_tokens: int) -> None:
        """Touch what lies behind the first tokens, which have been written."""
        for array in self._arrays:
            array[:, num_tokens:] = 0
        self._num_ready = len(self._arrays)

    def _let_go(self) -> Iterator[RawArray]:
        """Yield the arrays, each freed when the next is asked for; the slab is gone."""
        arrays, self._arrays = self._arrays, []
        self.num_tokens = 0
        while arrays:
            yield arrays.pop(0)
