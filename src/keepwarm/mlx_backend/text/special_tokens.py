"""Special tokens: found in rendered text, and never mistaken for the text of a message."""

import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer

from keepwarm.core.ports import Piece


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """The tokens that structure a prompt, found in text as the tokenizer itself would find them.

    `proper_prefixes` and `longest_prefix` tell whether a text ends amid a token's text.
    """

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
        """Cut the text at its special tokens, each with the white space that it absorbs."""
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
    """Breaks special-token text in messages before the template sees it, and restores it after.

    The mark is drawn for each rendering, so no message can contain it; it is all digits, so no
    template trims it, escapes it or changes its case.
    """

    def __init__(self, specials: SpecialTokens) -> None:
        self._specials = specials
        self._mark = f"{secrets.randbelow(10**38):038}"

    def cover(self, value: Any) -> Any:
        """Return the value with special-token text broken by the mark, in every string that it
        holds.
        """
        if isinstance(value, str):
            return self._cover_text(value)
        if isinstance(value, Mapping):
            return {self.cover(key): self.cover(item) for key, item in value.items()}
        if isinstance(value, Sequence) and not isinstance(value, bytes):
            return [self.cover(item) for item in value]
        return value

    def uncover(self, piece: Piece) -> Piece:
        """Return the piece without marks."""
        return Piece(piece.text.replace(self._mark, ""), piece.special_id)

    def _cover_text(self, text: str) -> str:
        covered = self._specials.pattern.sub(self._break, text)
        return covered + self._mark if self._specials.ends_inside(covered) else covered

    def _break(self, match: re.Match[str]) -> str:
        return f"{match.group()[0]}{self._mark}{match.group()[1:]}"


def _start_of_space(text: str, lowest: int, position: int) -> int:
    return lowest + len(text[lowest:position].rstrip())


def _end_of_space(text: str, position: int) -> int:
    rest = text[position:]
    return position + len(rest) - len(rest.lstrip())


def _trie_pattern(tokens: Iterable[str]) -> str:
    """Return a regular expression for the longest token at a position, matched in time of its
    length.

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
