"""What a request tells its client while it runs, the same for every protocol."""

from dataclasses import dataclass
from enum import StrEnum

from keepwarm.core.agent import Tier


class FinishReason(StrEnum):
    """Why a reply ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts. `cached_tokens` of the prompt were not computed again."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class CacheReport:
    """Where the reused KV came from and why the rest was computed.

    `diverged_at` is the first prompt token whose KV was not there and `reason` says why: one of
    `engine.chat.Reason`, or "evicted" when the ids were known and their KV had gone. `message` is
    the message that this token lies in, None where the prompt was not given as messages.
    `restored_s` is the time spent copying blocks into the slab.
    """

    tier: Tier
    cached_tokens: int
    prompt_tokens: int
    diverged_at: int
    reason: str
    restored_s: float
    message: int | None = None


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds since the request arrived; `num_preemptions` of the request on its way."""

    queued_s: float
    first_token_s: float | None
    total_s: float
    num_preemptions: int


@dataclass(frozen=True, slots=True)
class Started:
    """The request has its row, and everything that was kept of its prompt is in place.

    `adapted`: what was changed in its messages for this model, a short sentence for each change.
    """

    request_id: str
    agent_id: str | None
    cache: CacheReport
    adapted: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Progress:
    """Prefill has computed the KV of `num_done` of the prompt's tokens."""

    request_id: str
    agent_id: str | None
    num_done: int
    num_total: int


@dataclass(frozen=True, slots=True)
class Delta:
    """Text that is certain, and the tokens that it completes."""

    request_id: str
    agent_id: str | None
    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Completed:
    """The reply, whole; `token_ids` without the stop token.

    `stop_sequence` is the stop string that ended it. `turn` is the number of the agent's turn that
    this was, where its main line took it. `num_dropped_turns` of a stateful agent were
    forgotten to make room. `durable`: the turn is on disk. It is not where there is no store, where
    the request was anonymous, and where the disk refused; then it is tried again. `adapted` is as
    in Started.
    """

    request_id: str
    agent_id: str | None
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    cache: CacheReport
    timing: Timing
    durable: bool = False
    stop_sequence: str | None = None
    num_dropped_turns: int = 0
    turn: int | None = None
    adapted: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Failed:
    """The request ended without a whole reply; `error` says why, `text` is what had been sent."""

    request_id: str
    agent_id: str | None
    error: Exception
    text: str


Event = Started | Progress | Delta | Completed | Failed
