"""The shape of one token's KV, and so the size in bytes of a block."""

from dataclasses import dataclass

BLOCK_TOKENS = 256

_ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class LayerLayout:
    """One attention layer's cache: keys are (1, num_kv_heads, tokens, key_dim), values alike."""

    num_kv_heads: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """All layers of a model's KV cache, of one floating-point type."""

    layers: tuple[LayerLayout, ...]
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in _ITEM_BYTES:
            raise ValueError(f"dtype {self.dtype!r} is not one of {sorted(_ITEM_BYTES)}")

    @property
    def token_bytes(self) -> int:
        item_bytes = _ITEM_BYTES[self.dtype]
        return sum(
            layer.num_kv_heads * (layer.key_dim + layer.value_dim) * item_bytes
            for layer in self.layers
        )

    @property
    def block_bytes(self) -> int:
        return self.token_bytes * BLOCK_TOKENS

    def slab_bytes(self, capacity_tokens: int) -> int:
        return self.token_bytes * capacity_tokens


def whole_blocks(num_tokens: int) -> int:
    """How many blocks are filled completely."""
    return num_tokens // BLOCK_TOKENS


def capacity_for(num_tokens: int) -> int:
    """The slab capacity in tokens, a multiple of the block, that holds `num_tokens`."""
    return -(-num_tokens // BLOCK_TOKENS) * BLOCK_TOKENS
