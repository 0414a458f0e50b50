"""`/v1/chat/completions` and `/v1/completions`."""

from collections.abc import Callable
from typing import TypeVar

from fastapi import APIRouter
from starlette.responses import Response

from keepwarm.server.dialects.json_body import BodyRoute
from keepwarm.server.dialects.openai.encode import (
    ChatCompletion,
    ChatEncoder,
    OpenAIErrorBody,
    TextCompletion,
    TextEncoder,
)
from keepwarm.server.dialects.openai.schema import ChatRequest, CompletionRequest, Sampled
from keepwarm.server.dialects.openai.translate import (
    Translated,
    translate_chat,
    translate_completion,
)
from keepwarm.server.edge.caller import Caller
from keepwarm.server.problems import Unsupported
from keepwarm.server.reply.json_answer import STREAMS, errors
from keepwarm.server.serving import Serving, ServingOf
from keepwarm.server.settings import ServerConfig

router = APIRouter(route_class=BodyRoute, tags=["OpenAI"], responses=errors(OpenAIErrorBody))

Body = TypeVar("Body", bound=Sampled)


@router.post("/v1/chat/completions", response_model=ChatCompletion, responses=STREAMS)
async def chat_completions(body: ChatRequest, serving: ServingOf) -> Response:
    """Reply to a conversation, streamed with `stream`."""
    return await _answered(body, serving, translate_chat, ChatEncoder)


@router.post("/v1/completions", response_model=TextCompletion, responses=STREAMS)
async def completions(body: CompletionRequest, serving: ServingOf) -> Response:
    """Continue bare text, in which special tokens count as such."""
    return await _answered(body, serving, translate_completion, TextEncoder)


@router.api_route("/v1/responses", methods=["POST", "GET"], include_in_schema=False)
@router.api_route("/v1/embeddings", methods=["POST"], include_in_schema=False)
async def not_yet() -> Response:
    """Paths that are served only to tell a client what to use instead."""
    raise Unsupported("path", "is not served yet; use /v1/chat/completions")


async def _answered(
    body: Body,
    serving: Serving,
    translate: Callable[[Body, Caller, ServerConfig], Translated],
    encoder_type: type[ChatEncoder | TextEncoder],
) -> Response:
    model = serving.model(body.model)
    translated = translate(body, serving.caller, serving.config_for(model))
    encoder = encoder_type(
        body.model,
        num_choices=len(translated.requests),
        num_per_prompt=translated.num_per_prompt,
        with_usage=body.stream_options.include_usage if body.stream_options else None,
        ignored=translated.ignored,
    )
    return await serving.answer(
        translated.requests,
        encoder,
        model=model,
        stream=bool(body.stream),
        ignored=translated.ignored,
    )
