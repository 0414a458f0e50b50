"""Agents to and from the store: what is committed of them, and how they come back."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from keepwarm.core.agent import AgentBlocks
from keepwarm.core.agent_store import AgentLog
from keepwarm.core.block import BlockHash, chain_hashes
from keepwarm.core.layout import BLOCK_TOKENS, whole_blocks
from keepwarm.core.stored import AgentState, LineState
from keepwarm.core.transcript import Turn
from keepwarm.engine.agents.book import Agent, Line, Pin


class AgentStates:
    """Writes agents to the store after every change, and reads them when they are asked for."""

    def __init__(
        self,
        store: AgentLog,
        *,
        tokenizer: str,
        root_of: Callable[[AgentBlocks], BlockHash],
        new_blocks: Callable[[str | None, str | None], AgentBlocks],
        pin: Pin,
    ) -> None:
        self._store = store
        self._tokenizer = tokenizer
        self._root_of = root_of
        self._new_blocks = new_blocks
        self._pin = pin

    def state_of(self, agent: Agent) -> AgentState:
        """Of lines that run now, what they had before; of new ones nothing."""
        lines = [
            self._state_of_line(line)
            for line in agent.lines
            if line is agent.main or line.transcript.num_tokens
        ]
        lines = sorted([*lines, *agent.foreign], key=lambda line: line.key)
        return AgentState(
            agent.agent_id,
            agent.settings,
            tuple(lines),
            agent.model,
            has_fixed_main=agent.has_fixed_main,
        )

    def load(self, agent_id: str) -> Agent | None:
        state = self._store.load_agent(agent_id)
        return None if state is None else self.agent_of(state)

    def agent_of(self, state: AgentState) -> Agent:
        """The agent with its lines in this tokenizer's ids, and with what it said last in any.

        What was said in another tokenizer's gets its ids in this one with the next prompt.
        """
        own = [line for line in state.lines if line.tokenizer == self._tokenizer]
        foreign = tuple(line for line in state.lines if line.tokenizer != self._tokenizer)
        last = max(state.mains, key=lambda line: (line.last_used, len(line.turns)))
        mains = [line for line in own if line.number == 0]
        main = (
            self._line(mains[0], state.agent_id)
            if mains
            else Line(self._new_blocks(state.agent_id, None))
        )
        main.messages = last.messages
        self._pin(main.blocks, pinned=state.settings.pinned)
        sides = [self._line(line, state.agent_id) for line in own if line.number]
        main.turns = _translated(last.turns, mains[0].turns if mains else ())
        return Agent(
            state.agent_id,
            main,
            sides,
            state.settings,
            foreign,
            model=state.model,
            has_fixed_main=state.has_fixed_main,
        )

    def _line(self, state: LineState, agent_id: str) -> Line:
        return Line(
            self._new_blocks(agent_id, state.namespace),
            state.transcript,
            state.messages,
            number=state.number,
            opened=state.number,
            turns=list(state.turns),
        )

    def _state_of_line(self, line: Line) -> LineState:
        return LineState(
            number=line.number,
            tokenizer=self._tokenizer,
            transcript=line.transcript,
            messages=line.messages,
            turns=tuple(line.turns),
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


def _translated(turns: Sequence[Turn], own: Sequence[Turn]) -> list[Turn]:
    """The turns, with the number of tokens that they have in this tokenizer, where it had them."""
    known = [*own, *[None] * (len(turns) - len(own))]
    return [
        turn
        if turn == mine
        else replace(turn, num_tokens=mine.num_tokens if mine and _agree(turn, mine) else 0)
        for turn, mine in zip(turns, known, strict=False)
    ]


def _agree(a: Turn, b: Turn) -> bool:
    return a.messages is not None and a.messages == b.messages
