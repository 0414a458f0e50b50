"""What a request asks for: the line that it continues, its prompt and the length of its reply."""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

from keepwarm.core.errors import AgentBusy, InvalidRequest
from keepwarm.core.layout import capacity_for
from keepwarm.core.policies import reply_room, shortened_limit
from keepwarm.core.ports import LoadedModel, Message, Piece
from keepwarm.core.stored import Overflow
from keepwarm.core.transcript import EMPTY
from keepwarm.engine.adapting import ChatRenderer, Rendered
from keepwarm.engine.agents import Agent, AgentBook, Line
from keepwarm.engine.chat import (
    Continuation,
    IdsContinuation,
    Prompt,
    TextContinuation,
    opening,
    validate_messages,
)
from keepwarm.engine.limits import PromptLimits, least_tokens, least_tokens_of
from keepwarm.engine.locating import message_at
from keepwarm.engine.requests import PromptSource, valid_priority, valid_text, valid_token_ids
from keepwarm.engine.tiers import Tiers

MAX_TOKENS_OF_CHARACTER = 8
"""More than the bytes that a character has."""

Conversation = tuple[Message, ...]
Locate = Callable[[int], int | None]


def nowhere(token_index: int) -> None:
    """A prompt that was not given as messages has none."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A line to continue (None: one of its own) with its prompt, and the conversation before it.

    `reply_prefix`: what the prompt has of the reply. `adapted`: what was changed in the messages
    for this model, a short sentence for each change; the response names it.
    `locate` gives the message that a token of the prompt lies in, None where that is unknown.
    """

    line: Line | None
    prompt: Prompt
    conversation: Conversation | None = None
    locate: Locate = nowhere
    num_dropped_turns: int = 0
    reply_prefix: str = ""
    adapted: tuple[str, ...] = ()


class Intake:
    """Decides about requests before anything is taken for them; changes nothing.

    `num_mended_spans` counts what a prompt would have said wrongly and was encoded anew: bugs.
    """

    def __init__(self, loaded: LoadedModel, book: AgentBook, tiers: Tiers) -> None:
        self._loaded = loaded
        self._tokenizer = loaded.tokenizer
        self._renderer = ChatRenderer(loaded.tokenizer)
        self._book = book
        self._tiers = tiers
        self.num_mended_spans = 0
        self._limits = PromptLimits.of(
            context_tokens=loaded.max_context_tokens,
            budget_bytes=tiers.pool.budget_bytes,
            block_bytes=loaded.layout.block_bytes,
            slab_bytes=tiers.generator.slab_bytes,
        )

    def priority(self, agent_id: str | None, priority: int | None) -> int:
        """None is the agent's own."""
        if priority is not None:
            return valid_priority(priority)
        agent = self._book.find(agent_id) if agent_id is not None else None
        return agent.settings.priority if agent is not None else 0

    def choose(
        self,
        agent_id: str | None,
        source: PromptSource,
        *,
        namespace: str = "",
        max_tokens: int | None = None,
    ) -> Wanted:
        """`namespace` is for requests without an agent; `max_tokens` as it was asked for.

        What is too long by its size alone is refused before anything is done for it.
        """
        self._limits.check(least_tokens(source, self._tokenizer))
        if source.append is not None:
            new = validate_messages(source.append)
            wanted = self._choose_main(agent_id, new, max_tokens)
        else:
            wanted = self._choose_line(agent_id, source, namespace)
        self.num_mended_spans += wanted.prompt.num_mended
        return wanted

    def _choose_line(self, agent_id: str | None, source: PromptSource, namespace: str) -> Wanted:
        conversation = None if source.messages is None else validate_messages(source.messages)
        continuation = self._continuation(source, conversation)
        choice = self._book.choose(agent_id, namespace, continuation)
        known = choice.line.messages if choice.line is not None else None
        locate = self._locator(choice.prompt, conversation, known)
        wanted = Wanted(
            choice.line, choice.prompt, conversation, locate, adapted=continuation.adapted
        )
        if conversation is None or not source.continue_final_message:
            return wanted
        *said, begun = conversation
        return replace(wanted, conversation=tuple(said), reply_prefix=begun["content"])

    def num_tokens(self, source: PromptSource) -> int:
        """Of the prompt, for an agent that knows nothing yet; too long a one is not counted."""
        self._limits.check(least_tokens(source, self._tokenizer))
        conversation = None if source.messages is None else validate_messages(source.messages)
        return len(self._continuation(source, conversation).of(EMPTY).token_ids)

    def history_ids(self, line: Line) -> tuple[int, ...]:
        """The ids that the line's next prompt is to begin with, as far as that is known."""
        if not line.messages:
            return line.transcript.token_ids
        pieces = self._renderer.pieces(line.messages)
        return TextContinuation(pieces, self._tokenizer.encode).of(line.transcript).token_ids

    def would_drop_turns(self, num_prompt_tokens: int) -> bool:
        """Whether a conversation that long is cut, or refused, when it goes on."""
        limit = self.max_tokens()
        return num_prompt_tokens + reply_room(limit, None) > limit

    def reply_tokens(self, num_prompt_tokens: int, max_tokens: int | None) -> int:
        """How long the reply may be: as asked for, within the context and the memory budget."""
        self._limits.check(num_prompt_tokens)
        room = self.max_tokens() - num_prompt_tokens
        return room if max_tokens is None else min(max_tokens, room)

    def max_tokens(self) -> int:
        """The longest that a line can become: the context, or what the memory budget holds."""
        return self._limits.max_tokens

    def slab_bytes(self, num_tokens: int) -> int:
        """What a line of so many tokens takes in memory."""
        return self._tiers.generator.slab_bytes(capacity_for(num_tokens))

    # -- an agent that is sent its new messages only ---------------------------------------------

    def _choose_main(
        self, agent_id: str | None, new: Conversation, max_tokens: int | None
    ) -> Wanted:
        if agent_id is None:
            raise InvalidRequest("append", "needs an agent_id: only an agent has a history")
        agent = self._book.get(agent_id)
        if agent.main.in_use:
            raise AgentBusy(agent_id, "append to it")
        if agent.main.messages is None:
            raise InvalidRequest("append", "this agent's last prompt was not given as messages")
        wanted = self._appended(agent, new, 0)
        if agent.settings.overflow is Overflow.DROP_OLDEST:
            limit = self.max_tokens()
            if len(wanted.prompt.token_ids) + reply_room(limit, max_tokens) > limit:
                return self._shortened(agent, new, limit)
        return wanted

    def _shortened(self, agent: Agent, new: Conversation, limit: int) -> Wanted:
        """Without its oldest turns: more of them than now, or every next turn would drop some."""
        appended = cache(partial(self._appended, agent, new))
        most = len(_turn_ends(agent))
        target = shortened_limit(limit)
        num_dropped = bisect_left(
            range(most), True, key=lambda n: len(appended(n).prompt.token_ids) <= target
        )
        return appended(num_dropped)

    def _appended(self, agent: Agent, new: Conversation, num_dropped: int) -> Wanted:
        history = _without_turns(agent, num_dropped)
        conversation = (*history, *new)
        continuation = self._continuation(
            PromptSource(messages=conversation),
            conversation,
            may_be_cut=agent.settings.overflow is Overflow.DROP_OLDEST,
        )
        prompt = continuation.of(agent.main.transcript)
        locate = self._locator(prompt, conversation, agent.main.messages)
        return Wanted(
            agent.main, prompt, conversation, locate, num_dropped, adapted=continuation.adapted
        )

    # -- prompts ---------------------------------------------------------------------------------

    def _continuation(
        self,
        source: PromptSource,
        conversation: Conversation | None,
        *,
        may_be_cut: bool = False,
    ) -> Continuation:
        """Unless it `may_be_cut`, a prompt that is too long by its pieces alone is refused."""
        if source.token_ids is not None:
            ids = valid_token_ids(source.token_ids, self._loaded.vocab_size)
            return IdsContinuation(ids)
        rendered = self._rendered(source, conversation)
        if not may_be_cut:
            self._limits.check(least_tokens_of(rendered.pieces, self._tokenizer))
        ends_amid = cache(self._ends_amid)
        return TextContinuation(
            rendered.pieces,
            cache(self._tokenizer.encode),
            lambda ids: ends_amid(ids[-MAX_TOKENS_OF_CHARACTER:]),
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

    def _locator(
        self, prompt: Prompt, conversation: Conversation | None, known: Sequence[Message] | None
    ) -> Locate:
        if conversation is None:
            return nowhere
        return cache(
            partial(
                message_at,
                prompt=prompt,
                conversation=conversation,
                known=known,
                render=self._renderer.pieces,
            )
        )

    def _ends_amid(self, token_ids: tuple[int, ...]) -> bool:
        """Whether these, which are the last ones, leave a character unfinished."""
        detokenizer = self._tokenizer.detokenizer()
        for token_id in token_ids:
            detokenizer.push(token_id)
        return detokenizer.pending


def _turn_ends(agent: Agent) -> list[int]:
    """How many messages there were after each turn, as far as they are known."""
    return [len(turn.messages) for turn in agent.turns if turn.messages is not None]


def _without_turns(agent: Agent, num_dropped: int) -> Conversation:
    """The agent's messages without its oldest turns; what opens as its system prompt stays."""
    messages = agent.main.messages or ()
    if not num_dropped:
        return messages
    return (*opening(messages), *messages[_turn_ends(agent)[num_dropped - 1] :])
