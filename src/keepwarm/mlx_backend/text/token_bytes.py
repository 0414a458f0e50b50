"""A lower bound of a text's tokens, derived from tokenizer.json without encoding the text."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from keepwarm.mlx_backend.text.detokenizer import byte_alphabet

Component = Mapping[str, Any]
C = TypeVar("C", bound=Component)

_SEQUENCES = ("normalizers", "pretokenizers", "decoders")
"""The fields by which a component of type Sequence holds its parts."""

SHRINKAGE = {"NFC": 4, "NFD": 4, "NFKC": 4, "NFKD": 4}
"""How many times shorter, in bytes, Unicode's normalisation can make a text at most.

Measured over all characters: 3.5, 3, 4 and 4.
"""
_KEEPS_TEXT = frozenset({"ByteLevel", "Metaspace", "Digits", "Split", "Punctuation", "Sequence"})
_FALLBACK = frozenset(f"<0x{byte:02X}>" for byte in range(256))


@dataclass(frozen=True, slots=True)
class TokenBytes:
    """How many bytes a token stands for at most, without the bytes that the vocabulary lacks.

    A tokenizer drops the bytes that it lacks, or makes one unknown token of any number of them.
    """

    most: int
    lacking: bytes = b""

    @classmethod
    def of(cls, spec: Component) -> "TokenBytes | None":
        """Derive the bound from tokenizer.json; None where text can vanish, so that there is none.

        Text vanishes where a normaliser strips, a pre-tokenizer drops white space, the vocabulary
        is not made of bytes, or a token absorbs the white space beside it.
        """
        pre_tokenizers = list(parts(spec["pre_tokenizer"]))
        is_byte_level = any(part["type"] == "ByteLevel" for part in pre_tokenizers)
        shrinkage = _shrinkage(parts(spec["normalizer"]))
        vocabulary = _vocabulary(spec["model"])
        added = [token for token in spec.get("added_tokens") or () if not token["special"]]
        if (
            shrinkage is None
            or not all(map(_keeps_text, pre_tokenizers))
            or not (is_byte_level or _falls_back(spec["model"], vocabulary))
            or any(token["lstrip"] or token["rstrip"] for token in added)
        ):
            return None
        # In a byte-level vocabulary each character is a byte.
        own = max(len(token) if is_byte_level else len(token.encode()) for token in vocabulary)
        most = max([own, *(len(token["content"].encode()) for token in added)])
        return cls(shrinkage * most, _lacking(vocabulary) if is_byte_level else b"")

    def least_tokens(self, text: str) -> int:
        """Return a lower bound of the text's tokens."""
        if not self.lacking and text.isascii():
            return -(-len(text) // self.most)
        written = text.encode("utf-8", "surrogatepass").translate(None, self.lacking)
        return -(-len(written) // self.most)


def _shrinkage(normalizers: Iterable[Component]) -> int | None:
    factor = 1
    for part in normalizers:
        if part["type"] in SHRINKAGE:
            factor *= SHRINKAGE[part["type"]]
        elif part["type"] not in ("Sequence", "Prepend") and not _only_grows(part):
            return None
    return factor


def _only_grows(part: Component) -> bool:
    """Whether it replaces a text by one with as many bytes, or more."""
    pattern = part.get("pattern", {}).get("String") if part["type"] == "Replace" else None
    return pattern is not None and len(part["content"].encode()) >= len(pattern.encode())


def _keeps_text(part: Component) -> bool:
    return part["type"] in _KEEPS_TEXT and part.get("behavior") != "Removed"


def _falls_back(model: Component, vocabulary: Collection[str]) -> bool:
    return bool(model.get("byte_fallback")) and _FALLBACK.issubset(vocabulary)


def _lacking(vocabulary: Collection[str]) -> bytes:
    known = set(vocabulary)
    return bytes(byte for character, byte in byte_alphabet().items() if character not in known)


def _vocabulary(model: Component) -> list[str]:
    """Return the tokens of BPE, which maps them to ids, or of Unigram, which lists them with
    scores.
    """
    tokens = model.get("vocab") or ()
    return list(tokens) if isinstance(tokens, Mapping) else [token for token, _ in tokens]


def parts(component: C | None) -> Iterator[C]:
    """Yield a component of tokenizer.json, and everything that it is a sequence of."""
    if component is not None:
        yield component
        for sequence in _SEQUENCES:
            for part in component.get(sequence, ()):
                yield from parts(part)
