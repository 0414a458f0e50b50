"""Turns ids into text one by one, and never shows a part of a character."""

import codecs
from collections.abc import Collection
from functools import lru_cache

from tokenizers import Tokenizer

REPLACEMENT = "\ufffd"

MAX_CHARACTER_BYTES = 4
"""How long a character is in UTF-8 at most, and so how many tokens can wait for its end."""


class _Vocabulary:
    """What a detokenizer knows of the ids: which of them are text."""

    def __init__(self, tokenizer: Tokenizer, hidden_ids: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._hidden_ids = hidden_ids

    def has_text(self, token_id: int) -> bool:
        """Whether the id is a token of the vocabulary, and not a hidden one."""
        is_hidden = token_id in self._hidden_ids
        return not is_hidden and self._tokenizer.id_to_token(token_id) is not None


class ByteLevelDetokenizer(_Vocabulary):
    """Detokenizes byte-level vocabularies: a token is a run of bytes, and the text is their UTF-8.

    Bytes that can no longer become a character are shown as U+FFFD at once.
    """

    def __init__(self, tokenizer: Tokenizer, hidden_ids: Collection[int]) -> None:
        super().__init__(tokenizer, hidden_ids)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    @property
    def pending(self) -> bool:
        return bool(self._decoder.getstate()[0])

    def push(self, token_id: int) -> str:
        token = self._tokenizer.id_to_token(token_id)
        if token is None or token_id in self._hidden_ids:
            return ""
        return self._decoder.decode(bytes_of_token(token))


class WindowDetokenizer(_Vocabulary):
    """Detokenizes every other vocabulary: decodes the waiting tokens after those shown last.

    The tokens shown last are the context that decides on a leading space. Text that ends in U+FFFD
    waits for the rest of a character, but never for more tokens than a character has bytes.
    """

    def __init__(self, tokenizer: Tokenizer, hidden_ids: Collection[int]) -> None:
        super().__init__(tokenizer, hidden_ids)
        self._context: list[int] = []
        self._waiting: list[int] = []

    @property
    def pending(self) -> bool:
        return bool(self._waiting)

    def push(self, token_id: int) -> str:
        if token_id in self._hidden_ids:
            return ""
        self._waiting.append(token_id)
        shown = self._decode(self._context)
        text = self._decode(self._context + self._waiting)
        if text.endswith(REPLACEMENT) and len(self._waiting) < MAX_CHARACTER_BYTES:
            return ""
        self._context, self._waiting = self._next_context(), []
        return text[len(shown) :]

    def _next_context(self) -> list[int]:
        """Return the waiting tokens, behind the old context where they have no text (a leading
        space).
        """
        if self._decode(self._waiting):
            return self._waiting
        return self._context + self._waiting

    def _decode(self, token_ids: list[int]) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=False))


def bytes_of_token(token: str) -> bytes:
    """Return the bytes of a byte-level token; a token outside the byte alphabet (an added one) is
    text.
    """
    alphabet = byte_alphabet()
    if all(character in alphabet for character in token):
        return bytes(alphabet[character] for character in token)
    return token.encode()


@lru_cache(maxsize=1)
def byte_alphabet() -> dict[str, int]:
    """Return the byte of each of GPT-2's printable characters.

    Visible Latin-1 characters stand for themselves, the other bytes for characters from U+0100 on.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {
        chr(0x100 + position): byte for position, byte in enumerate(hidden)
    }
