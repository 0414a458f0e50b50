"""A tokenizer without dependencies, small enough to reason about in a test."""

import codecs
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from keepwarm.core.errors import TemplateRefused, check_unicode
from keepwarm.core.ports import Detokenizer, Message, Piece

BOS = "<|bos|>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
EOS = "<|eos|>"

_WORDS = ("Hello", " world", "He", "llo", "system", "user", "assistant", ".\n", "\n\n", "ab", "abc")
_SPECIALS = (BOS, IM_START, IM_END, EOS)
_BYTES_OF_ID = [bytes([byte]) for byte in range(256)] + [word.encode() for word in _WORDS]
_ID_OF_WORD = {word: 256 + position for position, word in enumerate(_WORDS)}
_ID_OF_SPECIAL = {text: len(_BYTES_OF_ID) + position for position, text in enumerate(_SPECIALS)}

_LONGEST_BYTES = max(map(len, _BYTES_OF_ID))
_LONGEST_FIRST = "|".join(re.escape(word) for word in sorted(_WORDS, key=len, reverse=True))
_WORD_OR_CHARACTER = re.compile(f"({_LONGEST_FIRST})|.", re.DOTALL)
_SPECIAL = re.compile("|".join(re.escape(text) for text in _SPECIALS))


@dataclass(frozen=True, slots=True)
class FakeTokenizer:
    """Implements `Tokenizer` with bytes, a few words, and a ChatML-like template.

    Promises that a text has many spellings in ids (`Hello` is a word, two words, or five bytes) and
    that `encode` picks the longest words, so that tests can make a reply whose ids no tokenizer
    would choose. The template refuses a system message that is not the first. `trim_content`
    strips contents, `strip_thinking` drops all up to `</think>` in every message but the last.
    """

    trim_content: bool = False
    strip_thinking: bool = False
    has_bos: bool = True

    @property
    def vocab_size(self) -> int:
        return len(_BYTES_OF_ID) + len(_SPECIALS)

    @property
    def eos_token_ids(self) -> frozenset[int]:
        return frozenset({_ID_OF_SPECIAL[IM_END], _ID_OF_SPECIAL[EOS]})

    @property
    def fingerprint(self) -> str:
        return "fake"

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True
    ) -> tuple[Piece, ...]:
        pieces = [special_piece(BOS)] if self.has_bos else []
        for index, message in enumerate(messages):
            pieces += self._rendered_message(messages, index, message)
        if add_generation_prompt:
            pieces += [special_piece(IM_START), Piece("assistant\n")]
        return tuple(pieces)

    def split(self, text: str) -> tuple[Piece, ...]:
        pieces = tuple(_cut(text))
        if not self.has_bos or (pieces and pieces[0] == special_piece(BOS)):
            return pieces
        return (special_piece(BOS), *pieces)

    def encode(self, text: str) -> list[int]:
        check_unicode(text)
        return [
            token_id
            for match in _WORD_OR_CHARACTER.finditer(text)
            for token_id in _ids_of_match(match)
        ]

    def least_tokens(self, text: str) -> int:
        return -(-len(text.encode("utf-8", "surrogatepass")) // _LONGEST_BYTES)

    def detokenizer(self) -> Detokenizer:
        return FakeDetokenizer()

    @staticmethod
    def bytes_of(token_id: int) -> bytes:
        """Return a token's bytes; a special token's are its name's."""
        if token_id < len(_BYTES_OF_ID):
            return _BYTES_OF_ID[token_id]
        return _SPECIALS[token_id - len(_BYTES_OF_ID)].encode()

    def _rendered_message(
        self, messages: Sequence[Message], index: int, message: Message
    ) -> list[Piece]:
        if message["role"] == "system" and index:
            raise TemplateRefused("the system message comes first")
        content = str(message.get("content") or "")
        if self.strip_thinking and index < len(messages) - 1:
            content = content.rsplit("</think>", maxsplit=1)[-1]
        if self.trim_content:
            content = content.strip()
        text = Piece(f"{message['role']}\n{content}")
        return [special_piece(IM_START), text, special_piece(IM_END), Piece("\n")]


class FakeDetokenizer:
    """Implements `Detokenizer`: the ids' bytes as UTF-8, half characters held back."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    @property
    def pending(self) -> bool:
        return bool(self._decoder.getstate()[0])

    def has_text(self, token_id: int) -> bool:
        return token_id < len(_BYTES_OF_ID)

    def push(self, token_id: int) -> str:
        if not self.has_text(token_id):
            return ""
        return self._decoder.decode(_BYTES_OF_ID[token_id])


def special_piece(text: str) -> Piece:
    """Return the piece of one of the special tokens, like IM_END."""
    return Piece(text, _ID_OF_SPECIAL[text])


def _cut(text: str) -> Iterator[Piece]:
    position = 0
    for match in _SPECIAL.finditer(text):
        if match.start() > position:
            yield Piece(text[position : match.start()])
        yield special_piece(match.group())
        position = match.end()
    if position < len(text):
        yield Piece(text[position:])


def _ids_of_match(match: re.Match[str]) -> list[int]:
    word = match.group(1)
    return [_ID_OF_WORD[word]] if word else list(match.group().encode())
