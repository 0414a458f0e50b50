"""Sizes in tokens and bytes."""

import pytest

from keepwarm.core.layout import CacheLayout, LayerLayout, capacity_for, whole_blocks

LAYER = LayerLayout(num_kv_heads=3, key_dim=64, value_dim=32)


@pytest.mark.parametrize(("dtype", "item_bytes"), [("float32", 4), ("float16", 2), ("bfloat16", 2)])
def test_a_token_is_all_heads_of_all_layers(dtype: str, item_bytes: int) -> None:
    layout = CacheLayout(layers=(LAYER, LAYER), dtype=dtype)
    assert layout.token_bytes == 2 * 3 * (64 + 32) * item_bytes
    assert layout.block_bytes == 256 * layout.token_bytes
    assert layout.slab_bytes(512) == 512 * layout.token_bytes


def test_layers_may_differ() -> None:
    small = LayerLayout(num_kv_heads=1, key_dim=2, value_dim=2)
    assert CacheLayout(layers=(LAYER, small), dtype="float16").token_bytes == 2 * (3 * 96 + 4)


def test_an_unknown_type_is_refused() -> None:
    with pytest.raises(ValueError, match="int8"):
        CacheLayout(layers=(LAYER,), dtype="int8")


@pytest.mark.parametrize(
    ("num_tokens", "whole", "capacity"),
    [(0, 0, 0), (1, 0, 256), (255, 0, 256), (256, 1, 256), (257, 1, 512), (512, 2, 512)],
)
def test_blocks_are_rounded_down_and_capacities_up(
    num_tokens: int, whole: int, capacity: int
) -> None:
    assert whole_blocks(num_tokens) == whole
    assert capacity_for(num_tokens) == capacity
