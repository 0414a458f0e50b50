"""The two-row probe accepts models whose attention goes through the seam, and no others."""

import sys
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import pytest

from keepwarm.core.errors import UnsupportedModel
from keepwarm.core.ports import LoadedModel
from keepwarm.mlx_backend.compute import attention_hook
from keepwarm.mlx_backend.compute.seam_probe import check_seam


@pytest.fixture
def attention_module(smollm2_on_mlx: LoadedModel) -> Iterator[Any]:
    module: Any = sys.modules[type(smollm2_on_mlx.bare()).__module__]
    kept = module.scaled_dot_product_attention
    yield module
    module.scaled_dot_product_attention = kept


def test_smollm2_fits(smollm2_on_mlx: LoadedModel) -> None:
    check_seam(smollm2_on_mlx.bare(), smollm2_on_mlx.layout, "smollm2")


def test_attention_that_passes_the_seam_by_is_found(
    smollm2_on_mlx: LoadedModel, attention_module: Any
) -> None:
    original = getattr(attention_module.scaled_dot_product_attention, attention_hook._MARK)

    def past_the_seam(q: mx.array, k: mx.array, v: mx.array, cache: object, **more: object) -> Any:
        return original(q, k, v, cache=None, **more)

    setattr(past_the_seam, attention_hook._MARK, original)
    attention_module.scaled_dot_product_attention = past_the_seam
    with pytest.raises(UnsupportedModel, match="two rows in a batch differ"):
        check_seam(smollm2_on_mlx.bare(), smollm2_on_mlx.layout, "smollm2")
