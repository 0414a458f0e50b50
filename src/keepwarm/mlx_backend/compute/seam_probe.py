"""Probes whether a model's batched rows attend to their own slabs, with two rows of two lengths."""

from collections.abc import Sequence
from typing import cast

import mlx.core as mx
from mlx import nn

from keepwarm.core.errors import UnsupportedModel
from keepwarm.core.layout import BLOCK_TOKENS, CacheLayout
from keepwarm.core.ports import GREEDY, Draw, RowId, RowInput
from keepwarm.mlx_backend.compute.row_batch import RowBatchGenerator
from keepwarm.mlx_backend.compute.sampling import sample

_PROMPTS = ((1, 2, 3, 4, 5), (6, 7, 8))
RELATIVE_TOLERANCE = {"float32": 1e-3, "float16": 5e-2, "bfloat16": 2e-1}
"""How much batched and single rows may differ, in parts of the logits' spread. Rows that see each
other's KV, or none, differ by about the spread."""


def check_seam(model: nn.Module, layout: CacheLayout, path: str) -> None:
    """Raise UnsupportedModel when rows in one batch do not compute what each computes alone."""
    try:
        together = _logits(model, layout, _PROMPTS)
    # A model raises these that indexes, slices or formats its cache's offset, an array here.
    except (TypeError, ValueError, AttributeError, IndexError) as error:
        raise _misfit(path, f"a batch of two rows raises {error!r}") from error
    alone = mx.concatenate([_logits(model, layout, [prompt]) for prompt in _PROMPTS])
    difference = _number(mx.abs(together - alone).max())
    spread = _number(alone.max() - alone.min())
    if not difference <= RELATIVE_TOLERANCE[layout.dtype] * spread:
        raise _misfit(path, f"two rows in a batch differ from each alone by {difference:.3g}")


def _misfit(path: str, what: str) -> UnsupportedModel:
    return UnsupportedModel(
        path,
        "its attention does not go through mlx-lm's scaled_dot_product_attention with the layer's "
        f"cache ({what})",
        "Keepwarm cannot batch it yet: use a Llama or Qwen model",
    )


def _number(array: mx.array) -> float:
    return cast("float", array.item())


def _logits(model: nn.Module, layout: CacheLayout, prompts: Sequence[Sequence[int]]) -> mx.array:
    """Return the logits (rows, vocabulary) after each prompt's last token, decoded as one batch."""
    seen: list[mx.array] = []

    def keep(logits: mx.array, draws: Sequence[Draw]) -> mx.array:
        seen.append(logits.astype(mx.float32))
        return sample(logits, draws)

    generator = RowBatchGenerator(model, layout, sampler=keep)
    for row, prompt in enumerate(prompts):
        generator.open_row(RowId(row), generator.new_slab(BLOCK_TOKENS))
        generator.step([RowInput(RowId(row), prompt[:-1])])
    last = [RowInput(RowId(r), p[-1:], (Draw(GREEDY, 0),)) for r, p in enumerate(prompts)]
    generator.step(last)
    return seen[0]
