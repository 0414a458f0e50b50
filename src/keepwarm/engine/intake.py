"""What a request asks for: the line that it continues, its prompt and the length of its reply."""

from collections.abc import Callable
from functools import cache

from keepwarm.core.errors import AgentBusy, ContextTooLong, InvalidRequest, NeverFits
from keepwarm.core.layout import BLOCK_TOKENS, capacity_for
from keepwarm.core.ports import LoadedModel, Message
from keepwarm.core.transcript import Transcript
from keepwarm.engine.agents import AgentBook, Choice
from keepwarm.engine.chat import Prompt, continue_ids, continue_line, validate_messages
from keepwarm.engine.requests import PromptSource, valid_priority, valid_text, valid_token_ids
from keepwarm.engine.tiers import Tiers


class Intake:
    """Decides about requests before anything is taken for them; changes nothing."""

    def __init__(self, loaded: LoadedModel, book: AgentBook, tiers: Tiers) -> None:
        self._loaded = loaded
        self._tokenizer = loaded.tokenizer
        self._book = book
        self._tiers = tiers

    def priority(self, agent_id: str | None, priority: int | None) -> int:
        """None is the agent's own."""
        if priority is not None:
            return valid_priority(priority)
        agent = self._book.find(agent_id) if agent_id is not None else None
        return agent.settings.priority if agent is not None else 0

    def choose(
        self, agent_id: str | None, source: PromptSource
    ) -> tuple[Choice, tuple[Message, ...] | None]:
        """The line to continue and its prompt, and the conversation where it is known."""
        if source.append is not None:
            return self._choose_main(agent_id, validate_messages(source.append))
        conversation = None if source.messages is None else validate_messages(source.messages)
        return self._book.choose(agent_id, self._prompt_maker(source, conversation)), conversation

    def reply_tokens(self, num_prompt_tokens: int, max_tokens: int | None) -> int:
        """How long the reply may be: as asked for, within the context and the memory budget."""
        context = self._loaded.max_context_tokens
        if num_prompt_tokens >= context:
            raise ContextTooLong(num_prompt_tokens=num_prompt_tokens, max_context_tokens=context)
        budget = self._tiers.pool.budget_bytes
        needed = self._slab_bytes(num_prompt_tokens + 1)
        if needed > budget:
            raise NeverFits(needed_bytes=needed, budget_bytes=budget)
        num_blocks = budget // self._loaded.layout.block_bytes
        while self._slab_bytes(num_blocks * BLOCK_TOKENS) > budget:
            num_blocks -= 1
        room = min(context, num_blocks * BLOCK_TOKENS) - num_prompt_tokens
        return room if max_tokens is None else min(max_tokens, room)

    def _choose_main(
        self, agent_id: str | None, new: tuple[Message, ...]
    ) -> tuple[Choice, tuple[Message, ...]]:
        if agent_id is None:
            raise InvalidRequest("append", "needs an agent_id: only an agent has a history")
        main = self._book.get(agent_id).main
        if main.in_use:
            raise AgentBusy(agent_id, "append to it")
        if main.messages is None:
            raise InvalidRequest("append", "this agent's last prompt was not given as messages")
        conversation = (*main.messages, *new)
        make_prompt = self._prompt_maker(PromptSource(messages=conversation), conversation)
        return Choice(main, make_prompt(main.transcript)), conversation

    def _prompt_maker(
        self, source: PromptSource, conversation: tuple[Message, ...] | None
    ) -> Callable[[Transcript], Prompt]:
        if source.token_ids is not None:
            ids = valid_token_ids(source.token_ids, self._loaded.vocab_size)
            return lambda known: continue_ids(known, ids)
        if conversation is not None:
            pieces = self._tokenizer.render(conversation)
        else:
            pieces = self._tokenizer.split(valid_text(source.text or ""))
        # Every line of the agent is asked, and most spans of the prompt are new to most of them.
        encode = cache(self._tokenizer.encode)
        return lambda known: continue_line(known, pieces, encode)

    def _slab_bytes(self, num_tokens: int) -> int:
        return self._tiers.generator.slab_bytes(capacity_for(num_tokens))
