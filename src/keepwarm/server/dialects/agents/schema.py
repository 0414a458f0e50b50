"""Bodies that the agents API takes. An unknown field is an error that names it."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from keepwarm.core.stored import Overflow
from keepwarm.server.dialects.fields import ANY_SEED, Limit, Stop

Priority = Annotated[int, Field(ge=-100, le=100)]
Bytes = Annotated[int, Field(ge=0, le=1 << 62)]


class Strict(BaseModel):
    """A body of Keepwarm's own API: it refuses unknown fields, which may be misspelt ones."""

    model_config = ConfigDict(extra="forbid")


class AgentBody(Strict):
    """The settings of an agent; what is left out stays as it is, or has its default.

    A `quota_bytes` of null lifts the quota.
    """

    system: str | None = None
    priority: Priority | None = None
    pinned: bool | None = None
    overflow: Overflow | None = None
    kv_policy: str | None = None
    quota_bytes: Bytes | None = None


class NewMessage(Strict):
    """A message to an agent, or the result of a tool that it asked for."""

    role: Literal["user", "system", "assistant", "tool"] = "user"
    content: str
    name: str | None = None
    tool_call_id: str | None = None

    def as_message(self) -> dict[str, Any]:
        """Return the message without the fields that were not given."""
        return self.model_dump(exclude_none=True)


class MessagesBody(Strict):
    """The new message only: `content`, which is a user's, or `messages`.

    Without `model`, the model that the agent talked to last answers.
    """

    model: str | None = None
    content: str | None = None
    messages: Annotated[list[NewMessage], Field(fail_fast=True)] | None = Field(
        default=None, min_length=1
    )
    stream: bool | None = None
    max_tokens: Limit | None = None
    temperature: float | None = Field(default=None, ge=0.0, le=100.0)
    top_p: float | None = Field(default=None, ge=0.0, le=1.0)
    top_k: int | None = Field(default=None, ge=0)
    min_p: float | None = Field(default=None, ge=0.0, le=1.0)
    seed: int | None = Field(default=None, ge=ANY_SEED, lt=1 << 64)
    stop: Stop | None = None
    priority: Priority | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> "MessagesBody":
        if (self.content is None) == (self.messages is None):
            raise ValueError("give either content or messages")
        return self

    def new_messages(self) -> list[dict[str, Any]]:
        """List the new messages, whichever way they were given."""
        if self.messages is not None:
            return [message.as_message() for message in self.messages]
        return [{"role": "user", "content": self.content}]


class ForkBody(Strict):
    """The new agent's name, and how many turns it knows: `at_turn`, or all."""

    new_id: str
    at_turn: int | None = Field(default=None, ge=0)


class RollbackBody(Strict):
    """The number of turns to keep."""

    turn: int = Field(ge=0)
