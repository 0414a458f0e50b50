"""Writes the engine's events, and problems, as the agents API has them."""

from collections.abc import Sequence

import msgspec

from keepwarm.core.events import Completed, Delta, Event, Progress, Started
from keepwarm.server.dialects.agents.answers import AgentError, AgentErrorBody, AgentReply
from keepwarm.server.problems import Problem
from keepwarm.server.reply.cache_report import CacheFields
from keepwarm.server.reply.sse import HEARTBEAT, frame

_encode = msgspec.json.Encoder().encode


class AgentEncoder:
    """Writes an agent's reply, as events with names or as one document."""

    heartbeat = HEARTBEAT

    def __init__(self, agent: str) -> None:
        self._agent = agent

    def event(self, choice: int, event: Event) -> bytes:
        if isinstance(event, Delta):
            return frame("delta", _encode({"text": event.text})) if event.text else b""
        if isinstance(event, Progress):
            tokens = {"done_tokens": event.num_done, "total_tokens": event.num_total}
            return frame("progress", _encode(tokens))
        if isinstance(event, Started):
            begun = {"agent": self._agent, "cache": CacheFields.of(event.cache)}
            return frame("started", _encode(begun))
        if isinstance(event, Completed):
            return frame("completed", _encode(AgentReply.of(event, self._agent)))
        return b""

    def finish(self) -> bytes:
        return b""

    def failed(self, problem: Problem) -> bytes:
        return frame("error", error_body(problem))

    def whole(self, ends: Sequence[Completed]) -> bytes:
        return _encode(AgentReply.of(ends[0], self._agent))


def error_body(problem: Problem) -> bytes:
    """Write the problem as clients of the agents API read it."""
    error = AgentError(problem.kind, problem.message, problem.param)
    return _encode(AgentErrorBody(error))
