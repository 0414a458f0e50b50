"""Bodies that Anthropic's clients send. Unknown fields are ignored, and named in the answer."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from keepwarm.server.dialects.fields import Lenient, Limit


def _as_blocks(content: object) -> object:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


# One type and not a union, so that an error names the field as the client knows it.
Blocks = Annotated[
    list["ContentBlock"],
    Field(fail_fast=True),
    BeforeValidator(_as_blocks, json_schema_input_type=str | list["ContentBlock"]),
]
"""A message's content; bare text becomes one block of text."""


Inner = Annotated[
    list["ContentBlock"],
    BeforeValidator(
        lambda content: [content] if isinstance(content, dict) else _as_blocks(content),
        json_schema_input_type=str | list["ContentBlock"],
    ),
]
"""A block's content; some results of the provider's own tools are one block without a list."""


class ContentBlock(Lenient):
    """A block of any type; which fields it must have depends on `type`."""

    type: str
    text: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: Inner | None = None
    is_error: bool | None = None
    cache_control: dict[str, Any] | None = None


class InputMessage(Lenient):
    """A message; some clients put a system message among the others."""

    role: Literal["user", "assistant", "system"]
    content: Blocks


class RequestMetadata(Lenient):
    """The user of a request, and Claude Code's session."""

    user_id: str | None = None


class Conversation(Lenient):
    """The fields that counting tokens and replying share."""

    model: str
    messages: list[InputMessage] = Field(min_length=1, fail_fast=True)
    system: Blocks | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None


class MessagesRequest(Conversation):
    """The body of `POST /v1/messages`."""

    max_tokens: Limit
    stream: bool | None = None
    temperature: float | None = Field(default=None, ge=0.0, le=2.0)
    top_p: float | None = Field(default=None, ge=0.0, le=1.0)
    top_k: int | None = Field(default=None, ge=0)
    stop_sequences: list[str | None] | None = None
    metadata: RequestMetadata | None = None
    cache_control: dict[str, Any] | None = None
