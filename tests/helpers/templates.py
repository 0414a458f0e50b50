"""Chat templates for tests, in the manner of several families, on a tokenizer of bytes."""

from pathlib import Path
from typing import Any

# First: it prepares the BLAS before MLX is imported.
from keepwarm.mlx_backend.text.tokenizer import HFTokenizer

# isort: split
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from engines import FakeFactory, fake_loaded
from keepwarm.core.ports import LoadedModel

END = "<|im_end|>"
SPECIALS = ("<|im_start|>", END, "<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]")
MISTRALS = ("[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")
GLMS = ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")

FAMILIES = {
    path.stem: path.read_text("utf-8")
    for path in sorted((Path(__file__).parent / "chat_templates").glob("*.jinja"))
}
"""
`plain` is ChatML; `strict` takes only a user and an assistant in turns, who say something.
`mistral` wants ids of nine characters, arguments as objects, and no user behind a result;
`old_mistral` has the system's message in the user's last one. `glm` and `qwen_coder` iterate over
arguments. `llama_with_tools` takes one call at a time, prints its arguments by `tojson`, and drops
the text beside it. `text_arguments` puts arguments together with texts. `harmony` is gpt-oss's:
only a conversation's first message can be a developer's, later ones are left out.
"""


def byte_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """Build a tokenizer with a token for each byte, and the special tokens of all families."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: n for n, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = [AddedToken(text, normalized=False) for text in (*SPECIALS, *MISTRALS, *GLMS)]
    tokenizer.add_special_tokens(specials)
    roles = {"bos_token": "<s>", "eos_token": END}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **roles)


def templated(tokenizer: Any, *, reply: str = "Well.") -> LoadedModel:
    """Build a model on the fake generator, with this tokenizer, whose every reply is `reply`."""
    end = tokenizer.convert_tokens_to_ids(tokenizer.eos_token)
    hf_tokenizer = HFTokenizer(tokenizer, [end])
    script = [*hf_tokenizer.encode(reply), end]
    factory = FakeFactory(script=script, vocab_size=hf_tokenizer.vocab_size)
    return fake_loaded(factory=factory, tokenizer=hf_tokenizer)
