"""Agents that are created before they speak: settings, system prompt, overflow, receipts."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from engines import (
    assistant,
    completed,
    drain,
    fake_engine,
    main_blocks,
    run,
    scripted,
    user,
)
from keepwarm.core.errors import AgentExists, ContextTooLong, InvalidRequest
from keepwarm.core.events import Started
from keepwarm.core.stored import AgentSettings, Overflow
from keepwarm.engine.requests import ReceiptKey
from stores import opened

DROPPING = AgentSettings(overflow=Overflow.DROP_OLDEST)
SYSTEM = {"role": "system", "content": "Be brief."}
KEY = ReceiptKey("key-1", "digest")


def say(text: str, **more: Any) -> dict[str, Any]:
    return {"agent_id": "ada", "append": [user(text)], "max_tokens": 3, **more}


class TestCreation:
    def test_the_system_prompt_opens_the_conversation(self) -> None:
        engine = scripted(*b"abc")
        engine.create("ada", system="Be brief.")
        run(engine, **say("Hello"))
        (turn,) = engine.turns("ada")
        assert turn.messages == (SYSTEM, user("Hello"), assistant("abc"))
        assert engine.system("ada") == "Be brief."

    def test_it_is_there_before_it_speaks(self, tmp_path: Path) -> None:
        settings = AgentSettings(pinned=True, priority=7, overflow=Overflow.DROP_OLDEST)
        with opened(tmp_path) as setup:
            engine = setup.engine
            engine.create("ada", system="Be brief.", settings=settings)
            drain(engine)
        with opened(tmp_path) as setup:
            engine = setup.engine
            assert engine.settings("ada") == settings
            assert engine.system("ada") == "Be brief."
            assert run(engine, **say("Hello")).durable
            assert engine.agent("ada").pinned

    def test_twice_is_an_error(self) -> None:
        engine = fake_engine()
        engine.create("ada")
        with pytest.raises(AgentExists):
            engine.create("ada")
        assert engine.knows("ada")
        assert not engine.knows("eve")

    def test_rolled_back_to_nothing_it_keeps_its_system_prompt(self) -> None:
        engine = scripted(*b"abc")
        engine.create("ada", system="Be brief.")
        run(engine, **say("Hello"))
        engine.rollback("ada", turn=0)
        run(engine, **say("Again"))
        (turn,) = engine.turns("ada")
        assert turn.messages == (SYSTEM, user("Again"), assistant("abc"))


class TestOverflow:
    @staticmethod
    def talk(engine: Any, num_turns: int) -> list[Any]:
        return [run(engine, **say(f"{turn:02} " + "x" * 30)) for turn in range(num_turns)]

    def test_an_agent_refuses_unless_it_may_forget(self) -> None:
        engine = fake_engine(max_context_tokens=256)
        engine.create("ada", system="Be brief.")
        with pytest.raises(ContextTooLong):
            self.talk(engine, 12)
        assert engine.turns("ada")

    def test_the_oldest_turns_go_and_the_system_prompt_stays(self) -> None:
        engine = fake_engine(max_context_tokens=256)
        engine.create("ada", system="Be brief.", settings=DROPPING)
        ends = self.talk(engine, 12)
        dropped = [end.num_dropped_turns for end in ends]
        assert sum(number > 0 for number in dropped) >= 2
        assert dropped[0] == 0
        messages = engine.turns("ada")[-1].messages
        assert messages is not None
        assert messages[0] == SYSTEM
        assert messages[1]["role"] == "user"
        assert str(messages[-2]["content"]).startswith("11 ")
        spoken = [str(m["content"])[:2] for m in messages if m["role"] == "user"]
        assert spoken == [f"{turn:02}" for turn in range(12)][-len(spoken) :]
        engine.check()

    def test_it_forgets_enough_for_some_turns_to_come(self) -> None:
        engine = fake_engine(max_context_tokens=512)
        engine.create("ada", settings=DROPPING)
        dropped = [end.num_dropped_turns > 0 for end in self.talk(engine, 24)]
        assert not any(one and other for one, other in itertools.pairwise(dropped))

    def test_a_message_that_never_fits_is_an_error(self) -> None:
        engine = fake_engine(max_context_tokens=256)
        engine.create("ada", settings=DROPPING)
        self.talk(engine, 3)
        with pytest.raises(ContextTooLong):
            run(engine, **say("x" * 300))
        assert len(engine.turns("ada")) == 3


class TestReceipts:
    def test_a_turn_is_found_by_its_key_after_a_restart(self, tmp_path: Path) -> None:
        with opened(tmp_path) as setup:
            engine = setup.engine
            engine.create("ada")
            first = run(engine, **say("Hello", receipt_key=KEY))
            run(engine, **say("More"))
        with opened(tmp_path) as setup:
            engine = setup.engine
            turn = engine.receipt("ada", "key-1")
            assert turn is not None
            assert turn.messages is not None
            assert turn.messages[-1]["content"] == first.text
            assert turn.receipt is not None
            assert turn.receipt.digest == "digest"
            assert turn.receipt.prompt_tokens == first.usage.prompt_tokens
            assert engine.receipt("ada", "key-2") is None
            assert engine.receipt("eve", "key-1") is None

    def test_a_cancelled_request_leaves_none(self) -> None:
        engine = fake_engine()
        engine.create("ada")
        request_id = engine.submit(**say("Hello", max_tokens=50, receipt_key=KEY))
        while not engine.turns("ada"):
            engine.step()
            if engine.batch.counters.decoded_tokens > 3:
                engine.cancel(request_id)
        drain(engine)
        assert engine.receipt("ada", "key-1") is None


class TestNamespaces:
    PROMPT = (user("x" * 600),)

    def test_nothing_is_shared_across(self) -> None:
        engine = fake_engine()
        names = ("ada", "team/ada", "other/ada", "ada")
        cached = [
            run(engine, agent_id=name, messages=self.PROMPT, max_tokens=2).usage.cached_tokens
            for name in names
        ]
        assert cached[:3] == [0, 0, 0]
        assert cached[3]
        assert main_blocks(engine, "team/ada").namespace == "team"
        engine.check()

    def test_nor_among_those_without_a_name(self) -> None:
        engine = fake_engine()
        cached = [
            run(engine, messages=self.PROMPT, max_tokens=2, namespace=name).usage.cached_tokens
            for name in ("", "team", "other", "team")
        ]
        assert cached[:3] == [0, 0, 0]
        assert cached[3]

    def test_agents_of_one_share_with_each_other(self) -> None:
        engine = fake_engine()
        run(engine, agent_id="team/ada", messages=self.PROMPT, max_tokens=2)
        other = run(engine, agent_id="team/eve", messages=self.PROMPT, max_tokens=2)
        assert other.usage.cached_tokens >= 512

    @pytest.mark.parametrize("name", ["import:1/ada", "a/b/c", "/ada", "ada/", "team /ada"])
    def test_a_wrong_one_is_an_error(self, name: str) -> None:
        with pytest.raises(InvalidRequest, match="agent"):
            fake_engine().submit(agent_id=name, messages=self.PROMPT)

    def test_they_outlive_a_restart(self, tmp_path: Path) -> None:
        request = {"agent_id": "team/ada", "messages": self.PROMPT, "max_tokens": 2}
        with opened(tmp_path) as setup:
            engine = setup.engine
            run(engine, **request)
            engine.close()
        with opened(tmp_path) as setup:
            engine = setup.engine
            assert not engine.agent("team/ada").is_private
            stranger = run(engine, agent_id="eve", messages=self.PROMPT, max_tokens=2)
            assert stranger.usage.cached_tokens == 0
            assert run(engine, **request).usage.cached_tokens >= 512


class TestWhereItDiverged:
    HISTORY = (SYSTEM, user("One"), assistant("Uno"), user("Two"), assistant("Dos"), user("Three"))

    def message_of(self, changed: Sequence[Any]) -> int | None:
        engine = scripted(*b"Tres")
        run(engine, agent_id="ada", messages=self.HISTORY, max_tokens=4)
        return run(engine, agent_id="ada", messages=changed, max_tokens=4).cache.message

    @pytest.mark.parametrize("index", range(6))
    def test_the_message_that_was_edited(self, index: int) -> None:
        changed = [dict(message) for message in self.HISTORY]
        changed[index]["content"] += "!"
        assert self.message_of(changed) == index

    def test_the_message_that_is_new(self) -> None:
        assert self.message_of([*self.HISTORY, assistant("Tres"), user("Four")]) == 7

    def test_none_when_all_is_known(self) -> None:
        assert self.message_of(self.HISTORY) is None

    def test_the_first_of_a_new_line(self) -> None:
        engine = fake_engine()
        assert run(engine, messages=self.HISTORY, max_tokens=2).cache.message == 0
        assert run(engine, text="bare", max_tokens=2).cache.message is None


def test_a_request_starts_once_and_says_what_it_found() -> None:
    engine = fake_engine()
    request_id = engine.submit(agent_id="ada", messages=[user("x" * 700)], max_tokens=2)
    events = drain(engine)
    (started,) = [event for event in events if isinstance(event, Started)]
    assert started.cache.cached_tokens == 0
    second = engine.submit(agent_id="eve", messages=[user("x" * 700)], max_tokens=2)
    events = drain(engine)
    (started,) = [event for event in events if isinstance(event, Started)]
    assert started.request_id == second
    assert started.cache == completed(events, second).cache
    assert request_id != second
