"""One request or prefetch as the batch sees it: its token ids, and how far they have come."""

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
    """The ids of a prompt and of its reply. All but the last get KV before the next decode.

    The batch writes it while it runs: it appends each sampled token, and others read. `known_ids`
    are the ids that its line had before. A prefetch (`is_prefetch`) ends before it would decode,
    and before it would compute anything unless it `may_compute`.
    """

    request_id: str
    agent_id: str | None
    arrival: int
    prompt_ids: Sequence[int]
    max_tokens: int
    sampling: Sampling
    priority: int
    blocks: AgentBlocks
    is_prefetch: bool = False
    may_compute: bool = True
    phase: Phase = Phase.WAITING
    row: RowId | None = None
    num_passed_over: int = 0
    """How many later arrivals were admitted before it."""
    num_overtaken: int = 0
    """How many tokens of later arrivals were prefilled while it waited for its own."""
    num_preemptions: int = 0
    cached_tokens: int | None = None
    tier: Tier = Tier.NONE
    num_fetched: int = 0
    known_ids: Sequence[int] = ()
    submitted_s: float = 0.0
    admitted_s: float | None = None
    restored_s: float = 0.0
    _token_ids: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self._token_ids = list(self.prompt_ids)

    @property
    def token_ids(self) -> Sequence[int]:
        """The ids of the prompt and, behind them, of the reply so far."""
        return self._token_ids

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_ids)

    @property
    def num_reply_tokens(self) -> int:
        """How many tokens were sampled so far, a stop token included."""
        return len(self._token_ids) - len(self.prompt_ids)

    @property
    def num_to_come(self) -> int:
        """How many tokens the reply may still get."""
        return self.max_tokens - self.num_reply_tokens

    @property
    def target_tokens(self) -> int:
        """How many tokens must have KV before the next decode."""
        return len(self._token_ids) - 1

    @property
    def num_missing(self) -> int:
        """How many of those lack it."""
        return len(self._token_ids) - 1 - self.blocks.num_tokens

    @property
    def is_fetched(self) -> bool:
        """Whether it is a prefetch that has no more to do, now that its line is restored."""
        return self.is_prefetch and not (self.may_compute and self.num_missing)

    def note_cached(self, num_tokens: int, tier: Tier) -> None:
        """Count tokens that were found after the admission and need not be computed.

        Not after a preemption: then they are the sequence's own, computed before it.
        """
        if not self.num_preemptions and self.cached_tokens is not None:
            self.cached_tokens += num_tokens
            self.tier = tier

    def append(self, token_id: int) -> None:
        """Add a sampled token to the reply. Only the batch does."""
        self._token_ids.append(token_id)


def prefetch_sequence(
    number: int,
    blocks: AgentBlocks,
    token_ids: Sequence[int],
    *,
    known_ids: Sequence[int],
    may_compute: bool,
) -> TokenSequence | None:
    """Return a sequence that brings a line's KV into a slab; None where there is none to bring."""
    if len(token_ids) < 2:
        return None
    return TokenSequence(
        request_id=f"prefetch-{number}",
        agent_id=blocks.agent_id,
        arrival=number,
        prompt_ids=token_ids,
        max_tokens=1,
        sampling=GREEDY,
        priority=-100,
        blocks=blocks,
        is_prefetch=True,
        may_compute=may_compute,
        known_ids=known_ids,
    )
