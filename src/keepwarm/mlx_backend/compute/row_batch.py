"""RowBatchGenerator: every row owns its contiguous KV, and joining a batch copies nothing.

A step runs the model once for all rows that decode, and once for each chunk: a product's bits
depend on its shape, so a row's neighbours must not change it. In decode only attention loops over
the rows (`attention_hook.py`). A single row takes mlx-lm's own path, so one agent costs what bare
mlx-lm costs.
"""

import warnings
from collections.abc import Sequence
from typing import Any, cast

import mlx.core as mx
from mlx import nn

from keepwarm.core.errors import InvariantBroken
from keepwarm.core.layout import CacheLayout
from keepwarm.core.ports import Payload, RowId, RowInput, Slab, check_rows
from keepwarm.mlx_backend.compute import canonical
from keepwarm.mlx_backend.compute.attention_hook import RowsLayer, open_seam
from keepwarm.mlx_backend.compute.kv_copies import copies_for
from keepwarm.mlx_backend.compute.kv_mover import KVMover
from keepwarm.mlx_backend.compute.open_rows import OpenRows
from keepwarm.mlx_backend.compute.payload import (
    cut,
    largest_difference,
    own_payload,
    pack,
    unpack,
)
from keepwarm.mlx_backend.compute.sampling import Sampler, sample
from keepwarm.mlx_backend.compute.slab import LayerCache, RowSlab

LEAST_CHUNK_TOKENS = 32
"""A chunk costs a pass of its own, about that of a decode step, however short it is."""


class RowBatchGenerator:
    """Implements `BatchGenerator` on an mlx-lm model whose layers all have a plain KVCache.

    `deterministic` computes in canonical shapes: on the CPU, with a reproducible BLAS, bits are
    equal whatever the chunks, the batch and the history (docs/adr/0001-blas-on-the-cpu.md);
    elsewhere a warning says that equal bits are not promised. One thread must use it.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: CacheLayout,
        *,
        deterministic: bool = False,
        sampler: Sampler = sample,
    ) -> None:
        if deterministic and (reason := canonical.why_not_promised()):
            warnings.warn(f"deterministic: equal bits are {reason}", stacklevel=2)
        open_seam(model)
        self._model: nn.Module | None = model
        self._layout = layout
        self._deterministic = deterministic
        self._sampler = sampler
        self._mover = KVMover(copies_for(layout, mx.default_device()))
        self._rows = OpenRows(RowSlab)

    def __repr__(self) -> str:
        return f"RowBatchGenerator({len(self._rows)} rows)"

    # -- slabs -----------------------------------------------------------------------------------

    def slab_bytes(self, capacity_tokens: int) -> int:
        return self._layout.slab_bytes(self._padded(capacity_tokens))

    def new_slab(self, capacity_tokens: int) -> Slab:
        return RowSlab(self._layout, capacity_tokens, self._padded(capacity_tokens))

    def prepare(self, slab: Slab, max_bytes: float) -> None:
        self._rows.outside(slab).prepare(max_bytes)

    def grow_slab(self, slab: Slab, capacity_tokens: int) -> Slab:
        larger = RowSlab(self._layout, capacity_tokens, self._padded(capacity_tokens))
        self._mover.grow(self._rows.outside(slab), larger)
        return larger

    def trim(self, slab: Slab, num_tokens: int) -> None:
        outside = self._rows.outside(slab)
        if num_tokens > outside.num_tokens:
            raise InvariantBroken(f"{outside!r} cannot be trimmed to {num_tokens} tokens")
        outside.set_num_tokens(num_tokens)

    def extract(self, slab: Slab, start: int, stop: int) -> Payload:
        return self._mover.extract(self._rows.own(slab), start, stop)

    def dismantle(self, slab: Slab, spans: Sequence[tuple[int, int]]) -> list[Payload]:
        return list(self._mover.dismantle(self._rows.outside(slab), spans))

    def reconstruct(self, slab: Slab, payloads: Sequence[Payload]) -> None:
        own = [own_payload(payload) for payload in payloads]
        self._mover.reconstruct(self._rows.outside(slab), own)

    def copy_span(self, source: Slab, target: Slab, start: int, stop: int) -> None:
        self._mover.copy_span(self._rows.own(source), self._rows.outside(target), start, stop)

    def cut(self, payload: Payload, start: int, stop: int) -> Payload:
        return cut(own_payload(payload), start, stop)

    def pack(self, payload: Payload) -> tuple[memoryview, ...]:
        return pack(own_payload(payload))

    def unpack(self, num_tokens: int, data: memoryview) -> Payload:
        return unpack(self._layout, num_tokens, data)

    def largest_difference(self, a: Payload, b: Payload) -> float:
        return largest_difference(self._layout, own_payload(a), own_payload(b))

    # -- rows ------------------------------------------------------------------------------------

    @property
    def least_chunk_tokens(self) -> int:
        return LEAST_CHUNK_TOKENS

    def open_row(self, row: RowId, slab: Slab) -> None:
        self._rows.open(row, slab)

    def close_row(self, row: RowId) -> Slab:
        return self._rows.close(row)

    def step(self, inputs: Sequence[RowInput]) -> list[list[int]]:
        check_rows(inputs)
        for item in inputs:
            self._rows.with_room(item)
        together = [item for item in inputs if _decodes(item)]
        sampled = dict(zip((item.row for item in together), self._decode(together), strict=True))
        for item in inputs:
            if not _decodes(item):
                sampled[item.row] = self._compute_chunk(item)
        return [sampled[item.row] for item in inputs]

    def release_model(self) -> None:
        if self._rows:
            raise InvariantBroken(f"{self!r} was to release its model")
        self._model = None

    def _decode(self, inputs: Sequence[RowInput]) -> list[list[int]]:
        """Feed one token to each row, and sample the next."""
        if not inputs:
            return []
        logits = self._logits([self._rows[item.row] for item in inputs], inputs)
        tokens = self._sampler(logits, [draw for item in inputs for draw in item.draws])
        # The tokens depend on every layer's KV, so this evaluates the slabs as well.
        mx.eval(tokens)
        return [[token_id] for token_id in cast("list[int]", tokens.tolist())]

    def _logits(self, slabs: Sequence[RowSlab], inputs: Sequence[RowInput]) -> mx.array:
        """Feed one token to each slab, appending its KV; return logits (rows, vocabulary)."""
        ids = [token_id for item in inputs for token_id in item.token_ids]
        if self._deterministic:
            return self._logits_canonical(ids, slabs)
        if len(slabs) == 1:
            return self._run([ids], slabs[0].layers)[:, -1]
        offset = mx.array([slab.num_tokens for slab in slabs])
        layers = [RowsLayer(caches, offset) for caches in _by_layer(slabs)]
        return self._run([[token_id] for token_id in ids], layers)[:, -1]

    def _compute_chunk(self, item: RowInput) -> list[int]:
        """Append the KV of a row's ids, and sample a token for each draw."""
        slab = self._rows[item.row]
        run = self._chunk_canonical if self._deterministic else self._chunk
        if not item.draws:
            run(slab, item.token_ids)  # nothing keeps the logits, so they are not computed
            mx.eval(slab.arrays())
            return []
        tokens = self._sampler(run(slab, item.token_ids)[-len(item.draws) :], item.draws)
        mx.eval(tokens)
        return cast("list[int]", tokens.tolist())

    def _chunk(self, slab: RowSlab, token_ids: Sequence[int]) -> mx.array:
        """Append the chunk's KV; return logits (tokens, vocabulary)."""
        return self._run([token_ids], slab.layers)[0]

    def _chunk_canonical(self, slab: RowSlab, token_ids: Sequence[int]) -> mx.array:
        """Append the chunk's KV, computed in canonical shapes; return logits as `_chunk` does."""
        num_tokens = len(token_ids)
        padding = -num_tokens % canonical.ROW_MULTIPLE
        mask = canonical.chunk_mask(slab.num_tokens, num_tokens)
        layers = [canonical.CanonicalChunk(cache, num_tokens, mask) for cache in slab.layers]
        return self._run([[*token_ids, *[0] * padding]], layers)[0, :num_tokens]

    def _logits_canonical(self, ids: Sequence[int], slabs: Sequence[RowSlab]) -> mx.array:
        padding = [0] * (-len(slabs) % canonical.ROW_MULTIPLE)
        offset = mx.array([*(slab.num_tokens for slab in slabs), *padding])
        masks = [canonical.row_mask(slab.num_tokens) for slab in slabs]
        layers = [canonical.CanonicalRows(caches, offset, masks) for caches in _by_layer(slabs)]
        logits = self._run([[token_id] for token_id in (*ids, *padding)], layers)
        return logits[: len(slabs), -1]

    def _run(self, token_ids: Sequence[Sequence[int]], layers: Sequence[Any]) -> mx.array:
        """Build the model's graph over (rows, tokens); evaluating its result computes it."""
        if self._model is None:
            raise InvariantBroken("a row computes after the weights were released")
        return cast("mx.array", self._model(mx.array(cast("list[Any]", token_ids)), cache=layers))

    def _padded(self, capacity_tokens: int) -> int:
        """Return how many tokens to allocate: canonical keys come in multiples."""
        if self._deterministic:
            return canonical.round_up(capacity_tokens, canonical.KEY_MULTIPLE)
        return capacity_tokens


def _decodes(item: RowInput) -> bool:
    return len(item.token_ids) == len(item.draws) == 1


def _by_layer(slabs: Sequence[RowSlab]) -> list[tuple[LayerCache, ...]]:
    """Return the caches of all rows, for each layer."""
    return list(zip(*(slab.layers for slab in slabs), strict=True))
