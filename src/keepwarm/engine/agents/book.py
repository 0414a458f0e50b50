"""Agents, their lines and turns: who said what, and which line a request continues."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from keepwarm.core.agent import AgentBlocks, Tier
from keepwarm.core.block import common_prefix
from keepwarm.core.errors import (
    AgentBusy,
    AgentExists,
    AgentLeaving,
    InvalidRequest,
    UnknownAgent,
)
from keepwarm.core.ports import Message
from keepwarm.core.stored import DEFAULT_SETTINGS, AgentSettings, AgentSummary, LineState
from keepwarm.core.transcript import EMPTY, Receipt, Transcript, Turn
from keepwarm.engine.prompt.messages import opening


@dataclass(slots=True, eq=False)
class Line:
    """One token stream: its text and ids, its messages where they are known, its turns, its KV.

    Number 0 is the agent's main line. `opened` orders the agent's lines by when they began.
    """

    blocks: AgentBlocks
    transcript: Transcript = EMPTY
    messages: tuple[Message, ...] | None = ()
    in_use: bool = False
    number: int = 0
    opened: int = 0
    turns: list[Turn] = field(default_factory=list)

    def num_held(self, num_tokens: int | None = None) -> int:
        """How many of the conversation's first tokens the line's KV really is of.

        Of its first `num_tokens`, where those are given. A request that failed or was cancelled may
        have left the KV of another continuation.
        """
        return common_prefix(self.blocks.token_ids, self.transcript.token_ids[:num_tokens])


@dataclass(slots=True, eq=False)
class Agent:
    """A named conversation: a main line, and side lines of requests that ran beside it.

    `has_fixed_main`: messages were appended to its main line, which stays the main line.
    `foreign` are its lines in the ids of other tokenizers, kept as they were committed. `has_left`:
    another engine has the agent as it is now, or has deleted it. `model`: the name of the one that
    it talked to last; empty for the server's default one. `has_answered`: this engine has, since it
    was opened. `is_leaving`: its deletion is on its way to the disk, and nothing may change it.
    """

    agent_id: str
    main: Line
    sides: list[Line] = field(default_factory=list)
    settings: AgentSettings = DEFAULT_SETTINGS
    foreign: tuple[LineState, ...] = ()
    has_left: bool = False
    model: str = ""
    has_answered: bool = False
    is_leaving: bool = False
    has_fixed_main: bool = False

    @property
    def turns(self) -> list[Turn]:
        """Those of the main line."""
        return self.main.turns

    @property
    def lines(self) -> list[Line]:
        return [self.main, *self.sides]

    @property
    def in_use(self) -> bool:
        return self.is_leaving or any(line.in_use for line in self.lines)

    def after_turn(self, turn: int | None) -> tuple[int, tuple[Message, ...] | None]:
        """Tokens and messages after so many turns; None: all. Raises InvalidRequest."""
        if turn is None:
            return self.main.transcript.num_tokens, self.main.messages
        if not 0 <= turn <= len(self.turns):
            raise InvalidRequest("turn", f"{turn} is not from 0 to {len(self.turns)}")
        if turn == 0:
            return 0, opening(self.main.messages)
        end = self.turns[turn - 1]
        return end.num_tokens, end.messages


@dataclass(frozen=True, slots=True)
class AgentView:
    """An agent as people see it. `num_tokens` is its context, `held_tokens` what needs no prefill.

    `slab_bytes` is 0 unless it is hot; bytes of shared blocks are the pool's affair. One that is
    not here is on disk only, and what that holds of it is still to be counted.
    `is_private`: it was imported, and its KV is not verified yet. `model`: as an agent's. `damage`:
    why it cannot be read; what else is said of it means nothing then.
    """

    agent_id: str
    tier: Tier
    num_tokens: int
    held_tokens: int
    slab_bytes: int
    num_turns: int
    num_side_lines: int
    in_use: bool
    pinned: bool
    is_private: bool = False
    model: str = ""
    damage: str = ""
    is_here: bool = True

    def holding(self, num_stored: int) -> "AgentView":
        """With what the disk holds of it."""
        tier = Tier.COLD if num_stored else Tier.NONE
        return replace(self, tier=tier, held_tokens=num_stored)


class Pin(Protocol):
    def __call__(self, line: AgentBlocks, *, pinned: bool) -> None: ...


class AgentBook:
    """Owns agents and lines. Blocks belong to the tiers; `new_blocks` and `forget` reach them.

    An agent that is not here is asked of `load` before it counts as unknown; that raises
    DamagedAgent for one that cannot be read. `give_way` ends what goes on with an agent though no
    request of it runs.
    """

    def __init__(
        self,
        *,
        new_blocks: Callable[[str | None, str | None], AgentBlocks],
        forget: Callable[[AgentBlocks], None],
        pin: Pin,
        load: Callable[[str], Agent | None],
        give_way: Callable[[str], None] = lambda agent_id: None,
        max_side_lines: int,
        max_anonymous_lines: int,
        model: str = "",
    ) -> None:
        self._new_blocks = new_blocks
        self._forget = forget
        self._pin = pin
        self._load = load
        self.give_way = give_way
        self._max_side_lines = max_side_lines
        self._max_anonymous_lines = max_anonymous_lines
        self._model = model
        self._agents: dict[str, Agent] = {}
        self._anonymous: list[Line] = []

    def __repr__(self) -> str:
        return f"AgentBook({len(self._agents)} agents, {len(self._anonymous)} anonymous lines)"

    def __contains__(self, agent_id: str) -> bool:
        return self.find(agent_id) is not None

    def __iter__(self) -> Iterator[Agent]:
        return iter(self._agents.values())

    def get(self, agent_id: str) -> Agent:
        """Raises UnknownAgent."""
        agent = self.find(agent_id)
        if agent is None:
            raise UnknownAgent(agent_id)
        return agent

    def get_staying(self, agent_id: str) -> Agent:
        """Raises UnknownAgent, and AgentLeaving while it is being deleted."""
        self.check_stays(agent_id)
        return self.get(agent_id)

    def check_stays(self, agent_id: str | None) -> None:
        """Raises AgentLeaving while the agent is being deleted."""
        agent = self._agents.get(agent_id) if agent_id is not None else None
        if agent is not None and agent.is_leaving:
            raise AgentLeaving(agent.agent_id)

    def get_idle(self, agent_id: str, action: str) -> Agent:
        """Raises UnknownAgent, and AgentBusy while one of its lines runs or it is deleted.

        What goes on beside, though no request runs, gives way.
        """
        agent = self.get_staying(agent_id)
        if agent.in_use:
            raise AgentBusy(agent_id, action)
        self.give_way(agent_id)
        return agent

    def check_is_new(self, agent_id: str | None) -> None:
        """Raises AgentExists."""
        if agent_id is not None and agent_id in self:
            raise AgentExists(agent_id)

    def find(self, agent_id: str) -> Agent | None:
        agent = self._agents.get(agent_id)
        if agent is None:
            agent = self._load(agent_id)
            if agent is not None:
                self._agents[agent_id] = agent
        return agent

    def is_here(self, agent_id: str) -> bool:
        """Whether it is in memory."""
        return agent_id in self._agents

    def lines_of(self, agent_id: str | None, namespace: str = "") -> list[Line]:
        """`namespace` is for those who give no name."""
        if agent_id is None:
            return [line for line in self._anonymous if line.blocks.namespace == namespace]
        agent = self.find(agent_id)
        return agent.lines if agent else []

    def open_line(self, agent_id: str | None, namespace: str = "") -> Line:
        """A new line: an anonymous one, the agent's main line, or a side line if it has that."""
        agent = None if agent_id is None else self.find(agent_id)
        if agent is not None:
            namespace = agent.main.blocks.namespace
        is_home = agent_id is not None and agent is None
        line = Line(self._new_blocks(agent_id, None if is_home else namespace))
        if agent_id is None:
            self._anonymous.append(line)
        elif agent is not None:
            line.number = 1 + max(other.number for other in agent.lines)
            line.opened = 1 + max(other.opened for other in agent.lines)
            agent.sides.append(line)
        else:
            self._agents[agent_id] = Agent(agent_id, line, model=self._model)
        return line

    def add(self, agent: Agent) -> Agent:
        self._agents[agent.agent_id] = agent
        return agent

    def remove(self, agent_id: str) -> None:
        """Raises UnknownAgent."""
        for line in self.get(agent_id).lines:
            self._forget(line.blocks)
        del self._agents[agent_id]

    def hand_over(self, old: Agent, new: Agent) -> None:
        """The KV of the agent's lines goes to the lines that it is most of, or is given up."""
        formers = old.lines
        for line in new.lines:
            former = _closest(line, formers)
            if former is not None:
                formers.remove(former)
                self._forget(line.blocks)
                line.blocks = former.blocks
        for former in formers:
            self._forget(former.blocks)
        self._pin(new.main.blocks, pinned=new.settings.pinned)
        new.has_answered = old.has_answered

    def tidy(self, agent_id: str | None) -> None:
        """Drop the longest idle side or anonymous lines beyond their number."""
        if agent_id is None:
            self._drop_oldest(self._anonymous, self._max_anonymous_lines)
        elif agent_id in self._agents:
            self._drop_oldest(self._agents[agent_id].sides, self._max_side_lines)

    def record_turn(
        self,
        agent_id: str | None,
        line: Line,
        num_kept: int,
        messages: tuple[Message, ...] | None,
        receipt: Receipt | None = None,
        *,
        is_appended: bool = False,
    ) -> None:
        """A turn has ended on this line, which had kept its first `num_kept` tokens.

        `is_appended`: only the new messages were sent, and what they follow is known here alone.
        """
        line.messages = messages
        agent = self._agents.get(agent_id) if agent_id is not None else None
        if agent is None:
            return
        line.turns = [
            replace(turn, num_tokens=min(turn.num_tokens, num_kept))
            for turn in line.turns
            if 0 < turn.num_tokens <= num_kept or _begins_with(messages, turn.messages)
        ]
        line.turns.append(Turn(line.transcript.num_tokens, messages, receipt))
        agent.has_fixed_main |= is_appended
        elect_main(agent, self._pin)
        if agent.main is line:
            agent.model = self._model
            agent.has_answered = True

    def view(self, agent: Agent, stored_tokens: Callable[[Sequence[int]], int]) -> AgentView:
        """`stored_tokens`: how many of a line's first ids the store has the KV of."""
        blocks = agent.main.blocks
        token_ids = agent.main.transcript.token_ids
        num_held = blocks.num_tokens
        num_stored = 0 if num_held >= len(token_ids) - 1 else stored_tokens(token_ids)
        return AgentView(
            agent_id=agent.agent_id,
            tier=Tier.COLD if num_stored > num_held else blocks.tier,
            num_tokens=len(token_ids),
            held_tokens=max(num_held, num_stored),
            slab_bytes=blocks.slab.nbytes if blocks.slab else 0,
            num_turns=len(agent.turns),
            num_side_lines=len(agent.sides),
            in_use=agent.in_use,
            pinned=blocks.pinned,
            is_private=blocks.is_private,
            model=agent.model,
        )

    def _drop_oldest(self, lines: list[Line], limit: int) -> None:
        idle = sorted((line for line in lines if not line.in_use), key=_last_used)
        for line in idle[: max(len(lines) - limit, 0)]:
            lines.remove(line)
            self._forget(line.blocks)


def elect_main(agent: Agent, pin: Pin) -> None:
    """Make the conversation the main line: of the lines that went on, the one that began first.

    A client that asks for a title first, under the name of the conversation, opens the line of the
    title before that of the conversation, and never comes back to it. A main line to which messages
    were appended stays: its history is known here alone.
    """
    went_on = [line for line in agent.lines if len(line.turns) > 1]
    if agent.has_fixed_main or not went_on:
        return
    elected, former = min(went_on, key=lambda line: line.opened), agent.main
    if elected is former or former.in_use:
        return
    agent.sides[agent.sides.index(elected)] = former
    agent.main = elected
    agent.foreign = _renumbered(agent.foreign, elected.number)
    former.number, elected.number = elected.number, 0
    pin(former.blocks, pinned=False)
    pin(elected.blocks, pinned=agent.settings.pinned)


def _renumbered(lines: Sequence[LineState], number: int) -> tuple[LineState, ...]:
    """In the ids of other tokenizers, too, the line of this number is the main line now."""
    numbers = {0: number, number: 0}
    return tuple(replace(line, number=numbers.get(line.number, line.number)) for line in lines)


def _closest(line: Line, formers: Sequence[Line]) -> Line | None:
    """Whose KV is of the most of the line's tokens; of none, that of the same number."""

    def likeness(former: Line) -> tuple[int, bool]:
        num_shared = common_prefix(former.blocks.token_ids, line.transcript.token_ids)
        return num_shared, former.number == line.number

    closest = max(formers, key=likeness, default=None)
    return closest if closest is not None and any(likeness(closest)) else None


def view_of_summary(summary: AgentSummary) -> AgentView:
    """An agent that is only on disk."""
    return AgentView(
        agent_id=summary.agent_id,
        tier=Tier.COLD,
        num_tokens=summary.num_tokens,
        held_tokens=0,
        slab_bytes=0,
        num_turns=summary.num_turns,
        num_side_lines=summary.num_lines - 1,
        in_use=False,
        pinned=summary.settings.pinned,
        is_private=summary.is_private,
        model=summary.model,
        is_here=False,
        damage=summary.damage,
    )


def _last_used(line: Line) -> int:
    return line.blocks.last_used


def _begins_with(messages: tuple[Message, ...] | None, earlier: tuple[Message, ...] | None) -> bool:
    """Whether a turn is a part of the conversation; what is all of it is the same turn again.

    It is, with fewer of its tokens, where the template has stripped the turn's thinking.
    """
    if messages is None or earlier is None or len(earlier) >= len(messages):
        return False
    return messages[: len(earlier)] == tuple(earlier)


def history(messages: Sequence[Message] | None, reply_text: str) -> tuple[Message, ...] | None:
    """The conversation with the reply in it; None when the prompt was not given as messages."""
    if messages is None:
        return None
    return (*messages, {"role": "assistant", "content": reply_text})
