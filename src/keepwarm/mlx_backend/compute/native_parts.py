"""The parts of an mlx-lm model that the native step knows: recognised by modules, not by names."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
from mlx import nn
from mlx_lm.models.cache import KVCache, make_prompt_cache
from mlx_lm.models.rope_utils import Llama3RoPE, YarnRoPE

from keepwarm.native.library import Library, NativeError
from keepwarm.native.structures import Kind, Scale

HEAD_NORMS = ("q_norm", "k_norm")
_ATTENTION_WEIGHTS = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP_WEIGHTS = ("gate_proj", "up_proj", "down_proj")
_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ROPES = (nn.RoPE, Llama3RoPE, YarnRoPE)
_PLAIN = {mx.float32: Kind.FLOAT32, mx.float16: Kind.FLOAT16, mx.bfloat16: Kind.BFLOAT16}
_SCALES = {mx.float16: Scale.FLOAT16, mx.bfloat16: Scale.BFLOAT16}
_BITS = {4: Kind.AFFINE4, 8: Kind.AFFINE8}


class NotNative(Exception):
    """The native step does not know this model; the text says what of it."""


@dataclass(frozen=True, slots=True)
class PackedShape:
    """How a weight of (num_outputs, num_inputs) is packed."""

    kind: Kind
    num_outputs: int
    num_inputs: int
    group: int = 32
    scale: Scale = Scale.FLOAT16

    def nbytes(self, library: Library) -> int:
        """Return the size of the packed weight. Raises NotNative."""
        try:
            return library.packed_bytes(self.kind, self.group, self.num_outputs, self.num_inputs)
        except NativeError as error:
            shape = f"{self.num_outputs} x {self.num_inputs} in groups of {self.group}"
            raise NotNative(f"a weight is {shape}: {error}") from error


@dataclass(frozen=True, slots=True)
class NativeParts:
    """A model's modules: its layers, and what stands before and behind them.

    `head` is None where the embedding is the head as well.
    """

    layers: Sequence[Any]
    embedding: Any
    final_norm: Any
    head: Any | None

    @property
    def head_dim(self) -> int:
        attention = self.layers[0].self_attn
        return int(attention.q_proj.weight.shape[0] // attention.n_heads)

    def weights(self) -> Iterator[Any]:
        """Yield every module with a matrix."""
        for layer in self.layers:
            yield from (layer.self_attn[name] for name in _ATTENTION_WEIGHTS)
            yield from (layer.mlp[name] for name in _MLP_WEIGHTS)
        yield from (module for module in (self.embedding, self.head) if module is not None)

    def vectors(self) -> Iterator[mx.array]:
        """Yield what is kept in float32: the weights of norms, and biases."""
        for layer in self.layers:
            yield from (norm.weight for norm in _norms_of(layer))
        yield self.final_norm.weight
        yield from (module.bias for module in self.weights() if "bias" in module)

    def nbytes(self, library: Library, num_positions: int) -> int:
        """Return the bytes of the packed model, from shapes alone. Raises NotNative."""
        matrices = sum(packed_shape(module).nbytes(library) for module in self.weights())
        return matrices + 4 * (sum(v.size for v in self.vectors()) + num_positions * self.head_dim)


def native_parts(model: nn.Module) -> NativeParts:
    """Find the parts of a model of Llama's shape, whose weights need not be read yet.

    The shape is that of its modules: attention with rotary positions over halves of a head,
    perhaps biases and norms of queries and keys, a gated MLP, RMS norms before both. What modules
    do not show, like an activation, is for a probe of the logits to find. Raises NotNative.
    """
    inner = _child(model, "model")
    for name in ("layers", "embed_tokens", "norm"):
        _child(inner, name)
    _require_plain_caches(model)
    layers = [_known_layer(layer) for layer in cast("Sequence[Any]", inner.layers)]
    _require_rms(inner.norm)
    _require_one_kind(layers, inner.norm)
    parts = NativeParts(layers, inner.embed_tokens, inner.norm, model.get("lm_head"))
    for module in parts.weights():
        packed_shape(module)
    _require_one_rope([layer.self_attn.rope for layer in layers], parts.head_dim)
    return parts


def packed_shape(module: Any) -> PackedShape:
    """Say how the weight of a linear layer or of an embedding is packed. Raises NotNative."""
    if isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding):
        return _affine_shape(module)
    if not isinstance(module, nn.Linear | nn.Embedding):
        raise NotNative(f"a weight is a {type(module).__name__}")
    kind = _PLAIN.get(module.weight.dtype)
    if kind is None:
        raise NotNative(f"a weight is of {module.weight.dtype}")
    num_outputs, num_inputs = module.weight.shape
    return PackedShape(kind, num_outputs, num_inputs)


def _affine_shape(module: Any) -> PackedShape:
    kind, scale = _BITS.get(module.bits), _SCALES.get(module.scales.dtype)
    if kind is None or scale is None or getattr(module, "mode", "affine") != "affine":
        raise NotNative(f"a weight has {module.bits} bits and scales of {module.scales.dtype}")
    num_outputs, num_words = module.weight.shape
    return PackedShape(
        kind, num_outputs, num_words * 32 // module.bits, int(module.group_size), scale
    )


def _require_plain_caches(model: nn.Module) -> None:
    kinds = {type(layer).__name__ for layer in make_prompt_cache(model)} - {KVCache.__name__}
    if kinds:
        raise NotNative(f"its layers keep {', '.join(sorted(kinds))}")


def _known_layer(layer: Any) -> Any:
    _require_children(layer, _LAYER)
    attention = layer.self_attn
    _require_children(attention, {*_ATTENTION_WEIGHTS, "rope"}, optional=HEAD_NORMS)
    _require_children(layer.mlp, set(_MLP_WEIGHTS))
    for name in ("n_heads", "n_kv_heads", "scale"):
        if not hasattr(attention, name):
            raise NotNative(f"its attention has no {name}")
    for norm in _norms_of(layer):
        _require_rms(norm)
    _require_rope(attention.rope)
    return layer


def _norms_of(layer: Any) -> list[Any]:
    attention = layer.self_attn
    own = [layer.input_layernorm, layer.post_attention_layernorm]
    return own + [attention[name] for name in HEAD_NORMS if name in attention]


def _require_rms(norm: Any) -> None:
    if type(norm) is not nn.RMSNorm:
        raise NotNative(f"it has a norm that is a {type(norm).__name__}")


def _require_one_kind(layers: Sequence[Any], final_norm: Any) -> None:
    """Require what the step knows once for the whole model to be equal in all layers."""
    epsilons = {norm.eps for layer in layers for norm in _norms_of(layer)} | {final_norm.eps}
    attentions = [layer.self_attn for layer in layers]
    heads = {(each.n_heads, each.n_kv_heads, each.scale) for each in attentions}
    if len(epsilons) > 1 or len(heads) > 1:
        raise NotNative("its layers differ in their heads, or in their norms' epsilon")


def _require_one_rope(ropes: Sequence[Any], head_dim: int) -> None:
    """Require equal positions in all layers: there is one table, and some models leave them out."""
    if any(rope.dims != head_dim for rope in ropes):
        raise NotNative(f"positions turn {ropes[0].dims} of a head's {head_dim} numbers")
    probe = mx.random.normal((1, 1, 2, head_dim), key=mx.random.key(0))
    expected = ropes[0](probe, offset=1000)
    if not all(bool(mx.array_equal(rope(probe, offset=1000), expected)) for rope in ropes[1:]):
        raise NotNative("its layers know positions in different ways")


def _require_children(module: Any, names: set[str], *, optional: Collection[str] = ()) -> None:
    children = set(module.children())
    if not names <= children or children - names - set(optional):
        raise NotNative(f"its {type(module).__name__} has the parts {', '.join(sorted(children))}")


def _require_rope(rope: Any) -> None:
    if not isinstance(rope, _ROPES) or rope.traditional:
        raise NotNative(f"its positions are by {type(rope).__name__}")


def _child(module: Any, name: str) -> Any:
    if name not in module:
        raise NotNative(f"its {type(module).__name__} has no part {name!r}")
    return module[name]
