"""From what a request gives to a prompt that lines can continue; touches no line."""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import chain

from keepwarm.core.errors import InvalidRequest
from keepwarm.core.policies import reply_room, shortened_limit
from keepwarm.core.ports import Message, Piece, Tokenizer
from keepwarm.core.transcript import EMPTY, Transcript
from keepwarm.engine.prompt.adaptation import ChatRenderer, Rendered
from keepwarm.engine.prompt.continuation import (
    Continuation,
    IdsContinuation,
    Prompt,
    TextContinuation,
    opening,
    validate_messages,
)
from keepwarm.engine.prompt.encoding import Guard, PieceEncoder, unguarded
from keepwarm.engine.prompt.limits import (
    PromptLimits,
    least_tokens,
    least_tokens_of,
    num_characters,
    num_items,
    texts_of,
)
from keepwarm.engine.prompt.line_choice import KnownLine, choose_line
from keepwarm.engine.prompt.message_at import message_at
from keepwarm.engine.requests import PromptSource, valid_text, valid_token_ids

MAX_TOKENS_OF_CHARACTER = 8
"""More than the bytes that a character has."""
READ_HERE_CHARACTERS = 64 << 10
READ_HERE_MESSAGES = 64
READ_HERE_IDS = 32 << 10
"""A longer prompt is not read on a thread that others wait for: one of these takes 1 to 4 ms."""

Conversation = tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class History:
    """What there is to append to: an agent's main line as it stands.

    `turn_ends`: how many messages there were after each turn, as far as they are known.
    `may_be_cut`: its oldest turns go where it gets too long.
    """

    messages: Conversation
    transcript: Transcript
    turn_ends: tuple[int, ...]
    may_be_cut: bool

    def without_turns(self, num_dropped: int) -> Conversation:
        """What opens as the system prompt stays."""
        if not num_dropped:
            return self.messages
        return (*opening(self.messages), *self.messages[self.turn_ends[num_dropped - 1] :])


@dataclass(frozen=True, slots=True)
class Draft:
    """A prompt that was read. One thread at a time has it, with what is encoded of it by now.

    `history`: what it was appended to. `located`: the messages of tokens that were looked for
    where there was time; on a thread that others wait for, a long conversation's are not.
    """

    continuation: Continuation
    encoder: PieceEncoder
    conversation: Conversation | None = None
    reply_prefix: str = ""
    history: History | None = None
    num_dropped_turns: int = 0
    is_long: bool = False
    located: dict[int, int | None] = field(default_factory=dict)


class ReadElsewhere(Exception):
    """The prompt takes longer to read than others may wait for this thread.

    `work` is to be done on another one, under its guard; with what it returns the request is to be
    submitted again.
    """

    def __init__(self, work: Callable[[Guard], Draft]) -> None:
        super().__init__()
        self.work = work


class PromptReader:
    """Reads prompts for one model. Has no state: can be called from any thread."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, limits: PromptLimits) -> None:
        self.limits = limits
        self._tokenizer = tokenizer
        self._renderer = ChatRenderer(tokenizer)
        self._vocab_size = vocab_size

    def check_size(self, source: PromptSource) -> None:
        """Refuse what is too long by its size alone, before anything is done for it."""
        self.limits.check(least_tokens(source, self._tokenizer))

    def read(self, source: PromptSource, guard: Guard = unguarded) -> Draft:
        """Raises InvalidRequest."""
        self.check_size(source)
        encoder = PieceEncoder(self._tokenizer.encode, guard)
        if source.token_ids is not None:
            ids = valid_token_ids(source.token_ids, self._vocab_size)
            return Draft(IdsContinuation(ids), encoder)
        conversation = None if source.messages is None else validate_messages(source.messages)
        continuation = self._continuation(self._rendered(source, conversation), encoder)
        draft = Draft(continuation, encoder, conversation, is_long=is_long(source))
        if conversation is None or not source.continue_final_message:
            return draft
        *said, begun = conversation
        return replace(draft, conversation=tuple(said), reply_prefix=begun["content"])

    def append(
        self,
        history: History,
        source: PromptSource,
        max_tokens: int | None,
        guard: Guard = unguarded,
    ) -> Draft:
        """The conversation goes on; where it may be cut, perhaps without its oldest turns.

        `max_tokens` of the reply, as asked for. Raises InvalidRequest.
        """
        self.check_size(source)
        new = validate_messages(source.append)
        encoder = PieceEncoder(self._tokenizer.encode, guard)
        appended = cache(partial(self._appended, history, new, encoder))
        if history.may_be_cut:
            limit = self.limits.max_tokens
            if self._num_tokens(appended(0)) + reply_room(limit, max_tokens) > limit:
                return appended(self._num_to_drop(appended, len(history.turn_ends)))
        return appended(0)

    def num_tokens(self, source: PromptSource, guard: Guard = unguarded) -> int:
        """Of the prompt, for an agent that knows nothing yet; too long a one is not counted."""
        return self.read(source, guard).continuation.of(EMPTY).transcript.num_tokens

    def history_ids(
        self, messages: Conversation | None, known: Transcript, guard: Guard = unguarded
    ) -> tuple[int, ...]:
        """The ids that a line's next prompt is to begin with, as far as that is known."""
        if not messages:
            return known.token_ids
        pieces = self._renderer.pieces(messages)
        encoder = PieceEncoder(self._tokenizer.encode, guard)
        return TextContinuation(pieces, encoder).of(known).token_ids

    # -- where there is time ---------------------------------------------------------------------

    def prepare(
        self,
        source: PromptSource,
        lines: Sequence[KnownLine],
        guard: Guard,
        *,
        named: bool,
        draft: Draft | None = None,
    ) -> Draft:
        """Read the prompt, and encode of it what the line does not know that it will continue."""
        guard(0)
        if draft is None:
            draft = self.read(source, guard)
        draft.encoder.guard = guard
        line, prompt = choose_line(lines, draft.continuation, named=named)
        self.limits.check(prompt.transcript.num_tokens)
        self._locate_divergence(draft, prompt, None if line is None else line.messages)
        return draft

    def prepare_append(
        self, history: History, source: PromptSource, max_tokens: int | None, guard: Guard
    ) -> Draft:
        """The same for what is appended."""
        guard(0)
        draft = self.append(history, source, max_tokens, guard)
        prompt = draft.continuation.of(history.transcript)
        self.limits.check(prompt.transcript.num_tokens)
        self._locate_divergence(draft, prompt, history.messages)
        return draft

    def message_at(
        self, token_index: int, draft: Draft, prompt: Prompt, known: Conversation | None
    ) -> int | None:
        """The index of the message that a token of the prompt lies in; None: unknown, or none."""
        if draft.conversation is None:
            return None
        render = self._renderer.pieces
        return message_at(token_index, prompt, draft.conversation, known, render)

    # -- inside ----------------------------------------------------------------------------------

    def _locate_divergence(self, draft: Draft, prompt: Prompt, known: Conversation | None) -> None:
        if draft.is_long and prompt.divergence is not None:
            index = prompt.divergence.token_index
            draft.located[index] = self.message_at(index, draft, prompt, known)

    def _appended(
        self, history: History, new: Conversation, encoder: PieceEncoder, num_dropped: int
    ) -> Draft:
        encoder.guard(0)
        conversation = (*history.without_turns(num_dropped), *new)
        rendered = self._renderer.render(conversation)
        return Draft(
            self._continuation(rendered, encoder, may_be_cut=history.may_be_cut),
            encoder,
            conversation,
            history=history,
            num_dropped_turns=num_dropped,
            is_long=is_long_conversation(conversation),
        )

    def _num_to_drop(self, appended: Callable[[int], Draft], num_turns: int) -> int:
        """More turns than need be now, or every next one would drop some."""
        target = shortened_limit(self.limits.max_tokens)
        return bisect_left(
            range(num_turns), True, key=lambda n: self._num_tokens(appended(n)) <= target
        )

    def _num_tokens(self, draft: Draft) -> int:
        known = EMPTY if draft.history is None else draft.history.transcript
        return draft.continuation.of(known).transcript.num_tokens

    def _continuation(
        self, rendered: Rendered, encoder: PieceEncoder, *, may_be_cut: bool = False
    ) -> Continuation:
        """Unless it `may_be_cut`, a prompt that is too long by its pieces alone is refused."""
        if not may_be_cut:
            self.limits.check(least_tokens_of(rendered.pieces, self._tokenizer))
        ends_amid = cache(self._ends_amid)
        return TextContinuation(
            rendered.pieces,
            encoder,
            lambda ids: ends_amid(tuple(ids[-MAX_TOKENS_OF_CHARACTER:])),
            rendered.notes,
        )

    def _rendered(self, source: PromptSource, conversation: Conversation | None) -> Rendered:
        if conversation is None:
            return Rendered(self._tokenizer.split(valid_text(source.text or "")))
        if source.continue_final_message:
            return self._render_begun(conversation)
        return self._renderer.render(conversation)

    def _render_begun(self, conversation: Conversation) -> Rendered:
        """Up to where the reply begins, and what there is of it."""
        *said, begun = conversation
        if not said or begun["role"] != "assistant" or begun.get("tool_calls"):
            problem = "the last of several messages must be an assistant's, and text"
            raise InvalidRequest("continue_final_message", problem)
        before = self._renderer.render(said)
        return replace(before, pieces=(*before.pieces, Piece(begun["content"])))

    def _ends_amid(self, token_ids: tuple[int, ...]) -> bool:
        """Whether these, which are the last ones, leave a character unfinished."""
        detokenizer = self._tokenizer.detokenizer()
        for token_id in token_ids:
            detokenizer.push(token_id)
        return detokenizer.pending


def is_long(source: PromptSource, history: Sequence[Message] = ()) -> bool:
    """Whether reading it would hold up a thread, by its size alone."""
    if source.token_ids is not None:
        return num_items(source.token_ids) > READ_HERE_IDS
    if source.text is not None:
        return num_characters(source.text) > READ_HERE_CHARACTERS
    messages = source.append if source.append is not None else source.messages
    return is_long_conversation([*history, *(messages or ())] if num_items(messages) else history)


def is_long_conversation(messages: Sequence[Message]) -> bool:
    if len(messages) > READ_HERE_MESSAGES:
        return True
    texts = chain.from_iterable(map(texts_of, messages))
    return sum(map(len, texts)) > READ_HERE_CHARACTERS
