"""Long prompts are read beside the engine's thread, and only what a line does not know."""

import asyncio
import threading
from collections import Counter
from typing import Any

import pytest

from doors import (
    Opener,
    cancel,
    check_is_empty,
    end_of,
    engine_of,
    message,
    reply,
    run,
    text,
    until,
)
from engines import assistant, fake_engine, user
from keepwarm.core.errors import ContextTooLong, InvalidRequest, QueueFull, QueueTimeout
from keepwarm.core.events import Completed
from keepwarm.core.stored import AgentSettings, Overflow
from keepwarm.engine.prompt.limits import READ_HERE_CHARACTERS
from keepwarm.engine.prompt.prompt_encoder import ENCODED_HERE, Cancelled
from keepwarm.engine.prompt.prompt_reader import ReadElsewhere
from keepwarm.engine.prompt.reader_threads import Readers
from keepwarm.engine.requests import GenerateRequest, PromptSource
from keepwarm.engine.turn.intake import Reading
from keepwarm.testing.tokenizer import FakeTokenizer
from waiting import PATIENCE_S

ENGINE_THREAD = "keepwarm-engine"
GATE = "<gate>"
WORDS = "Hello world. " * 200  # 2,600 characters: less than what may be encoded at once


class WatchedTokenizer(FakeTokenizer):
    """Counts what each thread encodes and renders; texts with a gate wait at it."""

    def __init__(self) -> None:
        super().__init__()
        object.__setattr__(self, "encoded", Counter())
        object.__setattr__(self, "num_encoded", Counter())
        object.__setattr__(self, "rendered", Counter())
        object.__setattr__(self, "at_gate", threading.Event())
        object.__setattr__(self, "gate", threading.Event())

    encoded: "Counter[str]"
    num_encoded: "Counter[str]"
    rendered: "Counter[str]"
    at_gate: threading.Event
    gate: threading.Event

    def encode(self, text: str) -> list[int]:
        name = threading.current_thread().name
        self.encoded[name] += len(text)
        self.num_encoded[name] += 1
        if GATE in text:
            assert name != ENGINE_THREAD
            self.at_gate.set()
            assert self.gate.wait(PATIENCE_S)
        return super().encode(text)

    def render(self, messages: Any, **options: Any) -> Any:
        self.rendered[threading.current_thread().name] += sum(
            len(m.get("content") or "") for m in messages
        )
        return super().render(messages, **options)

    def forget(self) -> None:
        for counter in (self.encoded, self.num_encoded, self.rendered):
            counter.clear()

    @property
    def elsewhere(self) -> int:
        """How many characters other threads have encoded."""
        return self.encoded.total() - self.encoded[ENGINE_THREAD]


def long_chat(num_messages: int = 9, content: str = WORDS) -> list[dict[str, str]]:
    speakers = (user, assistant)
    return [speakers[n % 2](f"{n} {content}") for n in range(num_messages)]


def opener(tokenizer: FakeTokenizer, **options: Any) -> Opener:
    return Opener(tokenizer=tokenizer, **options)


def chat(messages: list[dict[str, str]], **more: Any) -> GenerateRequest:
    return GenerateRequest(**{"messages": messages, "max_tokens": 4, **more})


@pytest.fixture
def tokenizer() -> WatchedTokenizer:
    return WatchedTokenizer()


LONG_TEXT = WORDS * 40


@pytest.mark.parametrize(
    "request_",
    [
        chat(long_chat()),
        chat(long_chat(), agent_id="ada"),
        chat([user(LONG_TEXT)], agent_id="ada"),
        chat([*long_chat(), assistant("I think")], continue_final_message=True),
        text(LONG_TEXT),
        text("<|im_start|>".join(f"{n} {WORDS}" for n in range(40))),
        message(LONG_TEXT),
        message(WORDS * 20),
    ],
    ids=lambda request: repr(request)[:60],
)
def test_the_engine_s_thread_encodes_no_more_than_a_step_takes(
    tokenizer: WatchedTokenizer, request_: GenerateRequest
) -> None:
    async def test() -> None:
        async with engine_of(opener(tokenizer)) as engine:
            if request_.agent_id is not None:
                await engine.call(lambda fleet: fleet.of(None).create("ada"))
            end = await reply(engine, request_)
            assert tokenizer.encoded[ENGINE_THREAD] <= ENCODED_HERE
            assert tokenizer.elsewhere > 5 * ENCODED_HERE
            plain = fake_engine()
            if request_.agent_id is not None:
                plain.create("ada")
            plain.submit(**request_.arguments())
            assert plain._turns.active.popitem()[1].sequence.num_prompt_tokens == (
                end.usage.prompt_tokens
            )

    run(test())


def test_nor_does_it_render_a_long_conversation(tokenizer: WatchedTokenizer) -> None:
    messages = long_chat(60)

    async def test() -> None:
        async with engine_of(opener(tokenizer)) as engine:
            for _ in range(2):
                await reply(engine, chat(messages, agent_id="ada"))
                messages[20]["content"] += " edited"  # the report says which message that is
            assert tokenizer.rendered[ENGINE_THREAD] == 0

    run(test())


def test_the_message_where_a_long_conversation_was_edited_is_known(
    tokenizer: WatchedTokenizer,
) -> None:
    messages = long_chat(60)

    async def test() -> None:
        async with engine_of(opener(tokenizer)) as engine:
            await reply(engine, chat(messages, agent_id="ada"))
            messages[58]["content"] += " edited"
            end = await reply(engine, chat(messages, agent_id="ada"))
            assert end.cache.message == 58

    run(test())


def test_a_hot_prompt_is_not_encoded_again(tokenizer: WatchedTokenizer) -> None:
    messages = long_chat()

    async def test() -> None:
        async with engine_of(opener(tokenizer)) as engine:
            # Another conversation, which begins otherwise: comparing with it encodes nothing.
            await reply(engine, chat([user(f"other {WORDS}"), *long_chat()[1:]]))
            end = await reply(engine, chat(messages))
            tokenizer.forget()
            more = [*messages, assistant(end.text), user("And then?")]
            again = await reply(engine, chat(more))
            assert again.usage.cached_tokens >= end.usage.prompt_tokens
            assert tokenizer.encoded.total() < 100
            assert not tokenizer.elsewhere

    run(test())


def test_so_it_is_where_only_its_reader_is_elsewhere(tokenizer: WatchedTokenizer) -> None:
    messages = long_chat(60)

    async def test() -> None:
        async with engine_of(opener(tokenizer)) as engine:
            end = await reply(engine, chat(messages, agent_id="ada"))
            tokenizer.forget()
            more = [*messages, assistant(end.text), user("And then?")]
            again = await reply(engine, chat(more, agent_id="ada"))
            assert again.usage.cached_tokens >= end.usage.prompt_tokens
            assert tokenizer.encoded.total() < 100

    run(test())


def test_others_get_their_tokens_while_a_long_prompt_is_encoded(
    tokenizer: WatchedTokenizer,
) -> None:
    async def test() -> None:
        async with engine_of(opener(tokenizer)) as engine:
            reading = asyncio.create_task(reply(engine, chat([user(GATE + LONG_TEXT)])))
            await until(tokenizer.at_gate.is_set)
            for _ in range(3):
                end = await reply(engine, text(max_tokens=50))
                assert end.usage.completion_tokens == 50
            assert not reading.done()
            tokenizer.gate.set()
            assert (await reading).usage.completion_tokens == 4

    run(test())


@pytest.mark.parametrize("append", [False, True])
def test_hanging_up_ends_it_between_two_texts(tokenizer: WatchedTokenizer, append: bool) -> None:
    messages = [user(GATE + WORDS * 2), *long_chat()[1:]]

    async def test() -> None:
        opened = opener(tokenizer)
        async with engine_of(opened) as engine:
            await engine.call(lambda fleet: fleet.of(None).create("ada"))
            field = "append" if append else "messages"
            request = GenerateRequest(**{"agent_id": "ada", field: messages, "max_tokens": 4})
            task = asyncio.create_task(engine.submit(request))
            await until(tokenizer.at_gate.is_set)
            await cancel(task)
            num_encoded = tokenizer.num_encoded.total()
            tokenizer.gate.set()
            await reply(engine, chat([user(LONG_TEXT)]))  # by the same threads
            await reply(engine, chat([user(LONG_TEXT)]))
            assert tokenizer.num_encoded.total() < num_encoded + 10
            await until(lambda: engine.num_requests == 0)
            check_is_empty(opened.opened[0])
            await reply(engine, message(agent_id="ada"))  # whose turn it is

    run(test())


def test_what_waits_for_a_reader_may_hang_up_as_well(tokenizer: WatchedTokenizer) -> None:
    async def test() -> None:
        async with engine_of(opener(tokenizer)) as engine:
            requests = [chat([user(f"{n} {GATE} {LONG_TEXT}")]) for n in range(6)]
            tasks = [asyncio.create_task(engine.submit(request)) for request in requests]
            await until(tokenizer.at_gate.is_set)
            for task in tasks:
                await cancel(task)
            tokenizer.gate.set()
            await reply(engine, chat([user(LONG_TEXT)]))
            await until(lambda: engine.num_requests == 0)

    run(test())


def test_a_conversation_that_went_on_meanwhile_is_read_again(tokenizer: WatchedTokenizer) -> None:
    async def test() -> None:
        async with engine_of(opener(tokenizer)) as engine:
            first = await reply(engine, chat([user("Hello")], agent_id="ada"))
            appending = asyncio.create_task(reply(engine, message(GATE + LONG_TEXT)))
            await until(tokenizer.at_gate.is_set)
            said = [user("Hello"), assistant(first.text), user("And?")]
            second = await reply(engine, chat(said, agent_id="ada"))
            tokenizer.gate.set()
            end = await appending
            turns = await engine.call_at("ada", lambda at: at.turns("ada"))
            whole = [*said, assistant(second.text), user(GATE + LONG_TEXT), assistant(end.text)]
            assert list(turns[-1].messages or ()) == whole

    run(test())


def test_dropping_the_oldest_turns_is_worked_out_elsewhere(tokenizer: WatchedTokenizer) -> None:
    settings = AgentSettings(overflow=Overflow.DROP_OLDEST)
    turns = 12

    async def test() -> None:
        async with engine_of(opener(tokenizer, max_context_tokens=8000)) as engine:
            await engine.call(lambda fleet: fleet.of(None).create("ada", settings=settings))
            ends = [await reply(engine, message(f"{n} {WORDS}")) for n in range(turns)]
            tokenizer.forget()
            ends.append(await reply(engine, message(WORDS * 2)))
            assert tokenizer.encoded[ENGINE_THREAD] <= ENCODED_HERE
            assert sum(end.num_dropped_turns for end in ends) > 0

        plain = fake_engine(max_context_tokens=8000)
        plain.create("ada", settings=settings)
        for number, end in enumerate(ends):
            content = f"{number} {WORDS}" if number < turns else WORDS * 2
            request_id = plain.submit(agent_id="ada", append=[user(content)], max_tokens=4)
            events = []
            while plain.has_work:
                events += plain.step()
            (same,) = [e for e in events if isinstance(e, Completed) and e.request_id == request_id]
            assert same.num_dropped_turns == end.num_dropped_turns
            assert same.usage.prompt_tokens == end.usage.prompt_tokens

    run(test())


def test_counting_is_done_elsewhere(tokenizer: WatchedTokenizer) -> None:
    source = PromptSource(messages=long_chat())

    async def test() -> None:
        async with engine_of(opener(tokenizer)) as engine:
            counted = await engine.count_tokens("fake", source)
            assert counted == fake_engine().count_tokens(messages=long_chat())
            assert not tokenizer.encoded[ENGINE_THREAD]
            assert not tokenizer.rendered[ENGINE_THREAD]
            with pytest.raises(InvalidRequest):
                await engine.count_tokens("fake", PromptSource(messages=[]))

    run(test())


# -- before waiting --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content", [LONG_TEXT * 2, "word " * 6000], ids=["counted", "counted here"]
)
def test_what_is_too_long_does_not_wait_for_the_agent_s_turn(content: str) -> None:
    async def test() -> None:
        async with engine_of(Opener(max_context_tokens=30_000)) as engine:
            await engine.call(lambda fleet: fleet.of(None).create("ada"))
            running = await engine.submit(message(max_tokens=None))
            with pytest.raises(ContextTooLong):
                await engine.submit(message(content))
            assert not running.has_ended
            waiting = asyncio.create_task(reply(engine, message("short")))
            await asyncio.sleep(0.01)
            running.hang_up()
            assert isinstance(await end_of(running), Completed)
            await waiting

    run(test())


def test_one_that_takes_long_to_read_keeps_its_place(tokenizer: WatchedTokenizer) -> None:
    async def test() -> None:
        async with engine_of(opener(tokenizer)) as engine:
            await engine.call(lambda fleet: fleet.of(None).create("ada"))
            running = await engine.submit(message(max_tokens=None))
            first = asyncio.create_task(reply(engine, message(GATE + LONG_TEXT)))
            await until(tokenizer.at_gate.is_set)
            second = asyncio.create_task(reply(engine, message("short")))
            running.hang_up()
            await end_of(running)
            tokenizer.gate.set()
            turns = (await first).turn or 0, (await second).turn or 0
            assert 0 < turns[0] < turns[1]

    run(test())


def test_who_waits_for_a_turn_may_hang_up_whatever_is_looked_at(
    tokenizer: WatchedTokenizer,
) -> None:
    async def test() -> None:
        async with engine_of(opener(tokenizer)) as engine:
            await engine.call(lambda fleet: fleet.of(None).create("ada"))
            running = await engine.submit(message(max_tokens=None))
            waiting = asyncio.create_task(engine.submit(message(GATE + LONG_TEXT)))
            await until(tokenizer.at_gate.is_set)
            await cancel(waiting)
            tokenizer.gate.set()
            running.hang_up()
            await end_of(running)
            assert (await reply(engine, message("short"))).turn

    run(test())


def test_a_prompt_waits_for_its_reader_no_longer_than_for_its_row(
    tokenizer: WatchedTokenizer,
) -> None:
    async def test() -> None:
        async with engine_of(opener(tokenizer)) as engine:
            with pytest.raises(QueueTimeout):
                await engine.submit(chat([user(GATE + LONG_TEXT)], queue_timeout_s=0.05))
            tokenizer.gate.set()
            await reply(engine, text())

    run(test())


# -- the parts -------------------------------------------------------------------------------------


def test_a_direct_caller_has_everything_done_in_its_own_thread(tokenizer: WatchedTokenizer) -> None:
    engine = fake_engine(tokenizer=tokenizer)
    engine.submit(messages=long_chat(60))
    assert list(tokenizer.encoded) == [threading.current_thread().name]


def test_nothing_is_done_for_a_long_prompt_before_it_is_sent_elsewhere(
    tokenizer: WatchedTokenizer,
) -> None:
    engine = fake_engine(tokenizer=tokenizer)
    for source in ({"text": "x" * (READ_HERE_CHARACTERS + 1)}, {"messages": long_chat(65, "x")}):
        with pytest.raises(ReadElsewhere):
            engine.submit(**source, reading=Reading())
    assert not tokenizer.encoded.total()
    assert not tokenizer.rendered.total()
    assert not engine.has_work


def test_a_job_that_is_called_off_stops_at_its_next_text() -> None:
    readers = Readers(1)
    begun, go_on = threading.Event(), threading.Event()

    def work(guard: Any) -> None:
        guard(0)
        begun.set()
        assert go_on.wait(PATIENCE_S)
        guard(10)

    job, behind = readers.begin(work), readers.begin(work)
    assert begun.wait(PATIENCE_S)
    job.cancel()
    behind.cancel()
    go_on.set()
    with pytest.raises(Cancelled):
        job.answer.result(PATIENCE_S)
    assert behind.answer.cancelled()
    assert readers.begin(lambda guard: 7).answer.result(PATIENCE_S) == 7


def test_only_so_many_wait_for_a_reader() -> None:
    readers = Readers(1, max_waiting=2)
    begun, go_on = threading.Event(), threading.Event()

    def work(guard: Any) -> None:
        begun.set()
        assert go_on.wait(PATIENCE_S)

    jobs = [readers.begin(work)]
    assert begun.wait(PATIENCE_S)
    jobs += [readers.begin(work), readers.begin(work)]
    with pytest.raises(QueueFull):
        readers.begin(work)
    go_on.set()
    for job in jobs:
        job.answer.result(PATIENCE_S)


def test_what_a_reader_raises_is_raised_where_it_was_asked_for() -> None:
    def fail(guard: Any) -> None:
        raise InvalidRequest("messages", "are wrong")

    with pytest.raises(InvalidRequest):
        Readers(1).begin(fail).answer.result(PATIENCE_S)
