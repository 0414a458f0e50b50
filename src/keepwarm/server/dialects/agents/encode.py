"""From the engine's events to the agents API's, and problems with the field that they are about."""

from collections.abc import Sequence

import msgspec

from keepwarm.core.events import Completed, Delta, Event, Progress, Started
from keepwarm.server.dialects.agents.answers import AgentError, AgentErrorBody, AgentReply
from keepwarm.server.problems import Problem
from keepwarm.server.reply.cache_report import CacheFields
from keepwarm.server.reply.reply import HEARTBEAT

_encode = msgspec.json.Encoder().encode


class AgentEncoder:
    """A reply of an agent: events that have names, and one document."""

    heartbeat = HEARTBEAT

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
            return _frame("started", {"agent": self._agent, "cache": CacheFields.of(event.cache)})
        if isinstance(event, Completed):
            return _frame("completed", AgentReply.of(event, self._agent))
        return b""

    def finish(self) -> bytes:
        return b""

    def failed(self, problem: Problem) -> bytes:
        return b"event: error\ndata: " + error_body(problem) + b"\n\n"

    def whole(self, ends: Sequence[Completed]) -> bytes:
        return _encode(AgentReply.of(ends[0], self._agent))


def error_body(problem: Problem) -> bytes:
    error = AgentError(problem.kind, problem.message, problem.param)
    return _encode(AgentErrorBody(error))


def _frame(name: str, value: object) -> bytes:
    return f"event: {name}\ndata: ".encode() + _encode(value) + b"\n\n"
