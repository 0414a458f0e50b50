"""The engine's `Tokenizer` over a Hugging Face fast tokenizer."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer as FastTokenizer

from keepwarm.core.errors import InvalidRequest, check_unicode
from keepwarm.core.ports import Detokenizer, Message, Piece
from keepwarm.mlx_backend.text.detokenizer import ByteLevelDetokenizer, WindowDetokenizer
from keepwarm.mlx_backend.text.special_tokens import Shield, SpecialTokens
from keepwarm.mlx_backend.text.template import ChatTemplate, unwrapped
from keepwarm.mlx_backend.text.token_bytes import TokenBytes, parts


class HFTokenizer:
    """Text, ids and the chat template of one model.

    `tokenizer` is transformers' fast tokenizer or mlx-lm's wrapper around it. A private copy of it
    encodes and decodes, because `encode_special_tokens` is a flag on the shared one. Tools will go
    to `render`, and from there to the template.
    """

    def __init__(self, tokenizer: Any, eos_token_ids: Iterable[int]) -> None:
        self._template = ChatTemplate(tokenizer)
        hf_tokenizer = unwrapped(tokenizer)
        spec = json.loads(hf_tokenizer.backend_tokenizer.to_str())
        self._starts_with_space = _stop_prepending_at_start(spec["pre_tokenizer"])
        self._is_byte_level = "ByteLevel" in _kinds(spec["decoder"])
        self._fast = _ordinary_text_encoder(spec)
        self._token_bytes = TokenBytes.of(spec)
        self._eos_token_ids = frozenset(eos_token_ids)
        self._specials = SpecialTokens.of(self._fast)
        self._bos_ids = _ids_added_in_front(self._fast)

    def __repr__(self) -> str:
        return f"HFTokenizer({self.vocab_size} tokens, {len(self._specials.by_text)} special)"

    @property
    def vocab_size(self) -> int:
        return int(self._fast.get_vocab_size(with_added_tokens=True))

    @property
    def eos_token_ids(self) -> frozenset[int]:
        return self._eos_token_ids

    @cached_property
    def fingerprint(self) -> str:
        vocabulary = sorted(self._fast.get_vocab(with_added_tokens=True).items())
        return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True
    ) -> tuple[Piece, ...]:
        shield = Shield(self._specials)
        rendered = self._template.render(
            [shield.cover(message) for message in messages],
            add_generation_prompt=add_generation_prompt,
        )
        pieces = [shield.uncover(piece) for piece in self._specials.cut(rendered)]
        return self._with_space_at_start(pieces)

    def split(self, text: str) -> tuple[Piece, ...]:
        pieces = self._with_space_at_start(list(self._specials.cut(text)))
        bos = tuple(self._special_piece(token_id) for token_id in self._bos_ids)
        brings_bos = bool(bos) and bool(pieces) and pieces[0].special_id == bos[0].special_id
        return pieces if brings_bos else bos + pieces

    def encode(self, text: str) -> list[int]:
        check_unicode(text)
        try:
            return list(self._fast.encode(text, add_special_tokens=False).ids)
        except BaseException as error:  # a panic in Rust (tokenizers 0.23.3) is no Exception
            if not _is_panic(error):
                raise
            raise InvalidRequest("prompt", f"the tokenizer fails on it: {error}") from error

    def least_tokens(self, text: str) -> int:
        return 0 if self._token_bytes is None else self._token_bytes.least_tokens(text)

    def detokenizer(self) -> Detokenizer:
        if self._is_byte_level:
            return ByteLevelDetokenizer(self._fast, self._specials.ids)
        return WindowDetokenizer(self._fast, self._specials.ids)

    def _with_space_at_start(self, pieces: list[Piece]) -> tuple[Piece, ...]:
        """Sentencepiece puts a space before a text's first word, and before no other."""
        if self._starts_with_space and pieces and pieces[0].special_id is None:
            text = pieces[0].text
            if text and not text.startswith((" ", "\u2581")):
                pieces = [Piece(f" {text}"), *pieces[1:]]
        return tuple(pieces)

    def _special_piece(self, token_id: int) -> Piece:
        return Piece(str(self._fast.id_to_token(token_id)), token_id)


def _is_panic(error: BaseException) -> bool:
    return type(error).__name__ == "PanicException"


def _ordinary_text_encoder(spec: dict[str, Any]) -> FastTokenizer:
    fast = FastTokenizer.from_str(json.dumps(spec))
    fast.no_padding()
    fast.no_truncation()
    fast.encode_special_tokens = True
    return fast


def _stop_prepending_at_start(pre_tokenizer: dict[str, Any] | None) -> bool:
    """Make Metaspace put no space before a text's first word; return whether it did.

    With the scheme "first" it puts one before a text at position 0 only. Spans are encoded one by
    one, so each would be at position 0; `_with_space_at_start` gives the first its space instead.
    """
    changed = False
    for part in parts(pre_tokenizer):
        if part["type"] == "Metaspace" and part.get("prepend_scheme") == "first":
            part["prepend_scheme"] = "never"
            changed = True
    return changed


def _kinds(component: dict[str, Any] | None) -> set[str]:
    return {part["type"] for part in parts(component)}


def _ids_added_in_front(fast: FastTokenizer) -> tuple[int, ...]:
    bare = fast.encode("a", add_special_tokens=False).ids
    full = fast.encode("a", add_special_tokens=True).ids
    return tuple(full[: full.index(bare[0])])
