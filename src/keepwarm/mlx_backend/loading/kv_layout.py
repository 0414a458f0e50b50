"""The layout of a model's KV, found out by feeding it one token."""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx_lm.models.cache import KVCache, make_prompt_cache

from keepwarm.core.errors import ModelLoadError, UnsupportedModel
from keepwarm.core.layout import CacheLayout, LayerLayout
from keepwarm.mlx_backend.compute.slab import MX_DTYPES
from keepwarm.mlx_backend.loading.model_folder import ModelFolder, first_line
from keepwarm.mlx_backend.loading.weights import dtype_name


@dataclass(frozen=True, slots=True)
class FirstToken:
    """What one token through the model shows."""

    layout: CacheLayout
    vocab_size: int
    """How many logits the model gives; the tokenizer may know fewer tokens."""


def feed_one_token(folder: ModelFolder, model: nn.Module) -> FirstToken:
    """Feed token 0. Raises UnsupportedModel unless every layer keeps a plain KVCache of its own.

    Other kinds of layers (sliding window, recurrent state) will be told apart here.
    """
    cache = make_prompt_cache(model)
    _require_plain_kv(folder, cache)
    try:
        logits = model(mx.array([[0]]), cache=cache)
        mx.eval(logits)
    except (ValueError, RuntimeError, TypeError) as error:
        raise ModelLoadError(
            str(folder.path / "config.json"),
            f"the model fails on its first token ({first_line(error)})",
            "Check that config.json belongs to these weights",
        ) from error
    return FirstToken(_layout(folder, cache), int(logits.shape[-1]))


def _require_plain_kv(folder: ModelFolder, cache: list[Any]) -> None:
    kinds = sorted({type(layer).__name__ for layer in cache if type(layer) is not KVCache})
    if kinds:
        raise UnsupportedModel(
            str(folder.path / "config.json"),
            f"its layers keep {', '.join(kinds)}, and only full attention (KVCache) is supported",
            "Use a model with full attention in every layer",
        )


def _layout(folder: ModelFolder, cache: list[KVCache]) -> CacheLayout:
    filled = [
        (layer.keys, layer.values)
        for layer in cache
        if layer.keys is not None and layer.values is not None
    ]
    if len(filled) < len(cache):
        raise UnsupportedModel(
            str(folder.path / "config.json"),
            "some of its layers keep no KV of their own",
            "Use a model whose layers do not share KV",
        )
    dtypes = sorted({dtype_name(array) for pair in filled for array in pair})
    if len(dtypes) > 1 or dtypes[0] not in MX_DTYPES:
        raise UnsupportedModel(
            str(folder.path / "config.json"),
            f"its KV has the dtypes {', '.join(dtypes)}, and one of {sorted(MX_DTYPES)} is "
            "supported",
            "Load it with dtype='float32'",
        )
    return CacheLayout(layers=tuple(_layer(*pair) for pair in filled), dtype=dtypes[0])


def _layer(keys: mx.array, values: mx.array) -> LayerLayout:
    return LayerLayout(num_kv_heads=keys.shape[1], key_dim=keys.shape[3], value_dim=values.shape[3])
