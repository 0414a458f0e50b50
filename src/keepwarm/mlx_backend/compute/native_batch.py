"""NativeBatchGenerator: rows on the CPU's native step, a whole step in one call."""

import math
from collections.abc import Callable, Sequence
from itertools import islice
from typing import cast

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from keepwarm.core.errors import InvariantBroken
from keepwarm.core.layout import CacheLayout
from keepwarm.core.ports import Draw, Payload, RowId, RowInput, Slab, check_rows
from keepwarm.mlx_backend.compute.host_slab import HostSlab
from keepwarm.mlx_backend.compute.native_model import NativeModel
from keepwarm.mlx_backend.compute.payload import KVPayload, cut, largest_difference, unpack
from keepwarm.mlx_backend.compute.sampling import sample
from keepwarm.native.library import Threads
from keepwarm.native.structures import Row

Logits = NDArray[np.float32]
Sampler = Callable[[Logits, Sequence[Draw]], list[int]]
"""Chooses a token for each draw from its row of the logits, (draws, vocabulary)."""


def sample_host(logits: Logits, draws: Sequence[Draw]) -> list[int]:
    """Sample a token for each draw from its row of `logits` (draws, vocabulary)."""
    if all(draw.sampling.temperature == 0.0 for draw in draws):
        return cast("list[int]", logits.argmax(axis=-1).tolist())
    return cast("list[int]", sample(mx.array(logits), draws).tolist())


class NativeBatchGenerator:
    """Implements `BatchGenerator` on the native step. Every way of computing gives the same bits.

    So `deterministic` changes nothing here. All inputs of a step share one pass over the weights.
    """

    def __init__(
        self,
        model: NativeModel,
        layout: CacheLayout,
        threads: Threads,
        *,
        deterministic: bool = False,
        sampler: Sampler = sample_host,
    ) -> None:
        self._model: NativeModel | None = model
        self._layout = layout
        self._threads = threads
        self._sampler = sampler
        self._rows: dict[RowId, HostSlab] = {}

    def __repr__(self) -> str:
        return f"NativeBatchGenerator({len(self._rows)} rows)"

    # -- slabs -----------------------------------------------------------------------------------

    def slab_bytes(self, capacity_tokens: int) -> int:
        return self._layout.slab_bytes(capacity_tokens)

    def new_slab(self, capacity_tokens: int) -> Slab:
        return HostSlab(self._layout, capacity_tokens)

    def prepare(self, slab: Slab, max_bytes: float) -> None:
        self._outside(slab).prepare(max_bytes)

    def grow_slab(self, slab: Slab, capacity_tokens: int) -> Slab:
        larger = HostSlab(self._layout, capacity_tokens)
        self._outside(slab).move_to(larger)
        return larger

    def trim(self, slab: Slab, num_tokens: int) -> None:
        outside = self._outside(slab)
        if num_tokens > outside.num_tokens:
            raise InvariantBroken(f"{outside!r} cannot be trimmed to {num_tokens} tokens")
        outside.num_tokens = num_tokens

    def extract(self, slab: Slab, start: int, stop: int) -> Payload:
        return _own(slab).extract(start, stop)

    def dismantle(self, slab: Slab, spans: Sequence[tuple[int, int]]) -> list[Payload]:
        return list(self._outside(slab).dismantle(spans))

    def reconstruct(self, slab: Slab, payloads: Sequence[Payload]) -> None:
        self._outside(slab).append([_own_payload(payload) for payload in payloads])

    def copy_span(self, source: Slab, target: Slab, start: int, stop: int) -> None:
        self._outside(target).append_span(_own(source), start, stop)

    def cut(self, payload: Payload, start: int, stop: int) -> Payload:
        return cut(_own_payload(payload), start, stop)

    def pack(self, payload: Payload) -> tuple[memoryview, ...]:
        return tuple(array.data.cast("B") for array in _own_payload(payload).arrays)

    def unpack(self, num_tokens: int, data: memoryview) -> Payload:
        return unpack(self._layout, num_tokens, data)

    def largest_difference(self, a: Payload, b: Payload) -> float:
        return largest_difference(self._layout, _own_payload(a), _own_payload(b))

    # -- rows ------------------------------------------------------------------------------------

    def open_row(self, row: RowId, slab: Slab) -> None:
        if row in self._rows:
            raise InvariantBroken(f"row {row} is open already")
        outside = self._outside(slab)
        outside.prepare(math.inf)
        self._rows[row] = outside

    def close_row(self, row: RowId) -> Slab:
        slab = self._row(row)
        del self._rows[row]
        return slab

    @property
    def least_chunk_tokens(self) -> int:
        return 1

    def step(self, inputs: Sequence[RowInput]) -> list[list[int]]:
        check_rows(inputs)
        if not inputs:
            return []
        logits = self.logits(inputs)
        draws = [draw for item in inputs for draw in item.draws]
        tokens = iter(self._sampler(logits, draws) if draws else ())
        return [list(islice(tokens, len(item.draws))) for item in inputs]

    def release_model(self) -> None:
        if self._rows:
            raise InvariantBroken(f"{self!r} was to release its model")
        self._model = None

    def logits(self, inputs: Sequence[RowInput]) -> Logits:
        """Append the KV of the rows' ids; return the logits of all draws, (draws, vocabulary)."""
        if self._model is None:
            raise InvariantBroken("a row computes after the weights were released")
        rows = (Row * len(inputs))()
        slabs = [self._with_room(item) for item in inputs]
        ids = [np.array(item.token_ids, np.int32) for item in inputs]
        for entry, slab, own, item in zip(rows, slabs, ids, inputs, strict=True):
            entry.ids = own.ctypes.data
            entry.kv = slab.address
            entry.capacity = slab.capacity_tokens
            entry.num_tokens = len(own)
            entry.start = slab.num_tokens
            entry.num_logits = len(item.draws)
        num_draws = sum(len(item.draws) for item in inputs)
        logits = np.empty((num_draws, self._model.vocabulary), np.float32)
        self._threads.step(self._model.structure, rows, logits)
        for slab, own in zip(slabs, ids, strict=True):
            slab.num_tokens += len(own)
        return logits

    def _with_room(self, item: RowInput) -> HostSlab:
        """Return the row's slab. Raises InvariantBroken where the row's ids would overflow it."""
        slab = self._row(item.row)
        if slab.num_tokens + len(item.token_ids) > slab.capacity_tokens:
            raise InvariantBroken(f"{len(item.token_ids)} more tokens overflow {slab!r}")
        return slab

    def _row(self, row: RowId) -> HostSlab:
        slab = self._rows.get(row)
        if slab is None:
            raise InvariantBroken(f"row {row} is not open")
        return slab

    def _outside(self, slab: Slab) -> HostSlab:
        own = _own(slab)
        if any(own is inside for inside in self._rows.values()):
            raise InvariantBroken(f"{own!r} was touched while its row is open")
        return own


def _own(slab: Slab) -> HostSlab:
    if not isinstance(slab, HostSlab) or slab.is_gone:
        raise InvariantBroken(f"{slab!r} is not a live slab of this generator")
    return slab


def _own_payload(payload: Payload) -> KVPayload:
    if not isinstance(payload, KVPayload):
        raise InvariantBroken(f"{payload!r} is no payload of this generator")
    return payload
