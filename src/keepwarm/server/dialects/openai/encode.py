"""Writes the engine's events as OpenAI's chunks and documents."""

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import msgspec

from keepwarm.core.events import Completed, Delta, Event, FinishReason, Started
from keepwarm.server.problems import Kind, Problem
from keepwarm.server.reply.facts import Facts
from keepwarm.server.reply.sse import HEARTBEAT, unnamed_frame

_TYPES = {
    Kind.UNAUTHENTICATED: "authentication_error",
    Kind.FORBIDDEN: "permission_error",
    Kind.RATE_LIMITED: "rate_limit_error",
    Kind.QUEUE_FULL: "rate_limit_error",
    Kind.OVERLOADED: "server_error",
    Kind.MODEL_UNAVAILABLE: "server_error",
    Kind.TIMEOUT: "server_error",
    Kind.INTERNAL: "server_error",
    Kind.STORAGE: "server_error",
}
_CODES = {Kind.TOO_LONG: "context_length_exceeded", Kind.UNAUTHENTICATED: "invalid_api_key"}

_encode = msgspec.json.Encoder().encode
DONE = unnamed_frame(b"[DONE]")


@dataclass(frozen=True, slots=True)
class PromptTokensDetails:
    """How much of the prompt was reused."""

    cached_tokens: int


@dataclass(frozen=True, slots=True)
class CompletionUsage:
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails

    @classmethod
    def of(cls, ends: Sequence[Completed], num_per_prompt: int) -> "CompletionUsage":
        """Sum up over all replies; a prompt counts once, however many replies it has."""
        firsts = [end.usage for end in ends[::num_per_prompt]]
        prompt = sum(first.prompt_tokens for first in firsts)
        completion = sum(end.usage.completion_tokens for end in ends)
        details = PromptTokensDetails(sum(first.cached_tokens for first in firsts))
        return cls(prompt, completion, prompt + completion, details)


class ReplyDelta(msgspec.Struct, omit_defaults=True):
    """What a chunk adds to its reply."""

    role: str | None = None
    content: str | None = None


class ChatChunkChoice(msgspec.Struct):
    """One reply's part of a chunk."""

    index: int
    delta: ReplyDelta
    finish_reason: str | None = None
    logprobs: None = None


@dataclass(frozen=True, slots=True)
class TextChoice:
    """A completion, or a part of it."""

    index: int
    text: str
    finish_reason: str | None = None
    logprobs: None = None


class Chunk(msgspec.Struct):
    """An event of a stream."""

    id: str
    object: str
    created: int
    model: str
    choices: Sequence[ChatChunkChoice | TextChoice]
    usage: CompletionUsage | msgspec.UnsetType | None = msgspec.UNSET
    keepwarm: Facts | msgspec.UnsetType = msgspec.UNSET


@dataclass(frozen=True, slots=True)
class ReplyMessage:
    """A whole reply."""

    role: str
    content: str
    refusal: None = None
    annotations: tuple[()] = ()


@dataclass(frozen=True, slots=True)
class ChatChoice:
    """A whole reply and why it ended."""

    index: int
    message: ReplyMessage
    finish_reason: str
    logprobs: None = None


@dataclass(frozen=True, slots=True)
class ChatCompletion:
    """The answer to a chat that is not streamed."""

    id: str
    created: int
    model: str
    choices: Sequence[ChatChoice]
    usage: CompletionUsage
    keepwarm: Facts
    object: str = "chat.completion"


@dataclass(frozen=True, slots=True)
class TextCompletion:
    """The answer to bare text that is not streamed."""

    id: str
    created: int
    model: str
    choices: Sequence[TextChoice]
    usage: CompletionUsage
    keepwarm: Facts
    object: str = "text_completion"


@dataclass(frozen=True, slots=True)
class OpenAIError:
    """What is wrong, for programs and for people; `param` is the field that it is about."""

    message: str
    type: str
    param: str | None
    code: str


@dataclass(frozen=True, slots=True)
class OpenAIErrorBody:
    """A request that was not answered."""

    error: OpenAIError


class _Encoder:
    """Writes one request's replies; what chats and bare text share.

    `with_usage`: a last chunk has the token counts, and all others have null. Where the client does
    not say (None), the chunk that ends the last choice has them: some clients show token counts and
    never ask for them, and the others do not look. `ignored` names what the request had in vain;
    the object `keepwarm` of the last chunk repeats it.
    """

    prefix: ClassVar[str]
    chunk_object: ClassVar[str]
    document: ClassVar[type[ChatCompletion | TextCompletion]]
    heartbeat = HEARTBEAT

    def __init__(
        self,
        model: str,
        *,
        num_choices: int,
        num_per_prompt: int,
        with_usage: bool | None,
        ignored: Sequence[str] = (),
    ) -> None:
        self._id = f"{self.prefix}-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._model = model
        self._num_choices = num_choices
        self._num_per_prompt = num_per_prompt
        self._with_usage = with_usage
        self._ignored = ignored
        self._ends: dict[int, Completed] = {}

    def finish(self) -> bytes:
        return (self._last(self._usage()) if self._with_usage else b"") + DONE

    def failed(self, problem: Problem) -> bytes:
        return unnamed_frame(error_body(problem))

    def whole(self, ends: Sequence[Completed]) -> bytes:
        self._ends = dict(enumerate(ends))
        choices: list[Any] = [self._whole_choice(*item) for item in self._ends.items()]
        told = (self._usage(), self._facts())
        return _encode(self.document(self._id, self._created, self._model, choices, *told))

    def _whole_choice(self, index: int, end: Completed) -> ChatChoice | TextChoice:
        raise NotImplementedError

    def _end(self, choice: int, end: Completed, last: ChatChunkChoice | TextChoice) -> bytes:
        self._ends[choice] = end
        if self._with_usage or len(self._ends) < self._num_choices:
            return self._frame(last)
        return self._last(self._usage() if self._with_usage is None else None, last)

    def _usage(self) -> CompletionUsage:
        ends = [self._ends[choice] for choice in sorted(self._ends)]
        return CompletionUsage.of(ends, self._num_per_prompt)

    def _facts(self) -> Facts:
        return Facts.of(self._ends[0], self._ignored)

    def _frame(self, *choices: ChatChunkChoice | TextChoice) -> bytes:
        return unnamed_frame(_encode(self._chunk(choices, None)))

    def _last(self, usage: CompletionUsage | None, *choices: ChatChunkChoice | TextChoice) -> bytes:
        chunk = self._chunk(choices, usage)
        chunk.keepwarm = self._facts()
        return unnamed_frame(_encode(chunk))

    def _chunk(
        self, choices: Sequence[ChatChunkChoice | TextChoice], usage: CompletionUsage | None
    ) -> Chunk:
        chunk = Chunk(self._id, self.chunk_object, self._created, self._model, choices)
        if self._with_usage or usage is not None:
            chunk.usage = usage
        return chunk


class ChatEncoder(_Encoder):
    """Writes `chat.completion` and its chunks."""

    prefix = "chatcmpl"
    chunk_object = "chat.completion.chunk"
    document = ChatCompletion

    def event(self, choice: int, event: Event) -> bytes:
        if isinstance(event, Started):
            return self._frame(ChatChunkChoice(choice, ReplyDelta(role="assistant", content="")))
        if isinstance(event, Delta) and event.text:
            return self._frame(ChatChunkChoice(choice, ReplyDelta(content=event.text)))
        if isinstance(event, Completed):
            last = ChatChunkChoice(choice, ReplyDelta(), finish_reason(event))
            return self._end(choice, event, last)
        return b""

    def _whole_choice(self, index: int, end: Completed) -> ChatChoice:
        return ChatChoice(index, ReplyMessage("assistant", end.text), finish_reason(end))


class TextEncoder(_Encoder):
    """Writes `text_completion`, whole and in chunks."""

    prefix = "cmpl"
    chunk_object = "text_completion"
    document = TextCompletion

    def event(self, choice: int, event: Event) -> bytes:
        if isinstance(event, Delta) and event.text:
            return self._frame(TextChoice(choice, event.text))
        if isinstance(event, Completed):
            return self._end(choice, event, TextChoice(choice, "", finish_reason(event)))
        return b""

    def _whole_choice(self, index: int, end: Completed) -> TextChoice:
        return TextChoice(index, end.text, finish_reason(end))


def finish_reason(end: Completed) -> str:
    """Say why the reply ended, in OpenAI's words."""
    return "length" if end.finish_reason is FinishReason.LENGTH else "stop"


def error_body(problem: Problem) -> bytes:
    """Write the problem as OpenAI's clients read it."""
    error = OpenAIError(
        message=problem.message,
        type=_TYPES.get(problem.kind, "invalid_request_error"),
        param=problem.param,
        code=_CODES.get(problem.kind, problem.kind.value),
    )
    return _encode(OpenAIErrorBody(error))
