"""The shape of one token's KV, and so the size of a block in bytes."""

from dataclasses import dataclass

BLOCK_TOKENS = 256
"""How many tokens a block has: the unit of sharing, eviction, storage and budget."""

_SAFETENSORS_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class LayerLayout:
    """One attention layer's cache: keys (1, num_kv_heads, tokens, key_dim), values alike."""

    num_kv_heads: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a stored run of tokens, in safetensors' words."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


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

    def tensors(self, num_tokens: int) -> tuple[TensorSpec, ...]:
        """Return the tensors of a payload of `num_tokens`, in the order of its bytes."""
        return tuple(
            TensorSpec(
                name=f"layers.{index}.{part}",
                dtype=_SAFETENSORS_DTYPES[self.dtype],
                shape=(layer.num_kv_heads, num_tokens, dim),
                nbytes=layer.num_kv_heads * num_tokens * dim * _ITEM_BYTES[self.dtype],
            )
            for index, layer in enumerate(self.layers)
            for part, dim in (("keys", layer.key_dim), ("values", layer.value_dim))
        )


def whole_blocks(num_tokens: int) -> int:
    """Return how many blocks the first `num_tokens` fill completely."""
    return num_tokens // BLOCK_TOKENS


def capacity_for(num_tokens: int) -> int:
    """Return the smallest slab capacity, in tokens, that holds `num_tokens`: whole blocks."""
    return -(-num_tokens // BLOCK_TOKENS) * BLOCK_TOKENS
