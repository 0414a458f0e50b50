"""Converts a llama GGUF to a folder that mlx-lm loads: config, weights and tokenizer."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from keepwarm.core.errors import ModelLoadError
from keepwarm.mlx_backend.loading.files import write_json

CONVERTER_VERSION = 1
"""A part of the converted folder's name: raise it when the converter writes other bytes."""

FILE_NAMES = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
_USE_A_FOLDER = "Use a folder in mlx-lm's format of this model instead"

_CONTROL_TOKEN = 3
_USER_DEFINED_TOKEN = 4

_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}

Weights = dict[str, mx.array]


def convert(gguf_path: Path, folder: Path) -> None:
    """Write a llama GGUF's config, weights and tokenizer into the folder. Raises ModelLoadError."""
    # MLX's type for this call (0.32.4) is a union over every kind of file.
    tensors, info = cast(
        "tuple[Weights, dict[str, Any]]", mx.load(str(gguf_path), return_metadata=True)
    )
    facts = GGUFFacts(gguf_path, info)
    write_json(folder / "config.json", model_config(facts))
    mx.save_safetensors(
        str(folder / "model.safetensors"), mlx_weights(tensors, facts), {"format": "mlx"}
    )
    build_tokenizer(facts).save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", tokenizer_config(facts))


@dataclass(frozen=True, slots=True)
class GGUFFacts:
    """A GGUF's metadata, read by key and type. Raises ModelLoadError for a key that is missing."""

    path: Path
    values: Mapping[str, Any]

    def integer(self, key: str) -> int:
        return int(self._scalar(key))

    def number(self, key: str) -> float:
        # float32 in the file: its shortest decimal is the number that was meant (1e-05).
        return float(str(self._scalar(key)))

    def text(self, key: str) -> str:
        return str(self._value(key))

    def texts(self, key: str) -> list[str]:
        return list(self._value(key))

    def integers(self, key: str) -> list[int]:
        return [int(value) for value in self._value(key).tolist()]

    def _scalar(self, key: str) -> Any:
        return np.asarray(self._value(key)).reshape(-1)[0]

    def _value(self, key: str) -> Any:
        try:
            return self.values[key]
        except KeyError:
            raise ModelLoadError(
                str(self.path), f"the GGUF has no {key!r}", "Use a llama GGUF with a BPE tokenizer"
            ) from None


def model_config(facts: GGUFFacts) -> dict[str, Any]:
    """Return the config.json that mlx-lm reads. Raises ModelLoadError unless it is a llama."""
    architecture = facts.text("general.architecture")
    if architecture != "llama":
        raise ModelLoadError(
            str(facts.path),
            f"the GGUF's architecture is {architecture!r}, not 'llama'",
            _USE_A_FOLDER,
        )
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": facts.integer("llama.embedding_length"),
        "intermediate_size": facts.integer("llama.feed_forward_length"),
        "num_hidden_layers": facts.integer("llama.block_count"),
        "num_attention_heads": facts.integer("llama.attention.head_count"),
        "num_key_value_heads": facts.integer("llama.attention.head_count_kv"),
        "max_position_embeddings": facts.integer("llama.context_length"),
        "rms_norm_eps": facts.number("llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": facts.number("llama.rope.freq_base"),
        "vocab_size": len(facts.texts("tokenizer.ggml.tokens")),
        "tie_word_embeddings": True,
        "torch_dtype": "float16",
        "bos_token_id": facts.integer("tokenizer.ggml.bos_token_id"),
        "eos_token_id": facts.integer("tokenizer.ggml.eos_token_id"),
        # The embedding has 8 bits; mlx-lm sees that from the shapes.
        "quantization": {"group_size": 32, "bits": 4},
    }


def mlx_weights(tensors: Mapping[str, mx.array], facts: GGUFFacts) -> Weights:
    """Return the tensors in mlx-lm's names and row order, with float16 norms like the scales."""
    heads = {
        "attn_q": facts.integer("llama.attention.head_count"),
        "attn_k": facts.integer("llama.attention.head_count_kv"),
    }
    return {
        _mlx_name(name, facts): _as_float16(_undo_rope_interleave(tensor, heads.get(_kind(name))))
        for name, tensor in tensors.items()
    }


def _kind(name: str) -> str:
    parts = name.split(".")
    return parts[2] if parts[0] == "blk" else parts[0]


def _as_float16(tensor: mx.array) -> mx.array:
    """Make float32 norms float16; they were bfloat16 once, so nothing is rounded."""
    return tensor.astype(mx.float16) if tensor.dtype == mx.float32 else tensor


def _undo_rope_interleave(tensor: mx.array, num_heads: int | None) -> mx.array:
    """Reorder the rows of q or k: GGUF interleaves the two halves of each head for RoPE."""
    if num_heads is None:
        return tensor
    pairs = tensor.reshape(num_heads, tensor.shape[0] // num_heads // 2, 2, *tensor.shape[1:])
    return mx.contiguous(pairs.swapaxes(1, 2).reshape(tensor.shape))


def _mlx_name(name: str, facts: GGUFFacts) -> str:
    parts = name.split(".")
    try:
        if parts[0] == "blk":
            return f"model.layers.{parts[1]}.{_LAYER_NAMES[parts[2]]}.{parts[3]}"
        return f"{_TOP_NAMES[parts[0]]}.{parts[1]}"
    except (KeyError, IndexError):
        raise ModelLoadError(
            str(facts.path), f"the GGUF's tensor {name!r} is not a llama's", _USE_A_FOLDER
        ) from None


def build_tokenizer(facts: GGUFFacts) -> Tokenizer:
    """Build a byte-level BPE that splits digits one by one, as GGUF's `smollm` pre-tokenizer."""
    pre = facts.text("tokenizer.ggml.pre")
    if pre != "smollm":
        raise ModelLoadError(
            str(facts.path),
            f"the GGUF's pre-tokenizer is {pre!r}, not 'smollm'",
            _USE_A_FOLDER,
        )
    tokens = facts.texts("tokenizer.ggml.tokens")
    merges = [_pair(merge) for merge in facts.texts("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in special_tokens(facts)]
    )
    return tokenizer


def _pair(merge: str) -> tuple[str, str]:
    left, right = merge.split(" ", 1)
    return left, right


def special_tokens(facts: GGUFFacts) -> list[str]:
    """Return the tokens that the GGUF marks as control or user-defined."""
    tokens = facts.texts("tokenizer.ggml.tokens")
    types = facts.integers("tokenizer.ggml.token_type")
    special_types = {_CONTROL_TOKEN, _USER_DEFINED_TOKEN}
    return [token for token, kind in zip(tokens, types, strict=True) if kind in special_types]


def tokenizer_config(facts: GGUFFacts) -> dict[str, Any]:
    """Return the tokenizer_config.json that transformers reads."""
    tokens = facts.texts("tokenizer.ggml.tokens")

    def token(role: str) -> str:
        return tokens[facts.integer(f"tokenizer.ggml.{role}_token_id")]

    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": facts.integer("llama.context_length"),
        "bos_token": token("bos"),
        "eos_token": token("eos"),
        "pad_token": token("padding"),
        "unk_token": token("unknown"),
        "chat_template": facts.text("tokenizer.chat_template"),
    }
