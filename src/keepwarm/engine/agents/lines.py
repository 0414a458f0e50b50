"""The lines that requests run on: which there are, which is opened, and which becomes the main."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from keepwarm.core.ports import Message
from keepwarm.core.transcript import Receipt, Turn
from keepwarm.engine.agents.agent import Agent, Line, Place
from keepwarm.engine.agents.book import AgentBook


class Lines:
    """Owns one engine's anonymous lines, and opens, finds and drops those of its requests."""

    def __init__(
        self, book: AgentBook, place: Place, *, max_side_lines: int, max_anonymous_lines: int
    ) -> None:
        self._book = book
        self._place = place
        self._max_side_lines = max_side_lines
        self._max_anonymous_lines = max_anonymous_lines
        self.anonymous: list[Line] = []

    def __repr__(self) -> str:
        return f"Lines({len(self.anonymous)} anonymous, {self._place})"

    def of(self, agent_id: str | None, namespace: str = "") -> list[Line]:
        """Return the lines that a request may continue. `namespace` is for requests without an
        agent.

        A side line that has its ids in other tokenizers only has nothing to go on with.
        """
        if agent_id is None:
            return [line for line in self.anonymous if line.blocks.namespace == namespace]
        agent = self._book.find(agent_id)
        if agent is None:
            return []
        return [line for line in agent.lines if line is agent.main or not line.is_only_foreign]

    def open(self, agent_id: str | None, namespace: str = "") -> Line:
        """Return a new line: an anonymous one, the agent's main line, or a side line if it has
        that.
        """
        agent = None if agent_id is None else self._book.find(agent_id)
        if agent is not None:
            namespace = agent.main.blocks.namespace
        is_new = agent_id is not None and agent is None
        line = Line(self._place.tiers.new_line(agent_id, None if is_new else namespace))
        if agent is not None:
            line.number = 1 + max(other.number for other in agent.lines)
            line.opened = 1 + max(other.opened for other in agent.lines)
            agent.sides.append(line)
        elif agent_id is not None:
            self._book.add(Agent(agent_id, self._place, line, model=self._place.recorded_as))
        else:
            self.anonymous.append(line)
        return line

    def all(self) -> Iterator[Line]:
        """Yield the lines of all agents that are here, and the anonymous ones."""
        yield from self.anonymous
        for agent in self._book:
            if agent.place is self._place:
                yield from agent.lines

    def tidy(self, agent_id: str | None) -> None:
        """Drop the side or anonymous lines beyond their number that have rested the longest."""
        agent = self._book.here(agent_id)
        if agent_id is None:
            self._drop_oldest(self.anonymous, self._max_anonymous_lines)
        elif agent is not None:
            self._drop_oldest(agent.sides, self._max_side_lines)

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
        """Add a turn that has ended on this line, which had kept its first `num_kept` tokens.

        `is_appended`: only the new messages were sent, and what they follow is known here alone.
        """
        line.messages = messages
        agent = self._book.here(agent_id)
        if agent is None:
            return
        line.turns = [
            replace(turn, num_tokens=min(turn.num_tokens, num_kept))
            for turn in line.turns
            if 0 < turn.num_tokens <= num_kept or _begins_with(messages, turn.messages)
        ]
        line.turns.append(Turn(line.transcript.num_tokens, messages, receipt))
        agent.has_fixed_main |= is_appended
        elect_main(agent)
        if agent.main is line:
            agent.model = self._place.recorded_as
            agent.answered.add(self._place)

    def _drop_oldest(self, lines: list[Line], limit: int) -> None:
        idle = sorted((line for line in lines if not line.in_use), key=_last_used)
        for line in idle[: max(len(lines) - limit, 0)]:
            lines.remove(line)
            self._place.tiers.forget(line.blocks)
            for place, blocks in line.resting.items():
                place.tiers.forget(blocks)


def elect_main(agent: Agent) -> None:
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
    former.number, elected.number = elected.number, 0
    agent.place.tiers.pin(former.blocks, pinned=False)
    agent.place.tiers.pin(elected.blocks, pinned=agent.settings.pinned)


def history(messages: Sequence[Message] | None, reply_text: str) -> tuple[Message, ...] | None:
    """Return the conversation with the reply in it; None where the prompt was not messages."""
    if messages is None:
        return None
    return (*messages, {"role": "assistant", "content": reply_text})


def _last_used(line: Line) -> int:
    return line.blocks.last_used


def _begins_with(messages: tuple[Message, ...] | None, earlier: tuple[Message, ...] | None) -> bool:
    """Whether a turn is a part of the conversation; what is all of it is the same turn again.

    It is, with fewer of its tokens, where the template has stripped the turn's thinking.
    """
    if messages is None or earlier is None or len(earlier) >= len(messages):
        return False
    return messages[: len(earlier)] == tuple(earlier)
