"""What OpenAI's clients send. Fields that are not here are ignored, with a note in the log."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from keepwarm.server.fields import Limit, Stop

Text = Annotated[str, Field(min_length=1)]


class Lenient(BaseModel):
    """Keeps what it does not know, so that it can be noted."""

    model_config = ConfigDict(extra="allow")


class ContentPart(Lenient):
    """A part of a message's content; of the types only text is understood."""

    type: str
    text: str | None = None
    refusal: str | None = None


class ChatMessage(Lenient):
    """A message of any role; `content` may be text, parts, or nothing."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[str | ContentPart] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None


class StreamOptions(Lenient):
    """What a stream ends with."""

    include_usage: bool | None = None


class Sampled(Lenient):
    """What both kinds of completion share."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(default=None, ge=1)
    max_tokens: Limit | None = None
    temperature: float | None = Field(default=None, ge=0.0, le=2.0)
    top_p: float | None = Field(default=None, ge=0.0, le=1.0)
    top_k: int | None = Field(default=None, ge=-1)
    min_p: float | None = Field(default=None, ge=0.0, le=1.0)
    seed: int | None = None
    stop: Stop | None = None
    user: str | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None


class ChatRequest(Sampled):
    """The body of `POST /v1/chat/completions`."""

    messages: list[ChatMessage] = Field(min_length=1)
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    max_completion_tokens: Limit | None = None
    prompt_cache_key: str | None = None
    response_format: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    functions: list[dict[str, Any]] | None = None
    function_call: str | dict[str, Any] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    modalities: list[str] | None = None


class CompletionRequest(Sampled):
    """The body of `POST /v1/completions`."""

    prompt: Text | list[Text] | list[int] | list[list[int]]
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None
    logprobs: int | None = None
    prompt_cache_key: str | None = None
