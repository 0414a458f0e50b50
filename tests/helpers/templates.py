"""Chat templates for tests, in the manner of several families, on a tokenizer of bytes."""

from typing import Any

# First: it prepares the BLAS before MLX is imported.
from keepwarm.mlx_backend.tokenizer import HFTokenizer

# isort: split
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from engines import FakeFactory, fake_loaded
from keepwarm.core.ports import LoadedModel

END = "<|im_end|>"
SPECIALS = ("<|im_start|>", END, "<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]")
TOOL_RESULTS = ("[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")

PLAIN = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """Every byte a token, and the special tokens of all families."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: n for n, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = [AddedToken(text, normalized=False) for text in (*SPECIALS, *TOOL_RESULTS)]
    tokenizer.add_special_tokens(specials)
    roles = {"bos_token": "<s>", "eos_token": END}
    roles = {"bos_token": "<s>", "eos_token": END}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **roles)


def templated(tokenizer: Any, *, reply: str = "Well.", name_of_end: str = END) -> LoadedModel:
    """A model on the fake generator, with this template, that always says the same."""
    end = tokenizer.convert_tokens_to_ids(name_of_end)
    hf_tokenizer = HFTokenizer(tokenizer, [end])
    script = [*hf_tokenizer.encode(reply), end]
    factory = FakeFactory(script=script, vocab_size=hf_tokenizer.vocab_size)
    return fake_loaded(factory=factory, tokenizer=hf_tokenizer)
