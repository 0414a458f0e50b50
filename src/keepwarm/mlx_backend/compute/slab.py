"""A slab: one line's KV as MLX arrays, contiguous for each layer, written in place.

A slab's arrays leave it for the length of a call at most. A live view of one makes the next write
copy the whole slab, because MLX (0.32.4) writes in place only what nothing else refers to.
"""

from collections.abc import Sequence

import mlx.core as mx
from mlx_lm.models.cache import KVCache

from keepwarm.core.layout import CacheLayout, LayerLayout

MX_DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
"""The dtypes that weights and KV may have, by their names in settings and layouts."""

EARLY_START_LAYERS = 2
"""Every how many layers the graph built so far is handed to MLX's worker."""


def starts_early(index: int) -> bool:
    """Whether evaluation begins at this layer, while Python still builds the graph of the others.

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
        # KVCache.__init__ (mlx-lm 0.32.2) would only set offset, keys and values.
        self.offset = 0
        self._num_allocated = num_tokens
        self.keys = mx.zeros((1, layer.num_kv_heads, num_tokens, layer.key_dim), dtype)
        self.values = mx.zeros((1, layer.num_kv_heads, num_tokens, layer.value_dim), dtype)

    def append(self, keys: mx.array, values: mx.array) -> None:
        """Write (1, heads, tokens, dim) behind what is held, in place: no view of it is live."""
        start, stop = self.offset, self.offset + keys.shape[2]
        if stop - start == self._num_allocated:
            # A slice that covers all is not written (MLX 0.32.4): the new array takes its place,
            # and its strides would not be those of a slab.
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

    `padded_tokens` is what was allocated, at least `capacity_tokens`. The slab's holder may write
    it; no one may keep its arrays.
    """

    def __init__(self, layout: CacheLayout, capacity_tokens: int, padded_tokens: int) -> None:
        self.capacity_tokens = capacity_tokens
        self.padded_tokens = padded_tokens
        self.is_gone = False
        dtype = MX_DTYPES[layout.dtype]
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
        """Allocate and touch the arrays of the next layers: `max_bytes`, but at least one layer."""
        layer_bytes = self._nbytes / len(self.layers)
        num_layers = max(1, int(min(max_bytes, self._nbytes) / layer_bytes))
        start = self._num_ready_layers
        mx.eval([(cache.keys, cache.values) for cache in self.layers[start : start + num_layers]])
        self._num_ready_layers = min(start + num_layers, len(self.layers))

    def set_num_tokens(self, num_tokens: int) -> None:
        """Say how many positions hold KV, after writing behind them or to forget some."""
        for cache in self.layers:
            cache.offset = num_tokens

    def set_arrays(self, arrays: Sequence[mx.array]) -> None:
        """Replace keys and values, in a payload's order."""
        for index, cache in enumerate(self.layers):
            cache.keys, cache.values = arrays[2 * index : 2 * index + 2]

    def arrays(self) -> list[mx.array]:
        """Keys and values in a payload's order. Drop the list before the next write."""
        return [array for cache in self.layers for array in (cache.keys, cache.values)]
