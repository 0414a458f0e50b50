"""How long a prompt may be, and what its size alone says before it is tokenised."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from keepwarm.core.errors import ContextTooLong, NeverFits
from keepwarm.core.layout import BLOCK_TOKENS, capacity_for
from keepwarm.core.ports import Message, Piece, Tokenizer
from keepwarm.engine.requests import PromptSource

READ_HERE_CHARACTERS = 64 << 10
READ_HERE_MESSAGES = 64
READ_HERE_IDS = 32 << 10
"""A prompt with more of any of these is not read on the engine's thread, where reading that much
takes 1 to 4 ms."""


@dataclass(frozen=True, slots=True)
class PromptLimits:
    """The longest prompt that the model's context and the memory budget hold.

    `slab_bytes` gives the bytes of a slab for a number of tokens, without side effects.
    """

    context_tokens: int
    budget_bytes: int
    fitting_tokens: int
    """The longest line, in tokens, that the whole budget holds."""
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
        """How many tokens a line can have at most."""
        return min(self.context_tokens, self.fitting_tokens)

    def check(self, num_prompt_tokens: int) -> None:
        """Raise ContextTooLong or NeverFits where a prompt this long leaves a reply no token."""
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
    """Return a lower bound of the prompt's tokens, from its size alone.

    A message counts as a token, and its text in full, also what a template would leave out. Bare
    text counts as 0: it may have special tokens, and nothing is known before it is cut at them.
    """
    if source.token_ids is not None:
        return _num_items(source.token_ids)
    messages = source.append if source.append is not None else source.messages
    num_messages = _num_items(messages)
    texts = chain.from_iterable(map(_texts_of, (messages or ()) if num_messages else ()))
    return max(num_messages, sum(map(tokenizer.least_tokens, texts)))


def least_tokens_of(pieces: Iterable[Piece], tokenizer: Tokenizer) -> int:
    """Return a lower bound of the tokens of a prompt that has been cut at its special tokens."""
    return sum(
        tokenizer.least_tokens(piece.text) if piece.special_id is None else 1 for piece in pieces
    )


def is_long(source: PromptSource, history: Sequence[Message] = ()) -> bool:
    """Whether reading the prompt takes too long for the engine's thread, by its size alone.

    `history` is the conversation that the source is appended to.
    """
    if source.token_ids is not None:
        return _num_items(source.token_ids) > READ_HERE_IDS
    if source.text is not None:
        return _num_characters(source.text) > READ_HERE_CHARACTERS
    messages = source.append if source.append is not None else source.messages
    return is_long_conversation([*history, *(messages or ())] if _num_items(messages) else history)


def is_long_conversation(messages: Sequence[Message]) -> bool:
    """Whether reading the messages takes too long for the engine's thread."""
    if len(messages) > READ_HERE_MESSAGES:
        return True
    texts = chain.from_iterable(map(_texts_of, messages))
    return sum(map(len, texts)) > READ_HERE_CHARACTERS


def _num_characters(text: object) -> int:
    """Return the text's length; 0 for anything but a text, which validation refuses later."""
    return len(text) if isinstance(text, str) else 0


def _num_items(items: object) -> int:
    """Return the list's length; 0 for anything but a list, which validation refuses later."""
    return len(items) if isinstance(items, Sequence) and not isinstance(items, str | bytes) else 0


def _texts_of(message: object) -> Iterator[str]:
    """Yield the message's texts; what should not be there is skipped, and validation refuses it
    later.
    """
    content = message.get("content") if isinstance(message, Mapping) else None
    parts = [{"text": content}] if isinstance(content, str) else content
    for part in parts if isinstance(parts, list | tuple) else ():
        text = part.get("text") if isinstance(part, Mapping) else None
        if isinstance(text, str):
            yield text
