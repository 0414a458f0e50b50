"""Translates OpenAI's requests into the engine's."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from keepwarm.core.errors import InvalidRequest
from keepwarm.core.ports import Message
from keepwarm.engine.prompt.old_messages import kept_messages
from keepwarm.engine.requests import MAX_SEED, GenerateRequest
from keepwarm.server.dialects.fields import (
    leave_out,
    limit_of,
    seed_of,
    stops_of,
    temperature_of,
    time_limits,
)
from keepwarm.server.dialects.openai.schema import (
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    ContentPart,
    Sampled,
)
from keepwarm.server.edge.caller import Caller
from keepwarm.server.problems import Unsupported
from keepwarm.server.settings import ServerConfig

HARMLESS = frozenset(
    {"metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier", "verbosity"}
)
"""Fields that most clients send and that change nothing here; the answer does not name them."""

DEFAULT_COMPLETION_TOKENS = 16
"""The default of OpenAI's older API."""

_ROLES = {"function": "tool"}
_TEXT_PARTS = frozenset({"text", "input_text", "output_text"})


@dataclass(frozen=True, slots=True)
class Translated:
    """The request for each choice, and the names of the fields that were ignored.

    The choices of one prompt, `num_per_prompt` of them, stand one after the other.
    """

    requests: tuple[GenerateRequest, ...]
    num_per_prompt: int
    ignored: tuple[str, ...]


def translate_chat(body: ChatRequest, caller: Caller, config: ServerConfig) -> Translated:
    """Translate a conversation.

    Raises InvalidRequest, and Unsupported for fields that would have to change the reply.
    """
    _refuse_sampling(body)
    _refuse_chat(body)
    roles = [message.role for message in body.messages]
    kept = kept_messages(roles, is_begun=bool(body.continue_final_message))
    left_out: list[str] = []
    request = _request(
        body,
        caller,
        config,
        agent_id=caller.agent_of(body.prompt_cache_key, body.user),
        max_tokens=limit_of(body.max_completion_tokens, body.max_tokens),
        messages=[
            message_of(index, message, left_out if index in kept else None)
            for index, message in enumerate(body.messages)
        ],
        continue_final_message=bool(body.continue_final_message),
    )
    offered = {"tools": body.tools, "functions": body.functions}
    unused = (name for name, value in offered.items() if value)
    ignored = (*unknown_fields(body), *unused, *left_out)
    return Translated(_choices(request, body.n, config), body.n or 1, ignored)


def translate_completion(
    body: CompletionRequest, caller: Caller, config: ServerConfig
) -> Translated:
    """Translate bare prompts; several prompts are several choices. Raises as `translate_chat`."""
    _refuse_sampling(body)
    for name in ("echo", "suffix", "logprobs"):
        if getattr(body, name) not in (None, False, ""):
            raise Unsupported(name, "is not supported here")
    if body.best_of not in (None, 1, body.n):
        raise Unsupported("best_of", "is not supported here")
    requests: list[GenerateRequest] = []
    for prompt in _prompts(body.prompt):
        agent_id = caller.agent_of(body.prompt_cache_key, body.user) if not requests else None
        max_tokens = limit_of(body.max_tokens, DEFAULT_COMPLETION_TOKENS)
        prompt_fields = {"text": prompt} if isinstance(prompt, str) else {"token_ids": prompt}
        request = _request(
            body, caller, config, agent_id=agent_id, max_tokens=max_tokens, **prompt_fields
        )
        requests += _choices(request, body.n, config)
    if len(requests) > config.max_choices:
        raise InvalidRequest("prompt", f"asks for more than {config.max_choices} choices")
    return Translated(tuple(requests), body.n or 1, unknown_fields(body))


def message_of(index: int, message: ChatMessage, left_out: list[str] | None) -> Message:
    """Write a message as the chat template wants it: known roles, content as one text.

    `left_out` takes the places of an old message's parts that are not text; None: the message is
    new, and such parts are refused with Unsupported.
    """
    fields: dict[str, Any] = {
        "role": _ROLES.get(message.role, message.role),
        "content": _text(f"messages.{index}.content", message.content, left_out),
    }
    for name in ("name", "tool_calls", "tool_call_id"):
        if getattr(message, name) is not None:
            fields[name] = getattr(message, name)
    return fields


def unknown_fields(body: Sampled) -> tuple[str, ...]:
    """Name the fields that the schema does not know and that are worth a note."""
    extra = (body.model_extra or {}).items()
    return tuple(name for name, value in extra if name not in HARMLESS and value is not None)


def _text(
    where: str, content: str | Sequence[str | ContentPart] | None, left_out: list[str] | None
) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    parts = enumerate(content)
    return "".join(_text_of_part(f"{where}.{number}", part, left_out) for number, part in parts)


def _text_of_part(where: str, part: str | ContentPart, left_out: list[str] | None) -> str:
    if isinstance(part, str):
        return part
    text = part.refusal if part.type == "refusal" else part.text
    if part.type in (*_TEXT_PARTS, "refusal") and text is not None:
        return text
    return leave_out(where, part.type, left_out)


def _request(body: Sampled, caller: Caller, config: ServerConfig, **fields: Any) -> GenerateRequest:
    seed = seed_of(body.seed)
    return GenerateRequest(
        namespace=caller.namespace,
        temperature=temperature_of(body.temperature, body.top_p, config),
        top_p=body.top_p or 0.0,
        top_k=max(body.top_k or 0, 0),
        min_p=body.min_p or 0.0,
        seed=None if seed is None else seed & MAX_SEED,
        stop=stops_of(body.stop),
        **time_limits(config),
        **fields,
    )


def _choices(
    request: GenerateRequest, n: int | None, config: ServerConfig
) -> tuple[GenerateRequest, ...]:
    """Repeat the request `n` times.

    The first is the agent's; the others find its KV by content, and differ by their seeds.
    """
    num_choices = n or 1
    if num_choices > config.max_choices:
        raise InvalidRequest("n", f"must be at most {config.max_choices}, not {num_choices}")
    others = (_another(request, number) for number in range(1, num_choices))
    return (request, *others)


def _another(request: GenerateRequest, number: int) -> GenerateRequest:
    seed = None if request.seed is None else (request.seed + number) & MAX_SEED
    return replace(request, agent_id=None, seed=seed)


def _prompts(prompt: object) -> list[Any]:
    if isinstance(prompt, str):
        return [prompt]
    items: list[Any] = prompt  # type: ignore[assignment]
    if not items:
        raise InvalidRequest("prompt", "is empty")
    return [items] if isinstance(items[0], int) else items


def _refuse_sampling(body: Sampled) -> None:
    for name in ("presence_penalty", "frequency_penalty", "logit_bias"):
        if getattr(body, name):
            raise Unsupported(name, "is not supported here; leave it out")


def _refuse_chat(body: ChatRequest) -> None:
    """Raise Unsupported for what would have to change the reply.

    Tools that the model may leave unused are ignored instead: agent clients always send them.
    """
    if (body.response_format or {}).get("type", "text") != "text":
        raise Unsupported("response_format", "only text is supported yet")
    if _is_forced(body.tool_choice) or _is_forced(body.function_call):
        raise Unsupported("tool_choice", "tools cannot be called yet; only auto and none work")
    if body.logprobs or body.top_logprobs:
        raise Unsupported("logprobs", "is not supported yet")
    if body.add_generation_prompt is False and not body.continue_final_message:
        problem = "needs continue_final_message; bare text is for /v1/completions"
        raise Unsupported("add_generation_prompt", problem)
    if set(body.modalities or ()) - {"text"}:
        raise Unsupported("modalities", "only text is supported")


def _is_forced(choice: str | Mapping[str, Any] | None) -> bool:
    """Whether the model has to call a tool.

    `allowed_tools` in the mode `auto` only narrows which tools the model chooses among.
    """
    if isinstance(choice, Mapping) and choice.get("type") == "allowed_tools":
        allowed = choice.get("allowed_tools")
        choice = (allowed if isinstance(allowed, Mapping) else choice).get("mode")
    elif isinstance(choice, Mapping) and choice.keys() == {"type"}:
        choice = choice["type"]
    return choice not in (None, "auto", "none")
