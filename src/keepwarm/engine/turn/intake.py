"""What a request asks for: the line that it continues, its prompt and the length of its reply."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

from keepwarm.core.errors import AgentBusy, InvalidRequest
from keepwarm.core.layout import capacity_for
from keepwarm.core.policies import reply_room
from keepwarm.core.ports import LoadedModel
from keepwarm.core.stored import Overflow
from keepwarm.engine.agents.book import Agent, AgentBook, Line
from keepwarm.engine.prompt.continuation import Prompt
from keepwarm.engine.prompt.encoding import Allowance, Guard, TooMuchToEncode, unguarded
from keepwarm.engine.prompt.limits import PromptLimits
from keepwarm.engine.prompt.line_choice import KnownLine, choose_line
from keepwarm.engine.prompt.prompt_reader import (
    Conversation,
    Draft,
    History,
    PromptReader,
    ReadElsewhere,
    is_long,
)
from keepwarm.engine.requests import PromptSource, valid_priority
from keepwarm.kv.tiers import Tiers

Locate = Callable[[int], int | None]


def nowhere(token_index: int) -> None:
    """A prompt that was not given as messages has none."""


@dataclass(frozen=True, slots=True)
class Reading:
    """For a thread that others wait for: a long prompt is read elsewhere, and comes as a draft."""

    draft: Draft | None = None


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
        self._book = book
        self._tiers = tiers
        self.num_mended_spans = 0
        self._limits = PromptLimits.of(
            context_tokens=loaded.max_context_tokens,
            budget_bytes=tiers.pool.budget_bytes,
            block_bytes=loaded.layout.block_bytes,
            slab_bytes=tiers.generator.slab_bytes,
        )
        self.reader = PromptReader(loaded.tokenizer, loaded.vocab_size, self._limits)

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
        reading: Reading | None = None,
    ) -> Wanted:
        """`namespace` is for requests without an agent; `max_tokens` as it was asked for.

        With `reading`, raises ReadElsewhere for what would take long. Without, everything is done
        here.
        """
        if source.append is not None:
            agent = self._agent_to_append_to(agent_id, source)
            if agent.main.in_use:
                raise AgentBusy(agent.agent_id, "append to it")
            wanted = self._choose_main(agent, source, max_tokens, reading)
        else:
            wanted = self._choose_line(agent_id, source, namespace, reading)
        self.num_mended_spans += wanted.prompt.num_mended
        return wanted

    def check_length(
        self,
        agent_id: str | None,
        source: PromptSource,
        *,
        namespace: str = "",
        max_tokens: int | None = None,
        reading: Reading | None = None,
    ) -> None:
        """Refuse a prompt that is too long as things stand, also for a line that is in use."""
        if source.append is not None:
            agent = self._agent_to_append_to(agent_id, source)
            wanted = self._choose_main(agent, source, max_tokens, reading)
        else:
            wanted = self._choose_line(agent_id, source, namespace, reading)
        self._limits.check(wanted.prompt.transcript.num_tokens)

    def would_drop_turns(self, num_prompt_tokens: int) -> bool:
        """Whether a conversation that long is cut, or refused, when it goes on."""
        limit = self._limits.max_tokens
        return num_prompt_tokens + reply_room(limit, None) > limit

    def reply_tokens(self, num_prompt_tokens: int, max_tokens: int | None) -> int:
        """How long the reply may be: as asked for, within the context and the memory budget."""
        self._limits.check(num_prompt_tokens)
        room = self._limits.max_tokens - num_prompt_tokens
        return room if max_tokens is None else min(max_tokens, room)

    def slab_bytes(self, num_tokens: int) -> int:
        """What a line of so many tokens takes in memory."""
        return self._tiers.generator.slab_bytes(capacity_for(num_tokens))

    # -- a whole prompt --------------------------------------------------------------------------

    def _choose_line(
        self,
        agent_id: str | None,
        source: PromptSource,
        namespace: str,
        reading: Reading | None,
    ) -> Wanted:
        lines = self._book.lines_of(agent_id, namespace)
        named = agent_id is not None
        draft = reading.draft if reading is not None else None
        if draft is None and reading is not None and is_long(source):
            raise ReadElsewhere(self._to_prepare(source, lines, named, None))
        draft = draft or self.reader.read(source)
        draft.encoder.guard = _guard_of(reading)
        try:
            line, prompt = choose_line(lines, draft.continuation, named=named)
        except TooMuchToEncode:
            raise ReadElsewhere(self._to_prepare(source, lines, named, draft)) from None
        known = None if line is None else line.messages
        return self._wanted(line, prompt, draft, known, reading)

    def _to_prepare(
        self, source: PromptSource, lines: Sequence[Line], named: bool, draft: Draft | None
    ) -> Callable[[Guard], Draft]:
        known = [KnownLine.of(line) for line in lines]
        prepare = self.reader.prepare
        return lambda guard: prepare(source, known, guard, named=named, draft=draft)

    # -- an agent that is sent its new messages only ---------------------------------------------

    def _agent_to_append_to(self, agent_id: str | None, source: PromptSource) -> Agent:
        if agent_id is None:
            raise InvalidRequest("append", "needs an agent_id: only an agent has a history")
        agent = self._book.get(agent_id)
        if agent.main.messages is None:
            raise InvalidRequest("append", "this agent's last prompt was not given as messages")
        return agent

    def _choose_main(
        self,
        agent: Agent,
        source: PromptSource,
        max_tokens: int | None,
        reading: Reading | None,
    ) -> Wanted:
        history = _history_of(agent)
        elsewhere = ReadElsewhere(
            lambda guard: self.reader.prepare_append(history, source, max_tokens, guard)
        )
        draft = reading.draft if reading is not None else None
        if draft is not None and draft.history != history:
            draft = None  # somebody else has gone on with the line
        if draft is None and reading is not None and is_long(source, history.messages):
            raise elsewhere
        guard = _guard_of(reading)
        try:
            draft = draft or self.reader.append(history, source, max_tokens, guard)
            draft.encoder.guard = guard
            prompt = draft.continuation.of(history.transcript)
        except TooMuchToEncode:
            raise elsewhere from None
        return self._wanted(agent.main, prompt, draft, history.messages, reading)

    # -- inside ----------------------------------------------------------------------------------

    def _wanted(
        self,
        line: Line | None,
        prompt: Prompt,
        draft: Draft,
        known: Conversation | None,
        reading: Reading | None,
    ) -> Wanted:
        locate: Locate = draft.located.get
        if reading is None or not draft.is_long:
            message_at = self.reader.message_at
            locate = cache(partial(message_at, draft=draft, prompt=prompt, known=known))
        return Wanted(
            line,
            prompt,
            draft.conversation,
            locate,
            draft.num_dropped_turns,
            draft.reply_prefix,
            draft.continuation.adapted,
        )


def _guard_of(reading: Reading | None) -> Guard:
    return unguarded if reading is None else Allowance()


def _history_of(agent: Agent) -> History:
    main = agent.main
    return History(
        main.messages or (),
        main.transcript,
        tuple(len(turn.messages) for turn in agent.turns if turn.messages is not None),
        agent.settings.overflow is Overflow.DROP_OLDEST,
    )
