"""What a request asks for: the line that it continues, its prompt and the length of its reply."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

from keepwarm.core.errors import AgentBusy, InvalidRequest
from keepwarm.core.layout import capacity_for
from keepwarm.core.policies import reply_room
from keepwarm.core.ports import LoadedModel
from keepwarm.core.stored import Overflow
from keepwarm.engine.agents.agent import Agent, Line
from keepwarm.engine.agents.book import AgentBook
from keepwarm.engine.agents.lines import Lines
from keepwarm.engine.prompt.continuation import Prompt
from keepwarm.engine.prompt.limits import PromptLimits, is_long
from keepwarm.engine.prompt.line_choice import KnownLine, choose_line
from keepwarm.engine.prompt.messages import Conversation
from keepwarm.engine.prompt.prompt_encoder import (
    EncodingBudget,
    Guard,
    TooMuchToEncode,
    unguarded,
)
from keepwarm.engine.prompt.prompt_reader import Draft, History, PromptReader, ReadElsewhere
from keepwarm.engine.requests import Asked, GenerateRequest, PromptSource
from keepwarm.kv.tiers import Tiers

Locate = Callable[[int], int | None]


@dataclass(frozen=True, slots=True)
class Reading:
    """For a thread that others wait for: a long prompt is read elsewhere, and comes as a draft."""

    draft: Draft | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A line to continue (None: a new one) with its prompt, and the conversation before the reply.

    `locate` gives the message that a token of the prompt lies in, None where that is unknown.
    `reply_prefix`: what the prompt already has of the reply. `adapted`: what was changed in the
    messages for this model, a short sentence for each change; the response names it. `is_appended`:
    the request brought the new messages only. `max_reply_tokens` and `priority` are the request's
    own, or what the context leaves and the agent's settings say.
    """

    line: Line | None
    prompt: Prompt
    max_reply_tokens: int
    priority: int
    conversation: Conversation | None
    locate: Locate
    num_dropped_turns: int
    reply_prefix: str
    adapted: tuple[str, ...]
    is_appended: bool


class Intake:
    """Decides about requests before anything is taken for them; changes nothing.

    `num_mended_spans` counts what a prompt would have said wrongly and was encoded anew: bugs.
    """

    def __init__(self, loaded: LoadedModel, book: AgentBook, lines: Lines, tiers: Tiers) -> None:
        self._book = book
        self._lines = lines
        self._tiers = tiers
        self.num_mended_spans = 0
        self._limits = PromptLimits.of(
            context_tokens=loaded.max_context_tokens,
            budget_bytes=tiers.pool.budget_bytes,
            block_bytes=loaded.layout.block_bytes,
            slab_bytes=tiers.slab_bytes,
        )
        self.reader = PromptReader(loaded.tokenizer, loaded.vocab_size, self._limits)

    def choose(self, asked: Asked, reading: Reading | None = None) -> Wanted:
        """Find the line that the request continues, and its prompt.

        With `reading`, a prompt that would take long raises ReadElsewhere; without, it is read
        here. Raises InvalidRequest (ContextTooLong, NeverFits), AgentBusy and UnknownAgent.
        """
        if asked.source.append is not None:
            agent = self._agent_to_append_to(asked)
            if agent.main.in_use:
                raise AgentBusy(agent.agent_id, "append to it")
            wanted = self._choose_main(agent, asked, reading)
        else:
            wanted = self._choose_line(asked, reading)
        self.num_mended_spans += wanted.prompt.num_mended
        return wanted

    def check_length(self, request: GenerateRequest, reading: Reading | None = None) -> None:
        """Refuse a prompt that is too long as things stand, also for a line that is in use.

        Raises what `choose` raises, but AgentBusy.
        """
        asked = request.checked()
        if asked.source.append is not None:
            self._choose_main(self._agent_to_append_to(asked), asked, reading)
        else:
            self._choose_line(asked, reading)

    def would_drop_turns(self, num_prompt_tokens: int) -> bool:
        """Whether a conversation that long is cut, or refused, when it goes on."""
        limit = self._limits.max_tokens
        return num_prompt_tokens + reply_room(limit, None) > limit

    def slab_bytes(self, num_tokens: int) -> int:
        """Return the bytes that a line of `num_tokens` tokens takes in memory."""
        return self._tiers.slab_bytes(capacity_for(num_tokens))

    # -- a whole prompt --------------------------------------------------------------------------

    def _choose_line(self, asked: Asked, reading: Reading | None) -> Wanted:
        source, named = asked.source, asked.agent_id is not None
        lines = self._lines.of(asked.agent_id, asked.namespace)
        known_lines = [KnownLine(line.transcript, line.messages, line.in_use) for line in lines]
        draft = reading.draft if reading is not None else None
        if draft is None and reading is not None and is_long(source):
            raise ReadElsewhere(self._to_prepare(source, known_lines, named, None))
        draft = draft or self.reader.read(source)
        draft.encoder.guard = _guard_of(reading)
        try:
            index, prompt = choose_line(known_lines, draft.continuation, named=named)
        except TooMuchToEncode:
            raise ReadElsewhere(self._to_prepare(source, known_lines, named, draft)) from None
        line = None if index is None else lines[index]
        known = None if line is None else line.messages
        return self._wanted(asked, line, prompt, draft, known, reading)

    def _to_prepare(
        self, source: PromptSource, lines: Sequence[KnownLine], named: bool, draft: Draft | None
    ) -> Callable[[Guard], Draft]:
        prepare = self.reader.prepare
        return lambda guard: prepare(source, lines, guard, named=named, draft=draft)

    # -- an agent that is sent its new messages only ---------------------------------------------

    def _agent_to_append_to(self, asked: Asked) -> Agent:
        if asked.agent_id is None:
            raise InvalidRequest("append", "needs an agent_id: only an agent has a history")
        agent = self._book.get(asked.agent_id)
        if agent.main.messages is None:
            raise InvalidRequest("append", "this agent's last prompt was not given as messages")
        return agent

    def _choose_main(self, agent: Agent, asked: Asked, reading: Reading | None) -> Wanted:
        source, max_tokens, history = asked.source, asked.max_tokens, _history_of(agent)
        elsewhere = ReadElsewhere(
            lambda guard: self.reader.prepare_append(history, source, max_tokens, guard)
        )
        draft = reading.draft if reading is not None else None
        if draft is not None and draft.history != history:
            draft = None  # another request has gone on with the line meanwhile
        if draft is None and reading is not None and is_long(source, history.messages):
            raise elsewhere
        guard = _guard_of(reading)
        try:
            draft = draft or self.reader.append(history, source, max_tokens, guard)
            draft.encoder.guard = guard
            prompt = draft.continuation.prompt_from(history.transcript)
        except TooMuchToEncode:
            raise elsewhere from None
        return self._wanted(asked, agent.main, prompt, draft, history.messages, reading)

    # -- inside ----------------------------------------------------------------------------------

    def _wanted(
        self,
        asked: Asked,
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
        self._limits.check(prompt.transcript.num_tokens)
        return Wanted(
            line=line,
            prompt=prompt,
            conversation=draft.conversation,
            locate=locate,
            num_dropped_turns=draft.num_dropped_turns,
            reply_prefix=draft.reply_prefix,
            adapted=(*asked.source.mended, *draft.continuation.adapted),
            is_appended=asked.source.append is not None,
            max_reply_tokens=self._reply_tokens(prompt, asked.max_tokens),
            priority=self._priority(asked),
        )

    def _reply_tokens(self, prompt: Prompt, max_tokens: int | None) -> int:
        """Return the reply's limit: what was asked for, within context and memory budget."""
        room = self._limits.max_tokens - prompt.transcript.num_tokens
        return room if max_tokens is None else min(max_tokens, room)

    def _priority(self, asked: Asked) -> int:
        if asked.priority is not None:
            return asked.priority
        agent = self._book.find(asked.agent_id) if asked.agent_id is not None else None
        return agent.settings.priority if agent is not None else 0


def _guard_of(reading: Reading | None) -> Guard:
    return unguarded if reading is None else EncodingBudget()


def _history_of(agent: Agent) -> History:
    main = agent.main
    return History(
        main.messages or (),
        main.transcript,
        tuple(len(turn.messages) for turn in agent.turns if turn.messages is not None),
        agent.settings.overflow is Overflow.DROP_OLDEST,
    )
