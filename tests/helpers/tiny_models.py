"""Random models of a few kilobytes, written as the folders that mlx-lm loads."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

END_OF_TURN = "<|im_end|>"
START_OF_TURN = "<|im_start|>"
SPECIAL_TOKENS = ("<|endoftext|>", START_OF_TURN, END_OF_TURN)
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_VOCAB_SIZE = 320
_HEAD_DIM = 32


def tiny_config(model_type: str = "llama", **changes: Any) -> dict[str, Any]:
    """Return a config: two layers, four heads of 32 over two KV heads."""
    config = {
        "model_type": model_type,
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": _HEAD_DIM,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "vocab_size": _VOCAB_SIZE,
        "tie_word_embeddings": True,
        "eos_token_id": SPECIAL_TOKENS.index(END_OF_TURN),
    }
    return {**config, **changes}


def write_tiny_model(
    folder: Path,
    model_type: str = "llama",
    *,
    dtype: mx.Dtype = mx.float32,
    quantise_bits: int | None = None,
    seed: int = 0,
    other_ids: bool = False,
    **changes: Any,
) -> Path:
    """Write config, random weights and a byte-level tokenizer; `changes` go into the config.

    With `other_ids` the tokenizer gives its tokens other ids.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = tiny_config(model_type, **changes)
    model_class, args_class = _get_classes(config)
    mx.random.seed(seed)
    model = model_class(args_class.from_dict(config))
    model.set_dtype(dtype)
    if quantise_bits is not None:
        nn.quantize(model, group_size=32, bits=quantise_bits)
        config["quantization"] = {"group_size": 32, "bits": quantise_bits}
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    write_json(folder / "config.json", config)
    write_tiny_tokenizer(folder, other_ids=other_ids)
    return folder


def write_tiny_tokenizer(folder: Path, *, other_ids: bool = False) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=other_ids)
    vocab = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TURN,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    write_json(folder / "tokenizer_config.json", settings)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), "utf-8")


def change_config(folder: Path, **changes: Any) -> None:
    """Change keys of a config; None removes one."""
    config = {**json.loads((folder / "config.json").read_text("utf-8")), **changes}
    kept = {key: value for key, value in config.items() if value is not None}
    write_json(folder / "config.json", kept)
