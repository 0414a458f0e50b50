"""Translates Anthropic's requests into the engine's."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from keepwarm.core.errors import InvalidRequest
from keepwarm.core.ports import Message
from keepwarm.engine.prompt.old_messages import kept_messages
from keepwarm.engine.requests import GenerateRequest
from keepwarm.server.dialects.anthropic.schema import (
    ContentBlock,
    Conversation,
    InputMessage,
    MessagesRequest,
)
from keepwarm.server.dialects.fields import (
    leave_out,
    limit_of,
    stops_of,
    temperature_of,
    time_limits,
)
from keepwarm.server.edge.caller import Caller
from keepwarm.server.edge.identity import session_of
from keepwarm.server.problems import Unsupported
from keepwarm.server.settings import ServerConfig

HARMLESS = frozenset({"service_tier", "context_management", "container", "inference_geo", "betas"})
"""Fields that many clients send and that change nothing here; the answer does not name them."""

_THOUGHTS = frozenset({"thinking", "redacted_thinking"})
_NOTHING: tuple[object, ...] = (None, [], {})


@dataclass(frozen=True, slots=True)
class Translated:
    """The request, the names of ignored fields, and whether the client asked for caching.

    Everything is cached here anyway; asking only changes how the tokens are reported.
    """

    request: GenerateRequest
    ignored: tuple[str, ...]
    asks_for_cache: bool


def translate_messages(body: MessagesRequest, caller: Caller, config: ServerConfig) -> Translated:
    """Translate a conversation.

    Raises InvalidRequest, and Unsupported for fields that would have to change the reply.
    """
    if (body.tool_choice or {}).get("type", "auto") not in ("auto", "none"):
        raise Unsupported("tool_choice", "tools cannot be called yet; only auto and none work")
    extra = body.model_extra or {}
    for name in ("output_config", "output_format"):
        if isinstance(extra.get(name), dict) and extra[name].get("format", extra[name].get("type")):
            raise Unsupported(name, "schemas are not supported yet")
    left_out: list[str] = []
    messages = messages_of(body, left_out)
    user_id = body.metadata.user_id if body.metadata is not None else None
    request = GenerateRequest(
        agent_id=caller.agent_of(session_of(user_id), user_id),
        namespace=caller.namespace,
        messages=messages,
        continue_final_message=is_begun(messages),
        max_tokens=limit_of(body.max_tokens),
        temperature=temperature_of(body.temperature, body.top_p, config),
        top_p=body.top_p or 0.0,
        top_k=body.top_k or 0,
        stop=stops_of(body.stop_sequences),
        **time_limits(config),
    )
    return Translated(request, (*_ignored(body), *left_out), _asks_for_cache(body))


def messages_of(body: Conversation, left_out: list[str]) -> list[Message]:
    """Write the messages as the chat template wants them: system prompt first, content as one text.

    Parts that are no text become words, and `left_out` takes their places; in the newest message
    they raise Unsupported.
    """
    messages: list[Message] = []
    system = _text("system", body.system, None)
    if system:
        messages.append({"role": "system", "content": system})
    roles = [message.role for message in body.messages]
    kept = kept_messages(roles, is_begun=_is_begun(body.messages[-1]))
    for index, message in enumerate(body.messages):
        where = f"messages.{index}.content"
        messages += _messages_of(where, message, left_out, is_kept=index in kept)
    return messages


def is_begun(messages: Sequence[Message]) -> bool:
    """Whether the last message is the beginning of the reply, which the model continues."""
    return messages[-1]["role"] == "assistant" and not messages[-1].get("tool_calls")


def _is_begun(message: InputMessage) -> bool:
    calls = any(block.type == "tool_use" for block in message.content)
    return message.role == "assistant" and not calls


def _messages_of(
    where: str, message: InputMessage, left_out: list[str], *, is_kept: bool
) -> Iterator[Message]:
    """Write one message; each result of a tool in it becomes a message of its own, in its place."""
    blocks = [(f"{where}.{n}", block) for n, block in enumerate(message.content)]
    for are_results, run in groupby(blocks, key=lambda pair: pair[1].type == "tool_result"):
        if are_results:
            yield from (_result_of(*pair, left_out) for pair in run)
        else:
            yield _spoken(message.role, list(run), left_out if is_kept else None)
    if not blocks:
        yield {"role": message.role, "content": ""}


def _spoken(
    role: str, blocks: Sequence[tuple[str, ContentBlock]], left_out: list[str] | None
) -> Message:
    """Write text and tool calls as one message; thoughts are dropped, as Anthropic's API does."""
    calls = [_call_of(*pair) for pair in blocks if pair[1].type == "tool_use"]
    texts = [
        _text_of(where, block, left_out)
        for where, block in blocks
        if block.type not in _THOUGHTS and block.type != "tool_use"
    ]
    message: Message = {"role": role, "content": "".join(texts)}
    return {**message, "tool_calls": calls} if calls else message


def _result_of(where: str, block: ContentBlock, left_out: list[str]) -> Message:
    if block.tool_use_id is None:
        raise InvalidRequest(f"{where}.tool_use_id", "is missing")
    text = _text(f"{where}.content", block.content, left_out)
    return {"role": "tool", "content": text, "tool_call_id": block.tool_use_id}


def _call_of(where: str, block: ContentBlock) -> dict[str, Any]:
    if block.id is None or block.name is None:
        raise InvalidRequest(where, "a tool_use needs an id and a name")
    try:
        arguments = json.dumps(block.input or {}, ensure_ascii=False, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{where}.input", f"is not JSON: {error}") from error
    function = {"name": block.name, "arguments": arguments}
    return {"id": block.id, "type": "function", "function": function}


def _text(where: str, content: Sequence[ContentBlock] | None, left_out: list[str] | None) -> str:
    blocks = enumerate(content or ())
    return "\n".join(_text_of(f"{where}.{number}", block, left_out) for number, block in blocks)


def _text_of(where: str, block: ContentBlock, left_out: list[str] | None) -> str:
    if block.type != "text":
        return leave_out(where, block.type, left_out)
    if block.text is None:
        raise InvalidRequest(f"{where}.text", "is missing")
    return block.text


def _ignored(body: MessagesRequest) -> Iterator[str]:
    """Name the fields that change nothing here and that the client may count on."""
    unknown = (body.model_extra or {}).items()
    yield from (k for k, value in unknown if k not in HARMLESS and value not in _NOTHING)
    if body.tools:
        yield "tools"
    if (body.thinking or {}).get("type", "disabled") != "disabled":
        yield "thinking"


def _asks_for_cache(body: MessagesRequest) -> bool:
    """Whether `cache_control` is set anywhere."""
    contents = (body.system or (), *(message.content for message in body.messages))
    tools = body.tools or ()
    return (
        body.cache_control is not None
        or any(_is_marked(block) for content in contents for block in content)
        or any(tool.get("cache_control") is not None for tool in tools)
    )


def _is_marked(block: ContentBlock) -> bool:
    """Whether the block, or one inside it, asks for caching."""
    return block.cache_control is not None or any(_is_marked(b) for b in block.content or ())
