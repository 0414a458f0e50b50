"""Answers of the agents API, as its description shows them and as they are encoded."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from keepwarm.core.agent import Tier
from keepwarm.core.events import Completed, FinishReason, Timing, Usage
from keepwarm.core.stored import AgentSettings, Overflow
from keepwarm.core.transcript import Turn
from keepwarm.engine.agents.agent_view import AgentView
from keepwarm.kv.verifier import VerifyReport
from keepwarm.server.problems import Kind
from keepwarm.server.reply.cache_report import CacheFields
from keepwarm.server.reply.facts import notes_of


@dataclass(frozen=True, slots=True)
class AgentCard:
    """An agent at one moment.

    `context_tokens`: the length of its conversation, of which `held_tokens` need no prefill.
    `slab_bytes` is 0 unless it is hot. `model`: the one that it talked to last. `private`: it was
    imported, and no other agent reuses its KV before it is verified. `damage`: why it cannot be
    read from the disk; it can be listed, exported as far as it can be read, and deleted.
    """

    id: str
    model: str
    tier: Tier
    context_tokens: int
    held_tokens: int
    slab_bytes: int
    num_turns: int
    num_side_lines: int
    running: bool
    pinned: bool
    private: bool
    damage: str | None


@dataclass(frozen=True, slots=True)
class AgentDetails(AgentCard):
    """An agent with its settings and its system prompt.

    `durable`: the disk has all of it, or, in the answer to a change, that change. What it refused
    is kept in memory and tried again.
    """

    durable: bool
    system: str | None
    priority: int
    overflow: Overflow
    kv_policy: str
    quota_bytes: int | None


@dataclass(frozen=True, slots=True)
class AgentPage:
    """Agents by name; with `has_more`, ask again with the last name as `after`."""

    agents: Sequence[AgentCard]
    has_more: bool


@dataclass(frozen=True, slots=True)
class AgentDeleted:
    """The agent is gone, from the disk as well."""

    id: str
    deleted: bool = True


@dataclass(frozen=True, slots=True)
class AgentMessage:
    """The message that the agent answered with."""

    content: str
    role: str = "assistant"


@dataclass(frozen=True, slots=True)
class AgentReply:
    """A reply of an agent; `turn` null where it is not one of its turns.

    `dropped_turns`: how many were forgotten to make room. `durable`: the turn is on the disk.
    `adapted`: what was changed in the messages so that this model could read them.
    """

    id: str
    agent: str
    turn: int | None
    message: AgentMessage
    finish_reason: FinishReason
    stop_sequence: str | None
    usage: Usage
    cache: CacheFields
    timing: Timing
    dropped_turns: int
    durable: bool
    adapted: Sequence[str]

    @classmethod
    def of(cls, end: Completed, shown: str) -> "AgentReply":
        return cls(
            id=end.request_id,
            agent=shown,
            turn=end.turn,
            message=AgentMessage(end.text),
            finish_reason=end.finish_reason,
            stop_sequence=end.stop_sequence,
            usage=end.usage,
            cache=CacheFields.of(end.cache),
            timing=end.timing,
            dropped_turns=end.num_dropped_turns,
            durable=end.durable,
            adapted=notes_of(end.adapted),
        )


@dataclass(frozen=True, slots=True)
class TurnCard:
    """A turn with the messages that it added; null where only token ids are known.

    Where the conversation does not continue the turn before, all its messages are listed.
    """

    turn: int
    context_tokens: int
    messages: Sequence[dict[str, Any]] | None

    @classmethod
    def of(cls, number: int, turn: Turn, before: Turn | None) -> "TurnCard":
        messages = None if turn.messages is None else [dict(m) for m in turn.messages]
        earlier = (
            [] if before is None or before.messages is None else [dict(m) for m in before.messages]
        )
        if messages is not None and messages[: len(earlier)] == earlier:
            messages = messages[len(earlier) :]
        return cls(number, turn.num_tokens, messages)


@dataclass(frozen=True, slots=True)
class AgentTurns:
    """The turns of the agent's main line, first to last."""

    agent: str
    turns: Sequence[TurnCard]


@dataclass(frozen=True, slots=True)
class AgentVerified:
    """The agent's KV compared with a cold run's.

    Blocks that differ by more than `bound` were dropped. `became_shared`: the agent was imported,
    and from now on others may reuse its KV; `durable`: the disk has that as well.
    """

    agent: str
    passed: bool
    context_tokens: int
    compared_tokens: int
    largest_difference: float
    bound: float
    differing_blocks: Sequence[int]
    became_shared: bool
    durable: bool

    @classmethod
    def of(cls, report: VerifyReport, shown: str) -> "AgentVerified":
        return cls(
            agent=shown,
            passed=report.passed,
            context_tokens=report.num_tokens,
            compared_tokens=report.num_compared,
            largest_difference=report.largest,
            bound=report.bound,
            differing_blocks=report.differing,
            became_shared=report.became_shared,
            durable=report.is_durable,
        )


@dataclass(frozen=True, slots=True)
class AgentError:
    """What is wrong, for programs and for people; `param` is the field that it is about."""

    type: Kind
    message: str
    param: str | None


@dataclass(frozen=True, slots=True)
class AgentErrorBody:
    """A request that was not answered."""

    error: AgentError


def card_of(view: AgentView, shown: str, *, default_model: str) -> AgentCard:
    """Describe the agent under the name by which its caller knows it."""
    return AgentCard(
        id=shown,
        model=view.model or default_model,
        tier=view.tier,
        context_tokens=view.num_tokens,
        held_tokens=view.held_tokens,
        slab_bytes=view.slab_bytes,
        num_turns=view.num_turns,
        num_side_lines=view.num_side_lines,
        running=view.in_use,
        pinned=view.pinned,
        private=view.is_private,
        damage=view.damage or None,
    )


def details_of(
    card: AgentCard, settings: AgentSettings, system: str | None, *, durable: bool
) -> AgentDetails:
    """Add to the card what is shown of a single agent."""
    return AgentDetails(
        **{field.name: getattr(card, field.name) for field in fields(card)},
        durable=durable,
        system=system,
        priority=settings.priority,
        overflow=settings.overflow,
        kv_policy=settings.policy,
        quota_bytes=settings.quota_bytes,
    )
