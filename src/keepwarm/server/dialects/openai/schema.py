"""Bodies that OpenAI's clients send. Unknown fields are ignored, and named in the answer."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from keepwarm.server.dialects.fields import Lenient, Limit, Stop

Text = Annotated[str, Field(min_length=1)]
Ids = Annotated[list[int], Field(fail_fast=True)]


def _kind_of_prompt(prompt: object) -> str:
    """Tell the kind by the first item, so that a long list is not tried as each kind in turn."""
    if not isinstance(prompt, list):
        return "text"
    first = prompt[0] if prompt else ""
    return "many_ids" if isinstance(first, list) else "texts" if isinstance(first, str) else "ids"


PromptField = Annotated[
    Annotated[Text, Tag("text")]
    | Annotated[list[Text], Field(fail_fast=True), Tag("texts")]
    | Annotated[Ids, Tag("ids")]
    | Annotated[list[Ids], Field(fail_fast=True), Tag("many_ids")],
    Discriminator(_kind_of_prompt),
]


class ContentPart(Lenient):
    """A part of a message's content; only text is understood."""

    type: str
    text: str | None = None
    refusal: str | None = None


class ChatMessage(Lenient):
    """A message of any role; `content` may be text, parts, or nothing."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[str | ContentPart], Field(fail_fast=True)] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None


class StreamOptions(Lenient):
    """What a stream ends with."""

    include_usage: bool | None = None


class Sampled(Lenient):
    """The fields that chats and bare completions share."""

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

    messages: list[ChatMessage] = Field(min_length=1, fail_fast=True)
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

    prompt: PromptField
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None
    logprobs: int | None = None
    prompt_cache_key: str | None = None
