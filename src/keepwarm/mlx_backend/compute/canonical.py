"""Canonical shapes: equal bits whatever the chunks, the batch and the history, on the CPU.

A matrix product's last bits depend on its shape: MKL computes 1 to 3 rows in another way than 4 or
more, and splits sums over keys by their number. So rows and query rows are padded to a multiple of
4 and keys to a multiple of 512 with a mask. Measured in docs/adr/0001-blas-on-the-cpu.md.
"""

from collections.abc import Sequence

import mlx.core as mx

from keepwarm.mlx_backend import CPU_SETUP
from keepwarm.mlx_backend.compute.attention_hook import OwnAttention
from keepwarm.mlx_backend.compute.slab import LayerCache

ROW_MULTIPLE = 4
KEY_MULTIPLE = 512


def why_not_promised() -> str:
    """Return why equal bits cannot be promised on this device; empty where they are."""
    if mx.default_device() != mx.cpu:
        return "not promised on a GPU: its kernels may sum in another order"
    if CPU_SETUP.needed and not CPU_SETUP.reproducible:
        return "not promised with this BLAS: equal products may differ in their last bits"
    return ""


def round_up(number: int, multiple: int) -> int:
    """Return the next multiple from `number` on."""
    return -(-number // multiple) * multiple


class CanonicalChunk:
    """One layer of a prefill: `num_tokens` real rows, and padding that no real row attends to.

    Padding rows are computed and dropped; they are never written to the slab. The mask is made
    once for all layers.
    """

    def __init__(self, cache: LayerCache, num_tokens: int, mask: mx.array) -> None:
        self._cache = cache
        self._num_tokens = num_tokens
        self._mask = mask
        self.offset = cache.offset

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        cache = self._cache
        cache.append(keys[..., : self._num_tokens, :], values[..., : self._num_tokens, :])
        num_keys = self._mask.shape[-1]
        return cache.keys[..., :num_keys, :], cache.values[..., :num_keys, :]

    def make_mask(self, *_: object, **__: object) -> mx.array:
        return self._mask


class CanonicalRows(OwnAttention):
    """Attends in canonical shapes, with a mask for each real row."""

    def __init__(
        self, caches: Sequence[LayerCache], offset: mx.array, masks: Sequence[mx.array]
    ) -> None:
        super().__init__(caches, offset)
        self._masks = masks

    def attend(self, queries: mx.array, scale: float) -> mx.array:
        outputs = [
            _attend(queries[row : row + 1], cache, mask, scale)
            for row, (cache, mask) in enumerate(zip(self._caches, self._masks, strict=True))
        ]
        padding = queries.shape[0] - len(outputs)
        return mx.concatenate([*outputs, *[outputs[0]] * padding])


def _attend(query: mx.array, cache: LayerCache, mask: mx.array, scale: float) -> mx.array:
    """Return the attention of one token (1, heads, 1, dim).

    The query heads of one KV head are the rows of one product, padded to a multiple of 4. A row's
    bits are the same as in a chunk, where the rows of a product are a head's tokens.
    """
    num_keys = mask.shape[-1]
    num_heads, num_kv_heads = query.shape[1], cache.keys.shape[1]
    num_rows = num_heads // num_kv_heads
    rows = query.reshape(1, num_kv_heads, num_rows, -1)
    rows = mx.pad(rows, [(0, 0), (0, 0), (0, -num_rows % ROW_MULTIPLE), (0, 0)])
    output = mx.fast.scaled_dot_product_attention(
        rows, cache.keys[..., :num_keys, :], cache.values[..., :num_keys, :], scale=scale, mask=mask
    )
    return output[..., :num_rows, :].reshape(1, num_heads, 1, -1)


def chunk_mask(start: int, num_tokens: int) -> mx.array:
    """(padded rows, padded keys), true where a row may attend.

    A row attends to all up to itself, a padding row to all real ones: without any key, softmax
    would give NaN.
    """
    num_rows = round_up(num_tokens, ROW_MULTIPLE)
    last_seen = mx.minimum(mx.arange(num_rows), num_tokens - 1) + start
    num_keys = round_up(start + num_tokens, KEY_MULTIPLE)
    return mx.arange(num_keys)[None] <= last_seen[:, None]


def row_mask(position: int) -> mx.array:
    """(1, padded keys), true up to `position`, where the row's new token is."""
    num_keys = round_up(position + 1, KEY_MULTIPLE)
    return mx.arange(num_keys)[None] <= position
