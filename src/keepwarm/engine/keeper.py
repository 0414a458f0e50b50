"""Agents to and from the store: what is committed of them, and how they come back."""

from collections.abc import Callable
from dataclasses import replace

from keepwarm.core.agent import AgentBlocks
from keepwarm.core.agent_store import AgentStore
from keepwarm.core.block import BlockHash, chain_hashes
from keepwarm.core.layout import BLOCK_TOKENS, whole_blocks
from keepwarm.core.stored import AgentState, LineState
from keepwarm.engine.agents import Agent, Line


class AgentKeeper:
    """Writes agents to the store after every change, and reads them when they are asked for."""

    def __init__(
        self,
        store: AgentStore,
        *,
        tokenizer: str,
        root_of: Callable[[AgentBlocks], BlockHash],
        new_blocks: Callable[[str | None], AgentBlocks],
    ) -> None:
        self._store = store
        self._tokenizer = tokenizer
        self._root_of = root_of
        self._new_blocks = new_blocks

    def commit(self, agent: Agent) -> int:
        """The ticket of the commit, for the store's `Committed`."""
        return self._store.commit(self.state_of(agent))

    def state_of(self, agent: Agent) -> AgentState:
        """Of lines that run now, what they had before; of new ones nothing."""
        lines = [
            self._state_of_line(line, agent)
            for line in agent.lines
            if line is agent.main or line.transcript.num_tokens
        ]
        lines = sorted([*lines, *agent.foreign], key=lambda line: line.key)
        return AgentState(agent.agent_id, agent.settings, tuple(lines))

    def load(self, agent_id: str) -> Agent | None:
        state = self._store.load_agent(agent_id)
        return None if state is None else self.agent_of(state)

    def agent_of(self, state: AgentState) -> Agent:
        """The agent with its lines in this tokenizer's ids; without such, with what it said."""
        own = [line for line in state.lines if line.tokenizer == self._tokenizer]
        foreign = tuple(line for line in state.lines if line.tokenizer != self._tokenizer)
        mains = [line for line in own if line.number == 0]
        if not mains:
            return self._translated(state, foreign)
        main = self._line(mains[0], state.agent_id)
        main.blocks.pinned = state.settings.pinned
        sides = [self._line(line, state.agent_id) for line in own if line.number]
        turns = list(mains[0].turns)
        return Agent(state.agent_id, main, sides, turns, state.settings, foreign)

    def _translated(self, state: AgentState, foreign: tuple[LineState, ...]) -> Agent:
        """The main line's messages; their ids in this tokenizer come with the next prompt."""
        spoken = next(line for line in foreign if line.number == 0)
        main = Line(self._new_blocks(state.agent_id), messages=spoken.messages)
        main.blocks.pinned = state.settings.pinned
        turns = [replace(turn, num_tokens=0) for turn in spoken.turns]
        return Agent(state.agent_id, main, [], turns, state.settings, foreign)

    def _line(self, state: LineState, agent_id: str) -> Line:
        blocks = self._new_blocks(agent_id)
        blocks.namespace = state.namespace
        return Line(blocks, state.transcript, state.messages, number=state.number)

    def _state_of_line(self, line: Line, agent: Agent) -> LineState:
        return LineState(
            number=line.number,
            tokenizer=self._tokenizer,
            transcript=line.transcript,
            messages=line.messages,
            turns=tuple(agent.turns) if line is agent.main else (),
            block_hashes=self._block_hashes(line),
            last_used=line.blocks.last_used,
            namespace=line.blocks.namespace,
        )

    def _block_hashes(self, line: Line) -> tuple[BlockHash, ...]:
        """Of the transcript's whole blocks, in memory or not."""
        token_ids = line.transcript.token_ids
        blocks = line.blocks.blocks[: whole_blocks(len(token_ids))]
        if (
            tuple(line.blocks.token_ids[: len(blocks) * BLOCK_TOKENS])
            != token_ids[: len(blocks) * BLOCK_TOKENS]
        ):
            blocks = []
        known = [block.hash for block in blocks]
        parent = known[-1] if known else self._root_of(line.blocks)
        return (*known, *chain_hashes(parent, token_ids[len(known) * BLOCK_TOKENS :]))
