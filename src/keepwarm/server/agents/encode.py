"""From the engine's events to the agents API's, and problems with the field that they are about."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import msgspec

from keepwarm.core.events import Completed, Delta, Event, Progress, Started
from keepwarm.core.stored import AgentSettings
from keepwarm.core.transcript import Turn
from keepwarm.engine.agents import AgentView
from keepwarm.engine.bundles import ImportSummary
from keepwarm.engine.verifying import VerifyReport
from keepwarm.server.cache_report import fields_of
from keepwarm.server.problems import Problem

_encode = msgspec.json.Encoder().encode


class AgentEncoder:
    """A reply of an agent: events that have names, and one document."""

    def __init__(self, agent: str) -> None:
        self._agent = agent

    def event(self, choice: int, event: Event) -> bytes:
        if isinstance(event, Delta):
            return _frame("delta", {"text": event.text}) if event.text else b""
        if isinstance(event, Progress):
            return _frame(
                "progress", {"done_tokens": event.num_done, "total_tokens": event.num_total}
            )
        if isinstance(event, Started):
            return _frame("started", {"agent": self._agent, "cache": fields_of(event.cache)})
        if isinstance(event, Completed):
            return _frame("completed", self._document(event))
        return b""

    def finish(self) -> bytes:
        return b""

    def failed(self, problem: Problem) -> bytes:
        return b"event: error\ndata: " + error_body(problem) + b"\n\n"

    def whole(self, ends: Sequence[Completed]) -> bytes:
        return _encode(self._document(ends[0]))

    def _document(self, end: Completed) -> dict[str, Any]:
        timing = asdict(end.timing)
        return {
            "id": end.request_id,
            "agent": self._agent,
            "turn": end.turn,
            "message": {"role": "assistant", "content": end.text},
            "finish_reason": end.finish_reason.value,
            "stop_sequence": end.stop_sequence,
            "usage": asdict(end.usage),
            "cache": fields_of(end.cache),
            "timing": timing,
            "dropped_turns": end.num_dropped_turns,
            "durable": end.durable,
        }


def agent_fields(
    view: AgentView,
    shown: str,
    *,
    default_model: str,
    settings: AgentSettings | None = None,
    system: str | None = None,
) -> dict[str, Any]:
    """An agent as people see it; settings and system prompt where one asks for one agent."""
    fields: dict[str, Any] = {
        "id": shown,
        "model": view.model or default_model,
        "tier": view.tier.value,
        "context_tokens": view.num_tokens,
        "held_tokens": view.held_tokens,
        "slab_bytes": view.slab_bytes,
        "num_turns": view.num_turns,
        "num_side_lines": view.num_side_lines,
        "running": view.in_use,
        "pinned": view.pinned,
        "private": view.is_private,
    }
    if settings is not None:
        fields |= {
            "system": system,
            "priority": settings.priority,
            "overflow": settings.overflow.value,
            "kv_policy": settings.policy,
            "quota_bytes": settings.quota_bytes,
        }
    return fields


def turn_fields(number: int, turn: Turn, before: Turn | None) -> dict[str, Any]:
    """A turn with what was said in it; `messages` null where only token ids are known.

    All of its conversation where that does not go on from the turn before.
    """
    messages = None if turn.messages is None else [dict(m) for m in turn.messages]
    earlier = (
        [] if before is None or before.messages is None else [dict(m) for m in before.messages]
    )
    if messages is not None and messages[: len(earlier)] == earlier:
        messages = messages[len(earlier) :]
    return {"turn": number, "context_tokens": turn.num_tokens, "messages": messages}


def verify_fields(report: VerifyReport, shown: str) -> dict[str, Any]:
    return {
        "agent": shown,
        "passed": report.passed,
        "context_tokens": report.num_tokens,
        "compared_tokens": report.num_compared,
        "largest_difference": report.largest,
        "bound": report.bound,
        "differing_blocks": list(report.differing),
        "became_shared": report.became_shared,
    }


def import_fields(summary: ImportSummary, shown: str) -> dict[str, Any]:
    return {**asdict(summary), "agent_id": shown}


def error_body(problem: Problem) -> bytes:
    error = {"type": problem.kind.value, "message": problem.message, "param": problem.param}
    return _encode({"error": error})


def _frame(name: str, value: object) -> bytes:
    return f"event: {name}\ndata: ".encode() + _encode(value) + b"\n\n"
