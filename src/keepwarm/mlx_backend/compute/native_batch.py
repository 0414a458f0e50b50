"""NativeBatchGenerator: rows on the CPU's native step, a whole step in one call."""

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
from keepwarm.mlx_backend.compute.open_rows import OpenRows
from keepwarm.mlx_backend.compute.payload import (
    cut,
    largest_difference,
    own_payload,
    pack,
    unpack,
)
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
        self._rows = OpenRows(HostSlab)

    def __repr__(self) -> str:
        return f"NativeBatchGenerator({len(self._rows)} rows)"

    # -- slabs -----------------------------------------------------------------------------------

    def slab_bytes(self, capacity_tokens: int) -> int:
        return self._layout.slab_bytes(capacity_tokens)

    def new_slab(self, capacity_tokens: int) -> Slab:
        return HostSlab(self._layout, capacity_tokens)

    def prepare(self, slab: Slab, max_bytes: float) -> None:
        self._rows.outside(slab).prepare(max_bytes)

    def grow_slab(self, slab: Slab, capacity_tokens: int) -> Slab:
        larger = HostSlab(self._layout, capacity_tokens)
        self._rows.outside(slab).move_to(larger)
        return larger

    def trim(self, slab: Slab, num_tokens: int) -> None:
        outside = self._rows.outside(slab)
        if num_tokens > outside.num_tokens:
            raise InvariantBroken(f"{outside!r} cannot be trimmed to {num_tokens} tokens")
        outside.num_tokens = num_tokens

    def extract(self, slab: Slab, start: int, stop: int) -> Payload:
        return self._rows.own(slab).extract(start, stop)

    def dismantle(self, slab: Slab, spans: Sequence[tuple[int, int]]) -> list[Payload]:
        return list(self._rows.outside(slab).dismantle(spans))

    def reconstruct(self, slab: Slab, payloads: Sequence[Payload]) -> None:
        self._rows.outside(slab).append([own_payload(payload) for payload in payloads])

    def copy_span(self, source: Slab, target: Slab, start: int, stop: int) -> None:
        self._rows.outside(target).append_span(self._rows.own(source), start, stop)

    def cut(self, payload: Payload, start: int, stop: int) -> Payload:
        return cut(own_payload(payload), start, stop)

    def pack(self, payload: Payload) -> tuple[memoryview, ...]:
        return pack(own_payload(payload))

    def unpack(self, num_tokens: int, data: memoryview) -> Payload:
        return unpack(self._layout, num_tokens, data)

    def largest_difference(self, a: Payload, b: Payload) -> float:
        return largest_difference(self._layout, own_payload(a), own_payload(b))

    # -- rows ------------------------------------------------------------------------------------

    def open_row(self, row: RowId, slab: Slab) -> None:
        self._rows.open(row, slab)

    def close_row(self, row: RowId) -> Slab:
        return self._rows.close(row)

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
        slabs = [self._rows.with_room(item) for item in inputs]
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
