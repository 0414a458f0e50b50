"""Agents and their lines: parallel requests, forks, rollbacks, anonymous requests."""

from typing import Any

import pytest

from engines import (
    FakeFactory,
    assistant,
    completed,
    drain,
    fake_engine,
    generator_of,
    ids,
    main_blocks,
    prompt_of,
    run,
    step,
    user,
)
from keepwarm import BlockPoolBatchEngine
from keepwarm.core.agent import Tier
from keepwarm.core.errors import InvalidRequest
from keepwarm.testing.tokenizer import FakeTokenizer

RENDERED_HELLO = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
LONG = [{"role": "system", "content": "s" * 400}, user("Hello")]


def talk(engine: BlockPoolBatchEngine, agent_id: str, *texts: str) -> None:
    """One turn for each text, begun with the long system message."""
    for position, text in enumerate(texts):
        if position == 0 and agent_id not in engine.book:
            run(engine, agent_id=agent_id, messages=[LONG[0], user(text)], max_tokens=7)
        else:
            run(engine, agent_id=agent_id, append=[user(text)], max_tokens=7)


def ask(engine: BlockPoolBatchEngine, agent_id: str, text: str = "So?") -> Any:
    return run(engine, agent_id=agent_id, append=[user(text)], max_tokens=12)


class TestParallelRequests:
    def test_the_second_gets_a_side_line_and_the_main_line_stays(self) -> None:
        engine = fake_engine()
        talk(engine, "ada", "one")
        main = main_blocks(engine, "ada")
        first = engine.submit(agent_id="ada", append=[user("two")], max_tokens=20)
        step(engine)
        second = engine.submit(agent_id="ada", messages=[user("A title, please")], max_tokens=3)
        events = drain(engine)
        completed(events, first)
        completed(events, second)
        assert main_blocks(engine, "ada") is main
        view = engine.agent("ada")
        assert (view.tier, view.num_side_lines, view.num_turns) == (Tier.HOT, 1, 2)
        assert ask(engine, "ada").cache.tier is Tier.HOT

    def test_both_share_the_blocks_of_what_they_have_in_common(self) -> None:
        factory = FakeFactory()
        engine = fake_engine(factory=factory)
        for text in ("one", "two"):
            engine.submit(agent_id="ada", messages=[LONG[0], user(text)], max_tokens=3)
        drain(engine)
        assert 400 < factory.num_prefilled < 600

    def test_a_side_conversation_goes_on_in_its_line(self) -> None:
        engine = fake_engine()
        talk(engine, "ada", "one")
        title = run(engine, agent_id="ada", messages=[user("t" * 50)], max_tokens=4)
        assert engine.agent("ada").num_side_lines == 1
        messages = [user("t" * 50), assistant(title.text), user("shorter")]
        again = run(engine, agent_id="ada", messages=messages, max_tokens=4)
        assert engine.agent("ada").num_side_lines == 1
        assert again.usage.cached_tokens > 50

    def test_side_lines_are_bounded_and_the_main_line_is_none_of_them(self) -> None:
        engine = fake_engine(max_side_lines=2)
        talk(engine, "ada", "one", "two")
        main = main_blocks(engine, "ada")
        for letter in "abcde":
            run(engine, agent_id="ada", messages=[user(letter * 300)], max_tokens=2)
        assert engine.agent("ada").num_side_lines == 2
        assert main_blocks(engine, "ada") is main
        assert len(engine.tiers._lines) == 3
        assert ask(engine, "ada").cache.tier is Tier.HOT

    def test_many_at_once_all_get_an_answer(self) -> None:
        engine = fake_engine(max_side_lines=1, max_rows=3)
        requests = [
            engine.submit(agent_id="ada", messages=[user(letter * 40)], max_tokens=4)
            for letter in "abcdef"
        ]
        events = drain(engine)
        for request_id in requests:
            completed(events, request_id)
        assert engine.agent("ada").num_side_lines == 1


class TestFork:
    @pytest.mark.parametrize("hot", [True, False])
    def test_parent_and_child_go_on_apart_from_what_they_share(self, hot: bool) -> None:
        engine, witness = fake_engine(), fake_engine()
        for each in (engine, witness):
            talk(each, "ada", "one", "two")
        if not hot:
            engine.demote("ada")
        before = list(main_blocks(engine, "ada").token_ids)
        engine.fork("ada", "bob")
        engine.check()
        child = ask(engine, "bob", "child")
        assert main_blocks(engine, "ada").token_ids == before
        parent = ask(engine, "ada", "parent")
        assert parent.token_ids == ask(witness, "ada", "parent").token_ids
        witness.rollback("ada", turn=2)
        assert child.token_ids == ask(witness, "ada", "child").token_ids
        assert child.cache.tier is Tier.WARM
        assert child.usage.cached_tokens == len(before)

    def test_it_copies_no_more_than_a_tail(self) -> None:
        engine = fake_engine()
        run(engine, agent_id="ada", token_ids=ids(1000), max_tokens=1)
        engine.fork("ada", "bob")
        assert generator_of(engine).num_copied_tokens == 1000 - 768 - 1 + 1
        assert main_blocks(engine, "ada").blocks[0] is main_blocks(engine, "bob").blocks[0]

    def test_at_a_turn_it_knows_what_was_known_then(self) -> None:
        engine, witness = fake_engine(), fake_engine()
        talk(engine, "ada", "one", "two", "three")
        talk(witness, "ada", "one")
        engine.fork("ada", "bob", at_turn=1)
        assert engine.agent("bob").num_turns == 1
        assert engine.agent("ada").num_turns == 3
        assert ask(engine, "bob").token_ids == ask(witness, "ada").token_ids

    def test_deleting_the_parent_leaves_the_child_its_memory(self) -> None:
        engine = fake_engine()
        run(engine, agent_id="ada", token_ids=ids(1000), max_tokens=1)
        engine.fork("ada", "bob")
        engine.delete("ada")
        engine.check()
        done = run(engine, agent_id="bob", token_ids=[*ids(1000), 1], max_tokens=1)
        assert done.usage.cached_tokens >= 999

    def test_editing_the_parent_leaves_the_child_its_memory(self) -> None:
        engine = fake_engine()
        run(engine, agent_id="ada", token_ids=ids(1000), max_tokens=1)
        engine.fork("ada", "bob")
        engine.rollback("ada", turn=0)
        run(engine, agent_id="ada", token_ids=ids(600, 1), max_tokens=1)
        assert (
            run(engine, agent_id="bob", token_ids=ids(1000), max_tokens=1).usage
            == run(fork_of_untouched(), agent_id="bob", token_ids=ids(1000), max_tokens=1).usage
        )

    def test_a_pin_is_not_inherited(self) -> None:
        engine = fake_engine()
        talk(engine, "ada", "one")
        engine.pin("ada")
        engine.fork("ada", "bob")
        assert (engine.agent("ada").pinned, engine.agent("bob").pinned) == (True, False)


def fork_of_untouched() -> BlockPoolBatchEngine:
    engine = fake_engine()
    run(engine, agent_id="ada", token_ids=ids(1000), max_tokens=1)
    engine.fork("ada", "bob")
    return engine


class TestRollback:
    @pytest.mark.parametrize("turn", [1, 2, 3])
    @pytest.mark.parametrize("hot", [True, False])
    def test_then_it_goes_on_as_if_the_rest_had_never_been(self, turn: int, hot: bool) -> None:
        texts = ["one", "two", "three"]
        # Whole characters only: a reply cut off in one is encoded anew by the next turn.
        engine, witness = (fake_engine(factory=FakeFactory(vocab_size=128)) for _ in "ab")
        talk(engine, "ada", *texts)
        talk(witness, "ada", *texts[:turn])
        if not hot:
            engine.demote("ada")
        engine.rollback("ada", turn=turn)
        engine.check()
        assert engine.agent("ada").num_tokens == witness.agent("ada").num_tokens
        assert engine.agent("ada").num_turns == turn
        mine, theirs = ask(engine, "ada"), ask(witness, "ada")
        assert mine.token_ids == theirs.token_ids
        assert mine.usage.prompt_tokens == theirs.usage.prompt_tokens
        assert mine.usage.cached_tokens >= theirs.usage.cached_tokens

    def test_to_the_beginning_nothing_is_left(self) -> None:
        engine = fake_engine()
        talk(engine, "ada", "one", "two")
        engine.rollback("ada", turn=0)
        view = engine.agent("ada")
        assert (view.num_tokens, view.held_tokens, view.num_turns) == (0, 0, 0)
        assert ask(engine, "ada").usage.cached_tokens == 0

    def test_to_a_turn_that_was_given_as_text_the_messages_after_it_are_gone(self) -> None:
        engine = fake_engine()
        first = run(engine, agent_id="ada", text=RENDERED_HELLO, max_tokens=5)
        messages = [user("Hello"), assistant(first.text), user("go on")]
        run(engine, agent_id="ada", messages=messages, max_tokens=5)
        assert engine.agent("ada").num_turns == 2
        engine.rollback("ada", turn=1)
        with pytest.raises(InvalidRequest, match="not given as messages"):
            engine.submit(agent_id="ada", append=[user("go on")])

    def test_to_the_beginning_of_what_was_given_as_text_messages_may_follow(self) -> None:
        engine = fake_engine()
        run(engine, agent_id="ada", text="Once upon a time", max_tokens=5)
        engine.rollback("ada", turn=0)
        ask(engine, "ada", "a new story")

    def test_an_edit_of_an_earlier_message_ends_the_turns_after_it(self) -> None:
        engine = fake_engine()
        talk(engine, "ada", "one", "two", "three")
        messages = list(engine.book.get("ada").main.messages or ())
        messages[3] = user("another two")
        run(engine, agent_id="ada", messages=messages[:4], max_tokens=7)
        assert engine.agent("ada").num_turns == 2

    def test_stripped_thinking_does_not_lose_a_turn(self) -> None:
        engine = fake_engine(
            tokenizer=FakeTokenizer(strip_thinking=True),
            factory=FakeFactory(script=list(b"<think>hm</think>yes")),
        )
        run(engine, agent_id="ada", messages=LONG, max_tokens=20)
        for number in (2, 3):
            run(engine, agent_id="ada", append=[user("more")], max_tokens=20)
            assert engine.agent("ada").num_turns == number
        engine.rollback("ada", turn=1)
        witness = fake_engine(tokenizer=FakeTokenizer(strip_thinking=True))
        messages = [*LONG, assistant("<think>hm</think>yes"), user("So?")]
        theirs = witness.submit(messages=messages, max_tokens=1)
        mine = engine.submit(agent_id="ada", append=[user("So?")], max_tokens=1)
        assert prompt_of(engine, mine)[-20:] == prompt_of(witness, theirs)[-20:]
        assert len(prompt_of(engine, mine)) == len(prompt_of(witness, theirs))


class TestAnonymous:
    def test_a_conversation_without_a_name_finds_its_line(self) -> None:
        engine = fake_engine()
        first = run(engine, messages=LONG, max_tokens=6)
        messages = [*LONG, assistant(first.text), user("go on")]
        second = run(engine, messages=messages, max_tokens=6)
        assert second.cache.tier is Tier.HOT
        assert second.usage.cached_tokens == first.usage.prompt_tokens + 5
        assert engine.agents() == ()

    def test_another_conversation_finds_the_blocks_by_content(self) -> None:
        engine = fake_engine()
        run(engine, messages=LONG, max_tokens=6)
        done = run(engine, messages=[LONG[0], user("Something else, at length")], max_tokens=6)
        assert done.usage.cached_tokens == 256
        assert done.cache.tier is Tier.WARM

    def test_the_blocks_of_agents_are_found_too(self) -> None:
        engine = fake_engine()
        talk(engine, "ada", "one")
        assert run(engine, messages=LONG, max_tokens=6).usage.cached_tokens == 256

    def test_their_lines_are_bounded(self) -> None:
        engine = fake_engine(max_anonymous_lines=3)
        for salt in range(8):
            run(engine, token_ids=ids(300, salt), max_tokens=2)
        assert len(engine.tiers._lines) == 3

    def test_with_no_lines_kept_every_request_still_gets_an_answer(self) -> None:
        engine = fake_engine(max_anonymous_lines=0, max_side_lines=0)
        run(engine, token_ids=ids(300), max_tokens=2)
        assert len(engine.tiers._lines) == 0


def test_a_deleted_agent_leaves_no_bytes() -> None:
    engine = fake_engine()
    talk(engine, "ada", "one", "two")
    run(engine, agent_id="ada", messages=[user("title")], max_tokens=2)
    engine.delete("ada")
    assert engine.agents() == ()
    assert engine.snapshot().pool.num_by_kind.keys() <= {"spare"}
    assert len(engine.tiers.memory.index) == 0
