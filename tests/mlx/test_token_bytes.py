"""How few tokens a text can have: of which tokenizers that can be said, and that it is true."""

import unicodedata
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from hf_tokenizers import sentencepiece_tokenizer
from keepwarm.mlx_backend.text.detokenizer import byte_alphabet
from keepwarm.mlx_backend.text.token_bytes import SHRINKAGE, TokenBytes
from keepwarm.mlx_backend.text.tokenizer import HFTokenizer

BYTES = list(byte_alphabet())
AWKWARD = ("", "a" * 99, " " * 64, "e\u0301" * 30, "\u1fbe\u0308\u0301" * 30, "\u212a" * 30, "日本")


def byte_level(*, words: tuple[str, ...] = (), without: str = "") -> Tokenizer:
    alphabet = [character for character in BYTES if character not in without]
    vocabulary = {token: number for number, token in enumerate([*alphabet, *words])}
    merges = [(word[:-1], word[-1]) for word in words]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def spec_of(tokenizer: Any) -> dict[str, Any]:
    import json

    spec: dict[str, Any] = json.loads(tokenizer.to_str())
    return spec


def test_of_a_vocabulary_of_bytes_by_its_longest_token() -> None:
    assert TokenBytes.of(spec_of(byte_level(words=("ab", "abc")))) == TokenBytes(3)


def test_an_added_token_may_be_the_longest() -> None:
    tokenizer = byte_level()
    tokenizer.add_tokens(["<tool_call>"])
    assert TokenBytes.of(spec_of(tokenizer)) == TokenBytes(11)


def test_bytes_that_the_vocabulary_lacks_do_not_count() -> None:
    tokenizer = byte_level(words=("ab",), without="z")
    bound = TokenBytes.of(spec_of(tokenizer))
    assert bound == TokenBytes(2, b"z")
    text = "azbz" * 10
    assert bound.least_tokens(text) == len(tokenizer.encode(text).ids) == 10


@pytest.mark.parametrize("form", sorted(SHRINKAGE))
def test_normalised_text_may_be_shorter(form: str) -> None:
    tokenizer = byte_level(words=("aa",))
    tokenizer.normalizer = getattr(normalizers, form)()
    bound = TokenBytes.of(spec_of(tokenizer))
    assert bound == TokenBytes(8)
    for text in AWKWARD:
        assert bound.least_tokens(text) <= len(tokenizer.encode(text).ids)


@pytest.mark.parametrize("form", sorted(SHRINKAGE))
def test_no_character_shrinks_by_more(form: str) -> None:
    """Every normalised character, made of the longest characters that become a part of it."""
    whole = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    decompose = "NFKD" if "K" in form else "NFD"
    longest: dict[str, float] = {}
    for character in whole:
        parts = unicodedata.normalize(decompose, character)
        share = len(character.encode()) / len(parts)
        for part in parts:
            longest[part] = max(longest.get(part, 0.0), share)
    for character in whole:
        if unicodedata.normalize(form, character) == character:
            source = sum(longest[part] for part in unicodedata.normalize(decompose, character))
            assert source <= SHRINKAGE[form] * len(character.encode())


@pytest.mark.parametrize("style", ["legacy", "first", "always"])
def test_of_sentencepiece_with_bytes_for_the_rest(style: str) -> None:
    tokenizer = HFTokenizer(sentencepiece_tokenizer(style), [2])
    for text in ("Hello world", " Hello / [INST]" * 20, "日本\x00 I", " " * 50):
        assert 0 < tokenizer.least_tokens(text) <= len(tokenizer.encode(text))


def dropping_space() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel()]
    )
    return tokenizer


def stripping() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.Strip()
    return tokenizer


def shortening() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.Replace("  ", " ")
    return tokenizer


def absorbing() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("<tool_call>", rstrip=True)])
    return tokenizer


def with_unknown() -> Tokenizer:
    return Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))


@pytest.mark.parametrize("make", [dropping_space, stripping, shortening, absorbing, with_unknown])
def test_where_text_can_vanish_nothing_is_promised(make: Any) -> None:
    assert TokenBytes.of(spec_of(make())) is None
