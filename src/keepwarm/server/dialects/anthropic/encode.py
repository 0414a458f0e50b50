"""Writes the engine's events as Anthropic's, and problems as its clients know them."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from keepwarm.core.events import Completed, Delta, Event, FinishReason, Started
from keepwarm.server.problems import Kind, Problem
from keepwarm.server.reply.facts import Facts
from keepwarm.server.reply.sse import frame

_TYPES = {
    Kind.UNAUTHENTICATED: "authentication_error",
    Kind.FORBIDDEN: "permission_error",
    Kind.NOT_FOUND: "not_found_error",
    Kind.TOO_LARGE: "request_too_large",
    Kind.RATE_LIMITED: "rate_limit_error",
    Kind.QUEUE_FULL: "rate_limit_error",
    Kind.OVERLOADED: "overloaded_error",
    Kind.MODEL_UNAVAILABLE: "overloaded_error",
    Kind.TIMEOUT: "timeout_error",
    Kind.INTERNAL: "api_error",
    Kind.STORAGE: "api_error",
}

_encode = msgspec.json.Encoder().encode


# Anthropic's specification requires every field, and null where there is nothing to say.


@dataclass(frozen=True, slots=True)
class MessageUsage:
    """Token counts: the three kinds of input make up the prompt."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: None = None
    server_tool_use: None = None
    cache_creation: None = None
    inference_geo: None = None
    service_tier: None = None

    @classmethod
    def of(cls, prompt: int, cached: int, output: int, *, asks_for_cache: bool) -> "MessageUsage":
        """Split the prompt's tokens; computed ones count as cache creation if the client asks."""
        new = prompt - cached
        return cls(0 if asks_for_cache else new, new if asks_for_cache else 0, cached, output)


@dataclass(frozen=True, slots=True)
class TextBlock:
    """A block of a reply."""

    text: str
    type: str = "text"
    citations: None = None


@dataclass(frozen=True, slots=True)
class Message:
    """A message of the assistant, whole or as it begins."""

    id: str
    model: str
    content: Sequence[TextBlock]
    usage: MessageUsage
    stop_reason: str | None = None
    stop_sequence: str | None = None
    stop_details: None = None
    container: None = None
    type: str = "message"
    role: str = "assistant"


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageReply(Message):
    """A whole reply, with what was reused and ignored."""

    keepwarm: Facts


@dataclass(frozen=True, slots=True)
class TokenCount:
    """The number of tokens that a prompt would have."""

    input_tokens: int


@dataclass(frozen=True, slots=True)
class AnthropicError:
    """What is wrong, for programs and for people."""

    type: str
    message: str


@dataclass(frozen=True, slots=True)
class AnthropicErrorBody:
    """A request that was not answered."""

    error: AnthropicError
    request_id: str
    type: str = "error"


class TextDelta(msgspec.Struct):
    """More of a block's text."""

    text: str
    type: str = "text_delta"


class BlockDelta(msgspec.Struct):
    """`content_block_delta`."""

    delta: TextDelta
    index: int = 0
    type: str = "content_block_delta"


class MessageEnd(msgspec.Struct):
    """Why the reply ended."""

    stop_reason: str
    stop_sequence: str | None
    stop_details: None = None
    container: None = None


class MessageDelta(msgspec.Struct):
    """`message_delta`."""

    delta: MessageEnd
    usage: MessageUsage
    keepwarm: Facts
    type: str = "message_delta"


class MessagesEncoder:
    """Writes one request's reply.

    `asks_for_cache`: new tokens are reported as written to the cache. `ignored` names what the
    request had in vain.
    """

    heartbeat = b'event: ping\ndata: {"type":"ping"}\n\n'
    """Anthropic's clients skip a ping wherever it comes."""

    def __init__(self, model: str, *, asks_for_cache: bool, ignored: Sequence[str] = ()) -> None:
        self._id = f"msg_{secrets.token_hex(12)}"
        self._model = model
        self._asks_for_cache = asks_for_cache
        self._ignored = ignored

    def event(self, choice: int, event: Event) -> bytes:
        if isinstance(event, Started):
            return self._start(event)
        if isinstance(event, Delta) and event.text:
            return frame("content_block_delta", _encode(BlockDelta(TextDelta(event.text))))
        if isinstance(event, Completed):
            return self._end(event)
        return b""

    def finish(self) -> bytes:
        return frame("message_stop", b'{"type":"message_stop"}')

    def failed(self, problem: Problem) -> bytes:
        return frame("error", error_body(problem))

    def whole(self, ends: Sequence[Completed]) -> bytes:
        (end,) = ends
        content = [TextBlock(end.text)] if end.text else []
        usage, reason = self._usage_of(end), _stop_reason(end)
        facts = Facts.of(end, self._ignored)
        told = (usage, reason, end.stop_sequence)
        return _encode(MessageReply(self._id, self._model, content, *told, keepwarm=facts))

    def _start(self, started: Started) -> bytes:
        cache = started.cache
        usage = self._usage(cache.prompt_tokens, cache.cached_tokens, 0)
        message = Message(self._id, self._model, (), usage)
        block = {"type": "content_block_start", "index": 0, "content_block": TextBlock("")}
        return (
            frame("message_start", _encode({"type": "message_start", "message": message}))
            + frame("content_block_start", _encode(block))
            + self.heartbeat
        )

    def _end(self, end: Completed) -> bytes:
        delta = MessageEnd(_stop_reason(end), end.stop_sequence)
        told = MessageDelta(delta, self._usage_of(end), Facts.of(end, self._ignored))
        return frame("content_block_stop", b'{"type":"content_block_stop","index":0}') + frame(
            "message_delta", _encode(told)
        )

    def _usage_of(self, end: Completed) -> MessageUsage:
        usage = end.usage
        return self._usage(usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens)

    def _usage(self, prompt: int, cached: int, output: int) -> MessageUsage:
        return MessageUsage.of(prompt, cached, output, asks_for_cache=self._asks_for_cache)


def error_body(problem: Problem, request_id: str | None = None) -> bytes:
    """Write the problem as Anthropic's clients read it.

    It has the request's id where the error is the whole answer, and not an event in a stream.
    """
    error = AnthropicError(
        type=_TYPES.get(problem.kind, "invalid_request_error"), message=problem.message
    )
    if request_id is None:
        return _encode({"type": "error", "error": error})
    return _encode(AnthropicErrorBody(error, request_id))


def _stop_reason(end: Completed) -> str:
    if end.stop_sequence is not None:
        return "stop_sequence"
    return "max_tokens" if end.finish_reason is FinishReason.LENGTH else "end_turn"
