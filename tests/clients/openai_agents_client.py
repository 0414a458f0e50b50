"""The `openai-agents` package over chat completions: BASE_URL KEY MODEL."""

from typing import Any

import openai
from agents import Agent, ModelSettings, Runner, function_tool
from agents.models.openai_chatcompletions import OpenAIChatCompletionsModel
from checks import check_all_is_cached, raises, run, target

TARGET = target()
QUESTION = "Name a river and the sea that it ends in."
SETTINGS = ModelSettings(temperature=0, max_tokens=12)
CLIENT = openai.AsyncOpenAI(base_url=f"{TARGET.base_url}/v1", api_key=TARGET.key, max_retries=0)


def model(name: str = TARGET.model) -> OpenAIChatCompletionsModel:
    return OpenAIChatCompletionsModel(name, CLIENT)


def agent(**more: Any) -> Agent:
    fields = {"instructions": "You are terse.", "model": model(), "model_settings": SETTINGS}
    return Agent(name="guide", **{**fields, **more})


@function_tool
def length_of(river: str) -> int:
    """The length of a river in kilometres."""
    return len(river)


async def two_turns_of(who: Agent) -> str:
    first = await Runner.run(who, QUESTION)
    assert first.final_output
    turn = [*first.to_input_list(), {"role": "user", "content": "And another?"}]
    second = await Runner.run(who, turn)
    assert second.final_output
    before, after = (done.context_wrapper.usage for done in (first, second))
    cached = after.input_tokens_details.cached_tokens
    check_all_is_cached(cached, before.input_tokens, before.output_tokens)
    return f"{cached} of {after.input_tokens} tokens cached"


async def two_turns() -> str:
    return await two_turns_of(agent())


async def two_turns_with_a_tool_offered() -> str:
    return await two_turns_of(agent(tools=[length_of], instructions="You are a river guide."))


async def a_streamed_run() -> str:
    streaming = Runner.run_streamed(agent(), QUESTION)
    deltas = [
        event.data.delta
        async for event in streaming.stream_events()
        if event.type == "raw_response_event" and event.data.type == "response.output_text.delta"
    ]
    assert "".join(deltas) == streaming.final_output
    usage = streaming.context_wrapper.usage
    assert usage.input_tokens and usage.output_tokens
    return f"{len(deltas)} deltas, {usage.input_tokens} and {usage.output_tokens} tokens"


async def instructions_are_a_system_message() -> str:
    whole, bare = [
        (await Runner.run(agent(instructions=text), QUESTION)).context_wrapper.usage.input_tokens
        for text in ("You are terse. " * 20, None)
    ]
    assert whole > bare + 40
    return f"{whole} against {bare} tokens"


async def max_tokens_and_stop_end_a_reply() -> str:
    settings = ModelSettings(temperature=0, max_tokens=8)
    whole = await Runner.run(agent(model_settings=settings), QUESTION)
    assert whole.context_wrapper.usage.output_tokens <= 8
    text = whole.final_output
    stop = text[len(text) // 2 :][:2]
    stopping = ModelSettings(temperature=0, max_tokens=8, extra_args={"stop": [stop]})
    stopped = await Runner.run(agent(model_settings=stopping), QUESTION)
    assert stopped.final_output == text[: text.index(stop)]
    return repr(stop)


async def the_model_is_listed() -> None:
    assert [listed.id async for listed in CLIENT.models.list()] == [TARGET.model]


async def an_unknown_model_is_not_found() -> str:
    with raises(openai.NotFoundError) as caught:
        await Runner.run(agent(model=model("no-such-model")), QUESTION)
    return caught[0].message


run(
    the_model_is_listed,
    two_turns,
    two_turns_with_a_tool_offered,
    a_streamed_run,
    instructions_are_a_system_message,
    max_tokens_and_stop_end_a_reply,
    an_unknown_model_is_not_found,
)
