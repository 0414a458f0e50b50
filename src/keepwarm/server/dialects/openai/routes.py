"""`/v1/chat/completions` and `/v1/completions`."""

from typing import Annotated

from fastapi import APIRouter, Depends
from starlette.responses import Response

from keepwarm.server.dialects.openai.encode import (
    ChatCompletion,
    ChatEncoder,
    OpenAIErrorBody,
    TextCompletion,
    TextEncoder,
)
from keepwarm.server.dialects.openai.schema import ChatRequest, CompletionRequest, Sampled
from keepwarm.server.dialects.openai.translate import translate_chat, translate_completion
from keepwarm.server.edge.json_body import BodyRoute
from keepwarm.server.problems import Unsupported
from keepwarm.server.reply.json_answer import STREAMS, errors
from keepwarm.server.serving import Serving, serving_of

router = APIRouter(route_class=BodyRoute, tags=["OpenAI"], responses=errors(OpenAIErrorBody))

ServingOf = Annotated[Serving, Depends(serving_of)]


@router.post("/v1/chat/completions", response_model=ChatCompletion, responses=STREAMS)
async def chat_completions(body: ChatRequest, serving: ServingOf) -> Response:
    """A reply to a conversation, streamed with `stream`."""
    model = serving.model(body.model)
    translated = translate_chat(body, serving.caller, serving.config_for(model))
    encoder = ChatEncoder(
        body.model,
        num_choices=len(translated.requests),
        num_per_prompt=translated.num_per_prompt,
        with_usage=_with_usage(body),
        ignored=translated.ignored,
    )
    return await serving.answer(
        translated.requests,
        encoder,
        model=model,
        stream=bool(body.stream),
        ignored=translated.ignored,
    )


@router.post("/v1/completions", response_model=TextCompletion, responses=STREAMS)
async def completions(body: CompletionRequest, serving: ServingOf) -> Response:
    """A continuation of bare text, whose special tokens count as such."""
    model = serving.model(body.model)
    translated = translate_completion(body, serving.caller, serving.config_for(model))
    encoder = TextEncoder(
        body.model,
        num_choices=len(translated.requests),
        num_per_prompt=translated.num_per_prompt,
        with_usage=_with_usage(body),
        ignored=translated.ignored,
    )
    return await serving.answer(
        translated.requests,
        encoder,
        model=model,
        stream=bool(body.stream),
        ignored=translated.ignored,
    )


@router.api_route("/v1/responses", methods=["POST", "GET"], include_in_schema=False)
@router.api_route("/v1/embeddings", methods=["POST"], include_in_schema=False)
async def not_yet() -> Response:
    """Named, so that a client is told what to use instead."""
    raise Unsupported("path", "is not served yet; use /v1/chat/completions")


def _with_usage(body: Sampled) -> bool | None:
    """None where the client does not say."""
    return body.stream_options.include_usage if body.stream_options else None
