"""Bare mlx-lm: its own cache, its own prefill and its own steps, recorded."""

from collections.abc import Collection, Sequence
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx_lm.models.cache import KVCache, make_prompt_cache

from keepwarm.bench.recording import Logits, Recording, choose_token
from keepwarm.mlx_backend.compute.payload import RawArray
from keepwarm.mlx_backend.compute.slab import MX_DTYPES

PREFILL_TOKENS = 2048
"""The size of a chunk that mlx-lm itself takes."""

_RAW = {mx.float32: mx.uint32, mx.float16: mx.uint16, mx.bfloat16: mx.uint16}


class RoundingCache(KVCache):
    """mlx-lm's cache with its KV rounded to another type: attention sees what is kept."""

    def __init__(self, dtype: mx.Dtype) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._dtype = dtype

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        kept_keys, kept_values = super().update_and_fetch(  # type: ignore[no-untyped-call]
            keys.astype(self._dtype), values.astype(self._dtype)
        )
        return kept_keys.astype(keys.dtype), kept_values.astype(values.dtype)


def run_reference(
    model: nn.Module,
    prompt: Sequence[int],
    num_tokens: int,
    *,
    kv_dtype: str | None = None,
    forbidden: Collection[int] = (),
    script: Sequence[int] | None = None,
    prefill_tokens: int = PREFILL_TOKENS,
) -> Recording:
    """Run what `mlx_lm.generate_step` does: all but the last id in chunks, then one id at a time.

    The attention is mlx-lm's own: the hook lets mlx-lm's caches pass. KV is of the type that the
    model computes in, or rounded to `kv_dtype`.
    """
    cache = cast("list[KVCache]", make_prompt_cache(model))
    if kv_dtype is not None:
        cache = [RoundingCache(MX_DTYPES[kv_dtype]) for _ in cache]
    for start in range(0, len(prompt) - 1, prefill_tokens):
        chunk = prompt[start : min(start + prefill_tokens, len(prompt) - 1)]
        _run(model, chunk, cache)
        mx.eval([layer.state for layer in cache])
    token, tokens, logits = prompt[-1], [], []
    for step in range(num_tokens):
        row = _last_logits(_run(model, [token], cache))
        token = choose_token(row, forbidden) if script is None else script[step]
        tokens.append(token)
        logits.append(row)
    return Recording(len(prompt), tuple(tokens), np.stack(logits), _raw_kv(cache))


def _run(model: nn.Module, ids: Sequence[int], cache: list[KVCache]) -> mx.array:
    return cast("mx.array", model(mx.array([list(ids)]), cache=cache))


def _last_logits(logits: mx.array) -> Logits:
    return np.array(logits[0, -1].astype(mx.float32))


def _raw_kv(cache: list[KVCache]) -> tuple[RawArray, ...]:
    return tuple(
        _raw(array, layer.offset)
        for layer in cast("Any", cache)
        for array in (layer.keys, layer.values)
    )


def _raw(array: mx.array, num_tokens: int) -> RawArray:
    return np.array(mx.contiguous(array[0, :, :num_tokens]).view(_RAW[array.dtype]))
