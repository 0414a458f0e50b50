"""The `anthropic` package: BASE_URL KEY MODEL."""

from typing import Any

import anthropic
from checks import check_all_is_cached, raises, run, target

TARGET = target()
MODEL = TARGET.model
CLIENT = anthropic.Anthropic(base_url=TARGET.base_url, api_key=TARGET.key, max_retries=0)

SYSTEM = "You are terse."
QUESTION = {"role": "user", "content": "Name a river and the sea that it ends in."}
# This version of the client has no `temperature` of its own any more.
ASKED: dict[str, Any] = {"model": MODEL, "max_tokens": 12, "extra_body": {"temperature": 0}}


def create(**more: Any) -> Any:
    return CLIENT.messages.create(**{**ASKED, "messages": [QUESTION], **more})


def prompt_tokens(usage: Any) -> int:
    """`input_tokens` are only those that are neither read from the cache nor written to it."""
    return int(
        usage.input_tokens
        + (usage.cache_read_input_tokens or 0)
        + (usage.cache_creation_input_tokens or 0)
    )


def models_are_listed() -> str:
    (model,) = CLIENT.models.list()
    assert (model.id, model.type) == (MODEL, "model")
    assert CLIENT.models.retrieve(MODEL).id == MODEL
    return f"{model.id}, {model.created_at:%Y}"


def a_message() -> str:
    reply = create(system=SYSTEM)
    (block,) = reply.content
    assert (reply.role, reply.type, reply.model) == ("assistant", "message", MODEL)
    assert block.type == "text"
    assert block.text
    assert reply.stop_reason in {"end_turn", "max_tokens"}
    assert 0 < reply.usage.output_tokens <= ASKED["max_tokens"]
    return repr(block.text)


def a_streamed_message_is_the_same_message() -> str:
    whole = create(system=SYSTEM)
    asked = {**ASKED, "system": SYSTEM, "messages": [QUESTION]}
    with CLIENT.messages.stream(**asked) as stream:
        deltas = list(stream.text_stream)
        final = stream.get_final_message()
    assert "".join(deltas) == final.content[0].text == whole.content[0].text
    assert final.stop_reason == whole.stop_reason
    assert final.usage.output_tokens == whole.usage.output_tokens
    assert prompt_tokens(final.usage) == prompt_tokens(whole.usage)
    return f"{len(deltas)} deltas"


def raw_events_come_in_order() -> str:
    kinds = [event.type for event in create(stream=True) if event.type != "ping"]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) == {"content_block_delta"}
    return f"{len(kinds)} events"


def tokens_are_counted() -> str:
    counted = CLIENT.messages.count_tokens(model=MODEL, system=SYSTEM, messages=[QUESTION])
    assert counted.input_tokens == prompt_tokens(create(system=SYSTEM).usage)
    without = CLIENT.messages.count_tokens(model=MODEL, messages=[QUESTION])
    assert without.input_tokens != counted.input_tokens
    return f"{counted.input_tokens} tokens"


def a_second_turn_finds_all_of_the_first() -> str:
    asked = {"system": SYSTEM, "metadata": {"user_id": "anthropic-second"}}
    first = create(**asked)
    turn = [QUESTION, {"role": "assistant", "content": first.content}]
    second = create(**asked, messages=[*turn, {"role": "user", "content": "And another?"}])
    cached = second.usage.cache_read_input_tokens
    check_all_is_cached(cached, prompt_tokens(first.usage), first.usage.output_tokens)
    return f"{cached} of {prompt_tokens(second.usage)} tokens cached"


def blocks_of_text_and_cache_control_are_understood() -> None:
    cache_control = {"type": "ephemeral"}
    system = [{"type": "text", "text": SYSTEM, "cache_control": cache_control}]
    content = [{"type": "text", "text": QUESTION["content"], "cache_control": cache_control}]
    blocks = create(system=system, messages=[{"role": "user", "content": content}])
    plain = create(system=SYSTEM)
    assert blocks.content[0].text == plain.content[0].text
    assert prompt_tokens(blocks.usage) == prompt_tokens(plain.usage)


def a_picture_in_the_history_is_left_out() -> str:
    source = {"type": "base64", "media_type": "image/png", "data": "AA"}
    shown = [{"type": "image", "source": source}]
    call = {"type": "tool_use", "id": "t", "name": "read", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "t", "content": shown}
    old = [
        QUESTION,
        {"role": "assistant", "content": [call]},
        {"role": "user", "content": [result]},
        {"role": "assistant", "content": "I see."},
    ]
    for messages in ([*old, QUESTION], old[:3]):
        reply = create(messages=messages)
        assert reply.keepwarm["ignored"] == ["messages.2.content.0.content.0"]
    with raises(anthropic.BadRequestError) as refused:
        create(messages=[{"role": "user", "content": shown}])
    return str(refused[0])


def max_tokens_and_stop_sequences_end_a_reply() -> str:
    whole = create(max_tokens=8)
    assert whole.stop_reason == "max_tokens"
    text = whole.content[0].text
    stop = text[len(text) // 2 :][:2]
    stopped = create(max_tokens=8, stop_sequences=[stop])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", stop)
    assert stopped.content[0].text == text[: text.index(stop)]
    return repr(stop)


def a_tool_is_offered_and_text_comes_back() -> None:
    schema = {"type": "object", "properties": {"river": {"type": "string"}}}
    tool = {"name": "length_of", "description": "A river's length", "input_schema": schema}
    reply = create(tools=[tool])
    assert reply.content[0].type == "text"


def what_was_reused_is_in_every_reply() -> str:
    asked = {"extra_body": {"temperature": 0, "new": 1}}
    whole = create(**asked)
    assert whole.keepwarm["cache"]["prompt_tokens"] == prompt_tokens(whole.usage)
    assert whole.keepwarm["ignored"] == ["new"]
    (end,) = (event for event in create(**asked, stream=True) if event.type == "message_delta")
    assert end.keepwarm["ignored"] == ["new"]
    return str(end.keepwarm["cache"]["reason"])


def errors_are_the_clients_own() -> str:
    with raises(anthropic.NotFoundError) as missing:
        create(model="no-such-model")
    assert missing[0].type == "not_found_error"
    with raises(anthropic.NotFoundError):
        create(model="no-such-model", stream=True)
    with raises(anthropic.NotFoundError):
        CLIENT.models.retrieve("no-such-model")
    with raises(anthropic.BadRequestError) as wrong:
        create(messages=[])
    assert wrong[0].type == "invalid_request_error"
    if TARGET.key != "none":
        with raises(anthropic.AuthenticationError):
            CLIENT.with_options(api_key="another").models.list()
    return str(missing[0])


async def the_async_client() -> None:
    client = anthropic.AsyncAnthropic(base_url=TARGET.base_url, api_key=TARGET.key)
    async with client, client.messages.stream(**ASKED, messages=[QUESTION]) as stream:
        assert [text async for text in stream.text_stream]


run(
    models_are_listed,
    a_message,
    a_streamed_message_is_the_same_message,
    raw_events_come_in_order,
    tokens_are_counted,
    a_second_turn_finds_all_of_the_first,
    blocks_of_text_and_cache_control_are_understood,
    a_picture_in_the_history_is_left_out,
    max_tokens_and_stop_sequences_end_a_reply,
    a_tool_is_offered_and_text_comes_back,
    what_was_reused_is_in_every_reply,
    errors_are_the_clients_own,
    the_async_client,
)
