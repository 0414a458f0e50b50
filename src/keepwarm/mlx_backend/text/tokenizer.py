"""The engine's `Tokenizer` over a Hugging Face fast tokenizer."""

import hashlib
import json
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer

from keepwarm.core.errors import InvalidRequest, check_unicode
from keepwarm.core.ports import Detokenizer, Message, Piece
from keepwarm.mlx_backend.text.detokenizer import ByteLevelDetokenizer, WindowDetokenizer
from keepwarm.mlx_backend.text.template import ChatTemplate, unwrapped
from keepwarm.mlx_backend.text.token_bytes import TokenBytes


class HFTokenizer:
    """Text, ids and the chat template of one model.

    `tokenizer` is transformers' fast tokenizer or mlx-lm's wrapper around it. What encodes and
    decodes is a private copy, because `encode_special_tokens` is a flag on the shared one.
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
        except BaseException as error:  # a panic in Rust is no Exception
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


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """The tokens that structure a prompt, found in text as the tokenizer itself finds them."""

    by_text: Mapping[str, tuple[int, AddedToken]]
    ids: frozenset[int]
    pattern: re.Pattern[str]
    proper_prefixes: frozenset[str]
    longest_prefix: int

    @classmethod
    def of(cls, fast: FastTokenizer) -> "SpecialTokens":
        added = fast.get_added_tokens_decoder()
        by_text = {
            token.content: (token_id, token) for token_id, token in added.items() if token.special
        }
        return cls(
            by_text=by_text,
            ids=frozenset(token_id for token_id, _ in by_text.values()),
            pattern=re.compile(_trie_pattern(by_text) if by_text else r"(?!)"),
            proper_prefixes=frozenset(
                text[:length] for text in by_text for length in range(1, len(text))
            ),
            longest_prefix=max((len(text) - 1 for text in by_text), default=0),
        )

    def cut(self, text: str) -> Iterator[Piece]:
        """Every token with the white space that it absorbs, and what stands between them."""
        position = 0
        for match in self.pattern.finditer(text):
            token_id, token = self.by_text[match.group()]
            start = (
                _start_of_space(text, position, match.start()) if token.lstrip else match.start()
            )
            if start > position:
                yield Piece(text[position:start])
            end = _end_of_space(text, match.end()) if token.rstrip else match.end()
            yield Piece(text[start:end], token_id)
            position = end
        if position < len(text):
            yield Piece(text[position:])

    def ends_inside(self, text: str) -> bool:
        """Whether what follows could complete a special token that begins in `text`."""
        lengths = range(1, self.longest_prefix + 1)
        return any(text[-length:] in self.proper_prefixes for length in lengths)


class Shield:
    """Breaks special-token text in messages before the template sees it, and mends it afterwards.

    The mark is drawn for each rendering, so no message can contain it; it is all digits, so no
    template trims it, escapes it or changes its case.
    """

    def __init__(self, specials: SpecialTokens) -> None:
        self._specials = specials
        self._mark = f"{secrets.randbelow(10**38):038}"

    def cover(self, value: Any) -> Any:
        """The same structure with every string made harmless."""
        if isinstance(value, str):
            return self._cover_text(value)
        if isinstance(value, Mapping):
            return {self.cover(key): self.cover(item) for key, item in value.items()}
        if isinstance(value, Sequence) and not isinstance(value, bytes):
            return [self.cover(item) for item in value]
        return value

    def uncover(self, piece: Piece) -> Piece:
        return Piece(piece.text.replace(self._mark, ""), piece.special_id)

    def _cover_text(self, text: str) -> str:
        covered = self._specials.pattern.sub(self._break, text)
        return covered + self._mark if self._specials.ends_inside(covered) else covered

    def _break(self, match: re.Match[str]) -> str:
        return f"{match.group()[0]}{self._mark}{match.group()[1:]}"


def _is_panic(error: BaseException) -> bool:
    return type(error).__name__ == "PanicException"


def _ordinary_text_encoder(spec: dict[str, Any]) -> FastTokenizer:
    fast = FastTokenizer.from_str(json.dumps(spec))
    fast.no_padding()
    fast.no_truncation()
    fast.encode_special_tokens = True
    return fast


def _stop_prepending_at_start(pre_tokenizer: dict[str, Any] | None) -> bool:
    """Make Metaspace indifferent to where a text stands; true when it was not.

    With "first" it puts a space before a text at position 0 only, but spans are encoded one by
    one, so each would be at position 0.
    """
    changed = False
    for part in _parts(pre_tokenizer):
        if part["type"] == "Metaspace" and part.get("prepend_scheme") == "first":
            part["prepend_scheme"] = "never"
            changed = True
    return changed


def _kinds(component: dict[str, Any] | None) -> set[str]:
    return {part["type"] for part in _parts(component)}


def _parts(component: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """A component of tokenizer.json, and what it is a sequence of."""
    if component is not None:
        yield component
        for part in component.get("pretokenizers", component.get("decoders", ())):
            yield from _parts(part)


def _ids_added_in_front(fast: FastTokenizer) -> tuple[int, ...]:
    bare = fast.encode("a", add_special_tokens=False).ids
    full = fast.encode("a", add_special_tokens=True).ids
    return tuple(full[: full.index(bare[0])])


def _start_of_space(text: str, lowest: int, position: int) -> int:
    return lowest + len(text[lowest:position].rstrip())


def _end_of_space(text: str, position: int) -> int:
    rest = text[position:]
    return position + len(rest) - len(rest.lstrip())


def _trie_pattern(tokens: Iterable[str]) -> str:
    """A regular expression for the longest token at a position, in time of its length.

    Vocabularies reserve thousands of special tokens; a plain alternation would try each of them.
    """
    by_first: dict[str, list[str]] = {}
    for token in tokens:
        by_first.setdefault(token[:1], []).append(token[1:])
    may_end = by_first.pop("", None) is not None
    branches = [re.escape(first) + _trie_pattern(rest) for first, rest in sorted(by_first.items())]
    if not branches:
        return ""
    return f"(?:{'|'.join(branches)}){'?' if may_end else ''}"
