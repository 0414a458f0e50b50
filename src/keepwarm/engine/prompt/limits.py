"""How long a prompt may be, and what is known of its length before it is tokenised."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from keepwarm.core.errors import ContextTooLong, NeverFits
from keepwarm.core.layout import BLOCK_TOKENS, capacity_for
from keepwarm.core.ports import Piece, Tokenizer
from keepwarm.engine.requests import PromptSource


@dataclass(frozen=True, slots=True)
class PromptLimits:
    """What the model's context and the memory budget hold. `slab_bytes` is pure arithmetic."""

    context_tokens: int
    budget_bytes: int
    fitting_tokens: int
    """The longest line that the whole budget holds."""
    slab_bytes: Callable[[int], int]

    @classmethod
    def of(
        cls,
        *,
        context_tokens: int,
        budget_bytes: int,
        block_bytes: int,
        slab_bytes: Callable[[int], int],
    ) -> "PromptLimits":
        num_blocks = budget_bytes // block_bytes
        while num_blocks and slab_bytes(num_blocks * BLOCK_TOKENS) > budget_bytes:
            num_blocks -= 1
        return cls(context_tokens, budget_bytes, num_blocks * BLOCK_TOKENS, slab_bytes)

    @property
    def max_tokens(self) -> int:
        """The longest that a line can become."""
        return min(self.context_tokens, self.fitting_tokens)

    def check(self, num_prompt_tokens: int) -> None:
        """Raise ContextTooLong or NeverFits where no token of a reply has room behind them."""
        if num_prompt_tokens >= self.context_tokens:
            raise ContextTooLong(
                num_prompt_tokens=num_prompt_tokens, max_context_tokens=self.context_tokens
            )
        if num_prompt_tokens >= self.fitting_tokens:
            raise NeverFits(
                num_prompt_tokens=num_prompt_tokens,
                max_prompt_tokens=max(self.fitting_tokens - 1, 0),
                needed_bytes=self.slab_bytes(capacity_for(num_prompt_tokens + 1)),
                budget_bytes=self.budget_bytes,
            )


def least_tokens(source: PromptSource, tokenizer: Tokenizer) -> int:
    """How many tokens the prompt has at least, from its size alone.

    A message counts as a token, and its text in full, also what a template would leave out. Bare
    text may have special tokens, so of that nothing is known before it is cut at them.
    """
    if source.token_ids is not None:
        return num_items(source.token_ids)
    messages = source.append if source.append is not None else source.messages
    num_messages = num_items(messages)
    texts = chain.from_iterable(map(texts_of, (messages or ()) if num_messages else ()))
    return max(num_messages, sum(map(tokenizer.least_tokens, texts)))


def least_tokens_of(pieces: Iterable[Piece], tokenizer: Tokenizer) -> int:
    """The same of a prompt that has been cut at its special tokens."""
    return sum(
        tokenizer.least_tokens(piece.text) if piece.special_id is None else 1 for piece in pieces
    )


def num_characters(text: object) -> int:
    """None where it is no text, which is refused elsewhere."""
    return len(text) if isinstance(text, str) else 0


def num_items(items: object) -> int:
    """None where it is no list, which is refused elsewhere."""
    return len(items) if isinstance(items, Sequence) and not isinstance(items, str | bytes) else 0


def texts_of(message: object) -> Iterator[str]:
    """What there is of them: what should not be there is refused elsewhere."""
    content = message.get("content") if isinstance(message, Mapping) else None
    parts = [{"text": content}] if isinstance(content, str) else content
    for part in parts if isinstance(parts, list | tuple) else ():
        text = part.get("text") if isinstance(part, Mapping) else None
        if isinstance(text, str):
            yield text
