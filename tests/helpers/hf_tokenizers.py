"""Real tokenizers: the embedded model's, and a small one in the manner of Llama 2."""

from pathlib import Path
from typing import Any

# First: it prepares the BLAS before MLX is imported.
from keepwarm.mlx_backend.loading.embedded_model import embedded_source
from keepwarm.mlx_backend.loading.gguf import GGUFFacts, build_tokenizer, tokenizer_config

# isort: split
import mlx.core as mx
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from keepwarm.mlx_backend.loading.files import write_json

LLAMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    "{% if message.role == 'user' %}[INST] {{ message.content | trim }} [/INST]"
    "{% else %} {{ message.content | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)


def smollm2_tokenizer(folder: Path) -> Any:
    """Read the embedded model's tokenizer from its GGUF, without the weights."""
    path = embedded_source().path
    metadata: Any
    _, metadata = mx.load(str(path), return_metadata=True)
    facts = GGUFFacts(path, metadata)
    build_tokenizer(facts).save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", tokenizer_config(facts))
    return AutoTokenizer.from_pretrained(str(folder))


def sentencepiece_tokenizer(style: str) -> PreTrainedTokenizerFast:
    """Build a tokenizer of words with a leading `▁`; `style` is "legacy", "first" or "always"."""
    specials = ["<unk>", "<s>", "</s>", "<|pad|>"]
    words = ["▁", "▁Hello", "Hello", "▁world", "▁[", "[", "]", "▁I", "INST", "/", "."]
    letters = [chr(code) for code in range(ord("A"), ord("z") + 1)]
    vocab = [
        *specials,
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *dict.fromkeys(words + letters),
    ]
    tokenizer = Tokenizer(
        models.Unigram(
            [(token, -100.0 if len(token) == 1 else -1.0) for token in vocab],
            unk_id=0,
            byte_fallback=True,
        )
    )
    _add_space_prefix(tokenizer, style)
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in specials[:3]])
    tokenizer.add_special_tokens([AddedToken("<|pad|>", normalized=False, rstrip=True)])
    roles = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<|pad|>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=LLAMA_TEMPLATE, **roles
    )


def _add_space_prefix(tokenizer: Tokenizer, style: str) -> None:
    strip = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*strip, decoders.Strip(" ", 1, 0)])
    if style == "legacy":
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=style)
