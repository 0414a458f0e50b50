"""The `openai` package: BASE_URL KEY MODEL."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
from checks import check_all_is_cached, get, raises, run, target

TARGET = target()
MODEL = TARGET.model
CLIENT = openai.OpenAI(base_url=f"{TARGET.base_url}/v1", api_key=TARGET.key, max_retries=0)

SYSTEM = {"role": "system", "content": "You are terse."}
QUESTION = {"role": "user", "content": "Name a river and the sea that it ends in."}


def models_are_listed() -> str:
    names = [model.id for model in CLIENT.models.list()]
    assert names == [MODEL]
    assert CLIENT.models.retrieve(MODEL).object == "model"
    return names[0]


def a_chat() -> str:
    reply = CLIENT.chat.completions.create(
        model=MODEL, messages=[SYSTEM, QUESTION], max_tokens=12, temperature=0
    )
    (choice,) = reply.choices
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.finish_reason in {"stop", "length"}
    usage = reply.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert 0 < usage.completion_tokens <= 12
    return repr(choice.message.content)


def a_streamed_chat_is_the_same_chat() -> str:
    asked = {"model": MODEL, "messages": [SYSTEM, QUESTION], "max_tokens": 12, "temperature": 0}
    whole = CLIENT.chat.completions.create(**asked)
    options = {"include_usage": True}
    with CLIENT.chat.completions.create(**asked, stream=True, stream_options=options) as stream:
        chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    *others, last = chunks
    assert not last.choices
    assert all(chunk.usage is None for chunk in others)
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert last.usage.prompt_tokens == whole.usage.prompt_tokens
    assert others[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    return f"{len(chunks)} chunks"


def usage_that_nobody_asked_for_comes_with_the_end() -> None:
    asked = {"model": MODEL, "messages": [QUESTION], "max_tokens": 2, "stream": True}
    *others, last = CLIENT.chat.completions.create(**asked)
    assert all(chunk.usage is None for chunk in others)
    assert last.choices[0].finish_reason
    assert last.usage.completion_tokens == 2
    without = CLIENT.chat.completions.create(**asked, stream_options={"include_usage": False})
    assert all(chunk.usage is None for chunk in without)


def the_stream_helper_builds_the_reply() -> str:
    with CLIENT.chat.completions.stream(
        model=MODEL, messages=[QUESTION], max_tokens=6, temperature=0
    ) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        reply = stream.current_completion_snapshot
    assert reply.choices[0].message.content == "".join(deltas)
    return f"{len(deltas)} deltas"


def a_second_turn_finds_all_of_the_first() -> str:
    messages = [SYSTEM, QUESTION]
    asked = {"model": MODEL, "temperature": 0, "max_tokens": 12, "user": "openai-second"}
    first = CLIENT.chat.completions.create(messages=messages, **asked)
    usage = first.usage
    messages = [*messages, first.choices[0].message, {"role": "user", "content": "And another?"}]
    second = CLIENT.chat.completions.create(messages=messages, **asked)
    cached = second.usage.prompt_tokens_details.cached_tokens
    check_all_is_cached(cached, usage.prompt_tokens, usage.completion_tokens)
    return f"{cached} of {second.usage.prompt_tokens} tokens cached"


def parts_and_a_developer_message_are_understood() -> None:
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "You are terse."}]},
        {"role": "user", "content": [{"type": "text", "text": QUESTION["content"]}]},
    ]
    asked = {"model": MODEL, "max_completion_tokens": 8, "temperature": 0}
    parts = CLIENT.chat.completions.create(messages=messages, **asked)
    plain = CLIENT.chat.completions.create(messages=[SYSTEM, QUESTION], **asked)
    assert parts.usage.prompt_tokens == plain.usage.prompt_tokens
    assert parts.choices[0].message.content == plain.choices[0].message.content
    without = CLIENT.chat.completions.create(messages=[QUESTION], **asked)
    assert without.usage.prompt_tokens != plain.usage.prompt_tokens


def a_picture_in_the_history_is_left_out() -> str:
    url = {"url": "data:image/png;base64,AA"}
    look = [{"type": "text", "text": "Look: "}, {"type": "image_url", "image_url": url}]
    said = {"role": "assistant", "content": "I see."}
    asked = {"model": MODEL, "max_tokens": 4, "temperature": 0}
    old = [{"role": "user", "content": look}, said]
    reply = CLIENT.chat.completions.create(messages=[*old, QUESTION], **asked)
    assert reply.keepwarm["ignored"] == ["messages.0.content.1"]
    with raises(openai.BadRequestError) as refused:
        CLIENT.chat.completions.create(messages=old[:1], **asked)
    assert refused[0].param == "messages.0.content.1"
    return refused[0].message


def max_tokens_and_stop_end_a_reply() -> str:
    asked = {"model": MODEL, "messages": [QUESTION], "temperature": 0}
    long = CLIENT.chat.completions.create(**asked, max_tokens=8).choices[0]
    assert long.finish_reason == "length"
    text = long.message.content
    stop = text[len(text) // 2 : len(text) // 2 + 2]
    stopped = CLIENT.chat.completions.create(**asked, max_tokens=8, stop=[stop]).choices[0]
    assert stopped.finish_reason == "stop"
    assert stopped.message.content == text[: text.index(stop)]
    return repr(stop)


def several_choices() -> None:
    reply = CLIENT.chat.completions.create(
        model=MODEL, messages=[QUESTION], max_tokens=4, n=2, seed=7
    )
    assert [choice.index for choice in reply.choices] == [0, 1]


def a_bare_completion() -> str:
    reply = CLIENT.completions.create(model=MODEL, prompt="Once upon", max_tokens=4, temperature=0)
    assert reply.choices[0].text
    return repr(reply.choices[0].text)


def errors_are_the_clients_own() -> str:
    def ask(**more: Any) -> Any:
        asked = {"model": MODEL, "messages": [QUESTION], "max_tokens": 2}
        return CLIENT.chat.completions.create(**{**asked, **more})

    with raises(openai.NotFoundError) as missing:
        ask(model="no-such-model")
    with raises(openai.NotFoundError):
        ask(model="no-such-model", stream=True)
    with raises(openai.NotFoundError):
        CLIENT.models.retrieve("no-such-model")
    for field, value in (("max_tokens", 0), ("messages", []), ("temperature", 9)):
        with raises(openai.BadRequestError) as wrong:
            ask(**{field: value})
        assert wrong[0].param == field
    if TARGET.key != "none":
        with raises(openai.AuthenticationError):
            list(CLIENT.with_options(api_key="another").models.list())
    return missing[0].message


def what_was_reused_is_in_a_header() -> str:
    raw = CLIENT.chat.completions.with_raw_response.create(
        model=MODEL, messages=[QUESTION], max_tokens=2
    )
    assert "cached=" in raw.headers["x-keepwarm-cache"]
    assert raw.parse().id
    return raw.headers["x-keepwarm-cache"]


def what_was_reused_is_in_every_reply() -> str:
    asked = {"model": MODEL, "messages": [QUESTION], "max_tokens": 2, "extra_body": {"new": 1}}
    whole = CLIENT.chat.completions.create(**asked)
    assert whole.keepwarm["cache"]["prompt_tokens"] == whole.usage.prompt_tokens
    assert whole.keepwarm["ignored"] == ["new"]
    chunks = list(CLIENT.chat.completions.create(**asked, stream=True))
    (facts,) = (chunk.keepwarm for chunk in chunks if hasattr(chunk, "keepwarm"))
    assert facts == chunks[-1].keepwarm
    assert facts["ignored"] == ["new"]
    return str(facts["cache"]["reason"])


async def the_async_client() -> None:
    client = openai.AsyncOpenAI(base_url=f"{TARGET.base_url}/v1", api_key=TARGET.key)
    async with client:
        reply = await client.chat.completions.create(
            model=MODEL, messages=[QUESTION], max_tokens=4, stream=True
        )
        assert [chunk async for chunk in reply]


def a_stream_that_is_left_frees_its_agent() -> None:
    asked = {"model": MODEL, "messages": [QUESTION], "user": "openai-left"}
    with CLIENT.chat.completions.create(**asked, max_tokens=400, stream=True) as stream:
        next(iter(stream))
    CLIENT.chat.completions.create(**asked, max_tokens=2)
    assert not get(TARGET, "/v1/agents/openai-left")["running"]


def four_at_once_by_one_name_leave_it_hot() -> str:
    name = "openai-team"

    def ask(messages: Any) -> Any:
        return CLIENT.chat.completions.create(
            model=MODEL, messages=messages, max_tokens=8, temperature=0, user=name
        )

    # Longer than a block: a line with less than that to lose may be given up for another chat.
    messages = [SYSTEM, {"role": "user", "content": QUESTION["content"] * 30}]
    first = ask(messages)
    messages += [first.choices[0].message, {"role": "user", "content": "And another?"}]
    sides = [[{"role": "user", "content": f"Give chat {number} a title."}] for number in range(3)]
    with ThreadPoolExecutor(4) as pool:
        main, *others = pool.map(ask, [messages, *sides])
    assert all(reply.usage.completion_tokens for reply in others)
    assert main.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens
    (agent,) = [row for row in get(TARGET, "/v1/agents")["agents"] if row["id"] == name]
    assert agent["tier"] == "hot"
    messages += [main.choices[0].message, {"role": "user", "content": "And then?"}]
    cached = ask(messages).usage.prompt_tokens_details.cached_tokens
    check_all_is_cached(cached, main.usage.prompt_tokens, main.usage.completion_tokens)
    return f"{agent['tier']}, {agent['num_side_lines']} side lines, {cached} tokens cached"


run(
    models_are_listed,
    a_chat,
    a_streamed_chat_is_the_same_chat,
    usage_that_nobody_asked_for_comes_with_the_end,
    the_stream_helper_builds_the_reply,
    a_second_turn_finds_all_of_the_first,
    parts_and_a_developer_message_are_understood,
    a_picture_in_the_history_is_left_out,
    max_tokens_and_stop_end_a_reply,
    several_choices,
    a_bare_completion,
    errors_are_the_clients_own,
    what_was_reused_is_in_a_header,
    what_was_reused_is_in_every_reply,
    the_async_client,
    a_stream_that_is_left_frees_its_agent,
    four_at_once_by_one_name_leave_it_hot,
)
