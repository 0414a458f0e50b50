"""Long contexts for the speed benchmarks, on both sides.

A context of thousands of tokens is prefilled once by the engine. Other agents get it, or its
beginning, by content; mlx-lm gets the same KV as caches of its own classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
from mlx import nn
from mlx_lm.models.cache import KVCache, make_prompt_cache

from keepwarm.bench.lab import Lab, Turn
from keepwarm.bench.recording import raw_kv
from keepwarm.core.layout import CacheLayout
from keepwarm.mlx_backend.compute.payload import RawArray

_DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


@dataclass(frozen=True, slots=True, eq=False)
class Context:
    """A prompt and the KV of all of it, once it was computed."""

    prompt: tuple[int, ...]
    kv: tuple[RawArray, ...]
    layout: CacheLayout

    def bare_cache(self, model: nn.Module, num_tokens: int) -> list[KVCache]:
        """Return mlx-lm's own cache of the first tokens, with room for more, as after its own
        prefill.
        """
        caches = cast("list[KVCache]", make_prompt_cache(model))
        for index, layer in enumerate(caches):
            keys, values = self.kv[2 * index : 2 * index + 2]
            _fill(layer, self._array(keys, num_tokens), self._array(values, num_tokens))
        mx.eval([layer.state for layer in caches])
        return caches

    def _array(self, raw: RawArray, num_tokens: int) -> mx.array:
        bits = mx.array(raw[None, :, :num_tokens])
        return bits.view(_DTYPES[self.layout.dtype])


def _fill(layer: KVCache, keys: mx.array, values: mx.array) -> None:
    """Write KV into the cache through its own method, so that it allocates as in mlx-lm."""
    cast("Any", layer).update_and_fetch(keys, values)


def prefilled(lab: Lab, agent_id: str, prompt: Sequence[int]) -> tuple[Turn, Context]:
    """Prefill a new agent with the prompt. Returns its turn of one token, and the context."""
    turn = lab.start(agent_id, prompt, 1)
    lab.finish(turn)
    generator = lab.engine.tiers.model.generator
    slab = lab.recorder.slabs[turn.seed]
    kv = raw_kv(generator.extract(slab, 0, len(prompt)))
    return turn, Context(tuple(prompt), kv, lab.loaded.layout)
