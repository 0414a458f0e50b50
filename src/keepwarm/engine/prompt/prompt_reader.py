"""From what a request gives to a prompt that lines can continue; touches no line."""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial

from keepwarm.core.errors import InvalidRequest
from keepwarm.core.policies import reply_room, shortened_limit
from keepwarm.core.ports import Piece, Tokenizer
from keepwarm.core.transcript import EMPTY, Transcript
from keepwarm.engine.prompt.continuation import (
    Continuation,
    IdsContinuation,
    Prompt,
    TextContinuation,
)
from keepwarm.engine.prompt.limits import (
    PromptLimits,
    is_long,
    is_long_conversation,
    least_tokens,
    least_tokens_of,
)
from keepwarm.engine.prompt.line_choice import KnownLine, choose_line
from keepwarm.engine.prompt.message_at import message_at
from keepwarm.engine.prompt.messages import Conversation, opening, validate_messages
from keepwarm.engine.prompt.prompt_encoder import Guard, PromptEncoder, unguarded
from keepwarm.engine.prompt.template.chat_renderer import ChatRenderer, Rendered
from keepwarm.engine.requests import PromptSource, valid_text, valid_token_ids


@dataclass(frozen=True, slots=True)
class History:
    """What a request appends its messages to: an agent's main line as it stands.

    `turn_ends`: how many messages there were after each turn, as far as they are known.
    `may_be_cut`: its oldest turns go where it gets too long.
    """

    messages: Conversation
    transcript: Transcript
    turn_ends: tuple[int, ...]
    may_be_cut: bool

    def without_turns(self, num_dropped: int) -> Conversation:
        """Return the messages without the first turns; what opens as the system prompt stays."""
        if not num_dropped:
            return self.messages
        return (*opening(self.messages), *self.messages[self.turn_ends[num_dropped - 1] :])


@dataclass(frozen=True, slots=True)
class Draft:
    """A prompt that was read. One thread at a time holds it, with what it has encoded so far.

    `history`: what it was appended to. `reply_prefix`: the part of the reply that the prompt ends
    with. `is_long`: its messages are not searched on the engine's thread. `located`: for tokens
    whose message a reader's thread has looked up, that message's index.
    """

    continuation: Continuation
    encoder: PromptEncoder
    conversation: Conversation | None = None
    reply_prefix: str = ""
    history: History | None = None
    num_dropped_turns: int = 0
    is_long: bool = False
    located: dict[int, int | None] = field(default_factory=dict)


class ReadElsewhere(Exception):
    """Reading the prompt would hold up the engine's thread.

    Run `work` on another thread, under that thread's guard, and submit the request again with the
    draft that it returns.
    """

    def __init__(self, work: Callable[[Guard], Draft]) -> None:
        super().__init__()
        self.work = work


class PromptReader:
    """Reads prompts for one model. Has no state, so any thread may call it."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, limits: PromptLimits) -> None:
        self.limits = limits
        self._tokenizer = tokenizer
        self._renderer = ChatRenderer(tokenizer)
        self._vocab_size = vocab_size

    def check_size(self, source: PromptSource) -> None:
        """Refuse what is too long by its size alone, before any work is done for it."""
        self.limits.check(least_tokens(source, self._tokenizer))

    def read(self, source: PromptSource, guard: Guard = unguarded) -> Draft:
        """Read a whole prompt. Raises InvalidRequest (ContextTooLong, NeverFits)."""
        self.check_size(source)
        encoder = PromptEncoder(self._tokenizer, guard)
        if source.token_ids is not None:
            ids = valid_token_ids(source.token_ids, self._vocab_size)
            return Draft(IdsContinuation(ids), encoder)
        conversation = None if source.messages is None else validate_messages(source.messages)
        rendered = self._rendered(source, conversation)
        self._check_pieces(rendered)
        continuation = TextContinuation(rendered.pieces, encoder, rendered.notes)
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
        """Read new messages behind a history, without its oldest turns if need be and allowed.

        `max_tokens`: of the reply, as asked for. Raises InvalidRequest (ContextTooLong, NeverFits).
        """
        self.check_size(source)
        new = validate_messages(source.append)
        encoder = PromptEncoder(self._tokenizer, guard)
        appended = cache(partial(self._appended, history, new, encoder))
        if history.may_be_cut:
            limit = self.limits.max_tokens
            if _num_tokens(appended(0)) + reply_room(limit, max_tokens) > limit:
                return appended(self._num_to_drop(appended, len(history.turn_ends)))
        return appended(0)

    def num_tokens(self, source: PromptSource, guard: Guard = unguarded) -> int:
        """Return how many tokens the prompt has for an agent that knows nothing yet.

        Raises InvalidRequest, also for a prompt that is too long.
        """
        return self.read(source, guard).continuation.prompt_from(EMPTY).transcript.num_tokens

    def history_ids(
        self, messages: Conversation | None, known: Transcript, guard: Guard = unguarded
    ) -> tuple[int, ...]:
        """Return the ids that a line's next prompt will begin with, as far as they are known."""
        if not messages:
            return known.token_ids
        encoder = PromptEncoder(self._tokenizer, guard)
        continuation = TextContinuation(self._renderer.pieces(messages), encoder)
        return continuation.prompt_from(known).token_ids

    def message_at(
        self, token_index: int, draft: Draft, prompt: Prompt, known: Conversation | None
    ) -> int | None:
        """Return the index of the message that a prompt's token lies in; None: unknown, or none.

        `known` are the messages of the line that the prompt continues.
        """
        if draft.conversation is None:
            return None
        render = self._renderer.pieces
        return message_at(token_index, prompt, draft.conversation, known, render)

    # -- on a reader's thread --------------------------------------------------------------------

    def prepare(
        self,
        source: PromptSource,
        lines: Sequence[KnownLine],
        guard: Guard,
        *,
        named: bool,
        draft: Draft | None = None,
    ) -> Draft:
        """Read the prompt, and encode what the line that it will continue does not know of it.

        Raises InvalidRequest, and what the guard raises.
        """
        guard(0)
        draft = draft or self.read(source, guard)
        draft.encoder.guard = guard
        index, prompt = choose_line(lines, draft.continuation, named=named)
        return self._prepared(draft, prompt, None if index is None else lines[index].messages)

    def prepare_append(
        self, history: History, source: PromptSource, max_tokens: int | None, guard: Guard
    ) -> Draft:
        """Read new messages, and encode what the history's line does not know of the prompt.

        Raises InvalidRequest, and what the guard raises.
        """
        guard(0)
        draft = self.append(history, source, max_tokens, guard)
        prompt = draft.continuation.prompt_from(history.transcript)
        return self._prepared(draft, prompt, history.messages)

    def _prepared(self, draft: Draft, prompt: Prompt, known: Conversation | None) -> Draft:
        """Return the draft, checked for length, with the message where it leaves its line."""
        self.limits.check(prompt.transcript.num_tokens)
        if draft.is_long and prompt.divergence is not None:
            index = prompt.divergence.token_index
            draft.located[index] = self.message_at(index, draft, prompt, known)
        return draft

    # -- inside ----------------------------------------------------------------------------------

    def _appended(
        self, history: History, new: Conversation, encoder: PromptEncoder, num_dropped: int
    ) -> Draft:
        encoder.guard(0)
        conversation = (*history.without_turns(num_dropped), *new)
        rendered = self._renderer.render(conversation)
        if not history.may_be_cut:
            self._check_pieces(rendered)
        return Draft(
            TextContinuation(rendered.pieces, encoder, rendered.notes),
            encoder,
            conversation,
            history=history,
            num_dropped_turns=num_dropped,
            is_long=is_long_conversation(conversation),
        )

    def _num_to_drop(self, appended: Callable[[int], Draft], num_turns: int) -> int:
        """Return how many turns to drop: more than needed now, or every next request would drop
        some.
        """
        target = shortened_limit(self.limits.max_tokens)
        return bisect_left(range(num_turns), True, key=lambda n: _num_tokens(appended(n)) <= target)

    def _check_pieces(self, rendered: Rendered) -> None:
        """Refuse a prompt that is too long by its pieces alone, before they are encoded."""
        self.limits.check(least_tokens_of(rendered.pieces, self._tokenizer))

    def _rendered(self, source: PromptSource, conversation: Conversation | None) -> Rendered:
        if conversation is None:
            return Rendered(self._tokenizer.split(valid_text(source.text or "")))
        if source.continue_final_message:
            return self._render_begun(conversation)
        return self._renderer.render(conversation)

    def _render_begun(self, conversation: Conversation) -> Rendered:
        """Render up to where the reply begins, and append the beginning that was given."""
        *said, begun = conversation
        if not said or begun["role"] != "assistant" or begun.get("tool_calls"):
            problem = "the last of several messages must be an assistant's, and text"
            raise InvalidRequest("continue_final_message", problem)
        before = self._renderer.render(said)
        return replace(before, pieces=(*before.pieces, Piece(begun["content"])))


def _num_tokens(draft: Draft) -> int:
    """Return how many tokens an appended prompt has behind its history."""
    known = EMPTY if draft.history is None else draft.history.transcript
    return draft.continuation.prompt_from(known).transcript.num_tokens
