"""`/v1/messages` and `/v1/messages/count_tokens`."""

from fastapi import APIRouter
from starlette.responses import Response

from keepwarm.engine.requests import PromptSource
from keepwarm.server.dialects.anthropic.encode import (
    AnthropicErrorBody,
    MessageReply,
    MessagesEncoder,
    TokenCount,
)
from keepwarm.server.dialects.anthropic.schema import Conversation, MessagesRequest
from keepwarm.server.dialects.anthropic.translate import is_begun, messages_of, translate_messages
from keepwarm.server.dialects.json_body import BodyRoute
from keepwarm.server.reply.json_answer import STREAMS, errors, json_answer
from keepwarm.server.serving import ServingOf

router = APIRouter(route_class=BodyRoute, tags=["Anthropic"], responses=errors(AnthropicErrorBody))


@router.post("/v1/messages", response_model=MessageReply, responses=STREAMS)
async def messages(body: MessagesRequest, serving: ServingOf) -> Response:
    """Reply to a conversation, streamed with `stream`."""
    model = serving.model(body.model)
    translated = translate_messages(body, serving.caller, serving.config_for(model))
    encoder = MessagesEncoder(
        body.model, asks_for_cache=translated.asks_for_cache, ignored=translated.ignored
    )
    return await serving.answer(
        [translated.request],
        encoder,
        model=model,
        stream=bool(body.stream),
        ignored=translated.ignored,
    )


@router.post("/v1/messages/count_tokens", response_model=TokenCount)
async def count_tokens(body: Conversation, serving: ServingOf) -> Response:
    """Count the prompt's tokens; tools do not count, because they are not in the prompt."""
    model = serving.model(body.model)
    conversation = messages_of(body, left_out=[])
    source = PromptSource(messages=conversation, continue_final_message=is_begun(conversation))
    num_tokens = await serving.engine.count_tokens(model.name, source)
    return json_answer(TokenCount(num_tokens))
