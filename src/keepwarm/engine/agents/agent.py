"""An agent: what was said on its lines, once, and its ids and KV for each of its models."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from keepwarm.core.agent import AgentBlocks
from keepwarm.core.block import common_prefix
from keepwarm.core.errors import InvalidRequest, InvariantBroken
from keepwarm.core.ports import Message
from keepwarm.core.stored import DEFAULT_SETTINGS, AgentSettings, LineState
from keepwarm.core.transcript import EMPTY, Transcript, Turn
from keepwarm.engine.prompt.messages import opening
from keepwarm.kv.tiers import Tiers


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """One model as agents see it: its tokenizer, and the memory of the KV that it computes.

    `recorded_as` is the model's name in what is committed, empty for a server's default one.
    `give_way` ends what goes on beside the requests for the agent of that name.
    """

    model: str
    recorded_as: str
    tokenizer: str
    tiers: Tiers
    give_way: Callable[[str], None]

    def __repr__(self) -> str:
        return f"Place({self.model})"


@dataclass(slots=True, eq=False)
class Line:
    """One token stream: its messages and turns, and its ids and KV where its agent is.

    Number 0 is the agent's main line. `opened` orders the agent's lines by when they began.
    `messages` is None where the last prompt was not given as messages. `resting` is its KV in other
    models' memory. `foreign` are its ids in other tokenizers, as they were when it left those.
    """

    blocks: AgentBlocks
    transcript: Transcript = EMPTY
    messages: tuple[Message, ...] | None = ()
    in_use: bool = False
    number: int = 0
    opened: int = 0
    turns: list[Turn] = field(default_factory=list)
    resting: dict[Place, AgentBlocks] = field(default_factory=dict)
    foreign: dict[str, LineState] = field(default_factory=dict)

    @property
    def is_only_foreign(self) -> bool:
        """Whether all that was said on it was said to models of other tokenizers."""
        return bool(self.foreign) and not self.transcript.num_tokens

    def num_held(self, num_tokens: int | None = None) -> int:
        """Return how many of the conversation's first tokens have their KV in `blocks`.

        `num_tokens` limits the conversation to its first tokens. The blocks may hold the KV of
        another continuation, which a request that failed or was cancelled has left.
        """
        return common_prefix(self.blocks.token_ids, self.transcript.token_ids[:num_tokens])


@dataclass(slots=True, eq=False)
class Agent:
    """A named conversation: a main line, and side lines of requests that ran beside it.

    It is at one `place`, that of the model that it talks to, or talked to last. `model` is the name
    of the model that ended its last turn, as it is recorded. `answered`: where it has had a turn
    since that model's engine was made. `has_fixed_main`: messages were appended to its main line,
    which stays the main line. `is_leaving`: its deletion is on its way to the disk, and nothing may
    change it; `is_deleted`: that is done.
    """

    agent_id: str
    place: Place
    main: Line
    sides: list[Line] = field(default_factory=list)
    settings: AgentSettings = DEFAULT_SETTINGS
    model: str = ""
    answered: set[Place] = field(default_factory=set)
    has_fixed_main: bool = False
    is_leaving: bool = False
    is_deleted: bool = False

    @property
    def turns(self) -> list[Turn]:
        """The main line's."""
        return self.main.turns

    @property
    def lines(self) -> list[Line]:
        return [self.main, *self.sides]

    @property
    def in_use(self) -> bool:
        return self.is_leaving or any(line.in_use for line in self.lines)

    @property
    def last_used(self) -> int:
        """When the agent was used last; it orders agents."""
        return max(line.blocks.last_used for line in self.lines)

    def after_turn(self, turn: int | None) -> tuple[int, tuple[Message, ...] | None]:
        """Return how many tokens and which messages it had after `turn` turns (None: after all).

        Raises InvalidRequest.
        """
        if turn is None:
            return self.main.transcript.num_tokens, self.main.messages
        if not 0 <= turn <= len(self.turns):
            raise InvalidRequest("turn", f"{turn} is not from 0 to {len(self.turns)}")
        if turn == 0:
            return 0, opening(self.main.messages)
        end = self.turns[turn - 1]
        return end.num_tokens, end.messages

    def holdings(self) -> Iterator[tuple[Place, AgentBlocks]]:
        """Yield all KV of the agent, in the memory of every model."""
        for line in self.lines:
            yield self.place, line.blocks
            yield from line.resting.items()

    def check(self) -> None:
        """Check that the agent is at one place, and that all KV of its lines is its own."""
        numbers = [line.number for line in self.lines]
        if self.main.number != 0 or len(set(numbers)) != len(numbers):
            raise InvariantBroken(f"{self.agent_id}: its lines have the numbers {numbers}")
        for line in self.lines:
            line.transcript.check()
            if self.place in line.resting or self.place.tokenizer in line.foreign:
                raise InvariantBroken(f"{self.agent_id}: is at {self.place}, and rests there")
        for place, blocks in self.holdings():
            if blocks.agent_id != self.agent_id or not place.tiers.has_line(blocks):
                raise InvariantBroken(f"{self.agent_id}: line {blocks.line} is not at {place}")
