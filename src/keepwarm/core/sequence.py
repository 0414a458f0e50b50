"""A request on its way through the engine: what it wants and how far it has come."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from keepwarm.core.agent import AgentBlocks, Tier
from keepwarm.core.ports import GREEDY, RowId, Sampling


class Phase(StrEnum):
    """Where a sequence is. A preempted one waits again, with its reply so far."""

    WAITING = "waiting"
    RESTORING = "restoring"
    PREFILLING = "prefilling"
    DECODING = "decoding"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class TokenSequence:
    """One request's tokens. All but the last id get KV before the last one is fed to decode.

    `known_ids` are those that its line had before. A prefetch ends before it would decode, and
    before it would compute anything unless it may.
    """

    request_id: str
    agent_id: str | None
    arrival: int
    token_ids: list[int]
    num_prompt_tokens: int
    max_tokens: int
    sampling: Sampling
    priority: int
    blocks: AgentBlocks
    is_prefetch: bool = False
    may_compute: bool = True
    phase: Phase = Phase.WAITING
    row: RowId | None = None
    num_passed_over: int = 0
    num_preemptions: int = 0
    cached_tokens: int | None = None
    tier: Tier = Tier.NONE
    num_fetched: int = 0
    known_ids: Sequence[int] = ()
    submitted_s: float = 0.0
    admitted_s: float | None = None
    first_token_s: float | None = None
    restored_s: float = 0.0
    reply_ids: list[int] = field(default_factory=list)

    @property
    def target_tokens(self) -> int:
        """How many tokens must have KV before the next decode."""
        return len(self.token_ids) - 1

    @property
    def num_missing(self) -> int:
        return self.target_tokens - self.blocks.num_tokens

    @property
    def is_fetched(self) -> bool:
        """Whether it is a prefetch that has no more to do, now that its line is restored."""
        return self.is_prefetch and not (self.may_compute and self.num_missing)

    def append(self, token_id: int) -> None:
        self.token_ids.append(token_id)
        self.reply_ids.append(token_id)


def prefetch_sequence(
    number: int, blocks: AgentBlocks, token_ids: Sequence[int], *, may_compute: bool
) -> TokenSequence | None:
    """What brings a line's KV into a slab; None when it has none."""
    if len(token_ids) < 2:
        return None
    return TokenSequence(
        request_id=f"prefetch-{number}",
        agent_id=blocks.agent_id,
        arrival=number,
        token_ids=list(token_ids),
        num_prompt_tokens=len(token_ids),
        max_tokens=1,
        sampling=GREEDY,
        priority=-100,
        blocks=blocks,
        is_prefetch=True,
        may_compute=may_compute,
    )
