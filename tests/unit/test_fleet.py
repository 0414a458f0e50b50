"""Several engines over one store: models come and go, and no agent loses anything."""

import random
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path

import pytest

from engines import BLOCK_BYTES, fresh_reply, ids, user
from fleets import BUDGET_BYTES, NAMES, Setup, create, new_engine, opened
from keepwarm import AgentCacheStore
from keepwarm.core.agent import Tier
from keepwarm.core.errors import (
    AgentBusy,
    AgentLeaving,
    InvalidRequest,
    OtherWeights,
    UnknownAgent,
    UnknownModel,
    VerifyInterrupted,
)
from keepwarm.core.events import Failed
from keepwarm.core.stored import AgentState
from keepwarm.fleet.fleet import Fleet
from keepwarm.kv.verifier import VerifyReport


@pytest.fixture
def setup(tmp_path: Path) -> Iterator[Setup]:
    with opened(tmp_path) as setup:
        yield setup


class TestSwap:
    def test_an_agent_goes_on_where_it_was(self, setup: Setup) -> None:
        prompt = ids(900)
        first = setup.run(agent_id="ada", token_ids=prompt, max_tokens=9)
        setup.fleet.detach("small")
        setup.attach("other")
        setup.run("other", agent_id="eve", token_ids=ids(500, 7), max_tokens=5)
        setup.fleet.detach("other")
        setup.attach("small")
        again = setup.run(agent_id="ada", token_ids=[*prompt, *first.token_ids, 5], max_tokens=9)
        assert again.cache.tier is Tier.COLD
        assert again.cache.cached_tokens == 900 + 9 - 1

    def test_nothing_stays_in_memory(self, setup: Setup) -> None:
        for number in range(4):
            setup.run(agent_id=f"a{number}", token_ids=ids(700, number), max_tokens=9)
        setup.run(token_ids=ids(300, 9), max_tokens=3)
        assert setup.fleet.detach("small")
        engine = setup.fleet.engine("small")
        assert engine.tiers.pool.used_bytes == 0
        assert engine.is_suspended
        assert not setup.fleet.has_work

    @pytest.mark.parametrize("steps", [0, 1, 2, 3, 5, 9, 20])
    def test_a_reply_is_interrupted_anywhere_and_ends_the_same(
        self, setup: Setup, steps: int
    ) -> None:
        prompt = ids(1100)
        expected = fresh_reply(prompt, max_tokens=30)
        request = setup.start(agent_id="ada", token_ids=prompt, max_tokens=30)
        setup.step(steps)
        for _ in range(3):
            setup.fleet.detach("small")
            setup.step(3)
            assert request not in setup.ended
            setup.attach("small")
            setup.step(2)
        assert setup.finish(request).token_ids == expected

    def test_one_that_is_cancelled_while_its_model_is_away_ends(self, setup: Setup) -> None:
        request = setup.start(agent_id="ada", token_ids=ids(600), max_tokens=50)
        setup.step(5)
        setup.fleet.detach("small")
        assert setup.fleet.cancel(request)
        assert setup.finish(request).finish_reason == "cancelled"
        setup.attach("small")
        assert not setup.fleet.engine("small")._turns.active

    def test_other_weights_fail_what_ran_and_keep_what_was_said(self, setup: Setup) -> None:
        create(setup, "ada")
        setup.say("ada", "Hello")
        request = setup.start(agent_id="eve", token_ids=ids(600), max_tokens=50)
        setup.step(4)
        setup.fleet.detach("small")
        setup.attach("small", fingerprint="others")
        setup.step()
        failed = setup.ended[request]
        assert isinstance(failed, Failed)
        assert isinstance(failed.error, OtherWeights)
        again = setup.say("ada", "And now?")
        assert again.cache.cached_tokens == 0
        assert again.turn == 2
        assert len(setup.fleet.of("ada").turns("ada")) == 2

    def test_a_turn_that_waits_for_the_disk_ends_though_its_weights_are_replaced(
        self, setup: Setup, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        create(setup, "ada")
        setup.settle()
        with monkeypatch.context() as patch:
            patch.setattr(setup.store, "poll", lambda: None)
            request = setup.start(agent_id="ada", append=[user("Hello")], max_tokens=3)
            while not setup.fleet.engine("small")._commits.is_committing:
                setup.step()
            setup.fleet.detach("small", 0.01)
            setup.attach("small", fingerprint="others")
            assert setup.fleet.has_work
        assert setup.finish(request).durable
        assert len(setup.fleet.of("ada").turns("ada")) == 1
        setup.settle()

    def test_a_verification_ends_when_its_weights_are_replaced(self, setup: Setup) -> None:
        create(setup, "ada")
        setup.say("ada", "Hello " * 300)
        setup.settle()
        setup.fleet.detach("small")
        answer: Future[VerifyReport] = Future()
        setup.fleet.engine("small").begin_verify("ada", answer)
        setup.attach("small", fingerprint="others")
        assert isinstance(answer.exception(0), VerifyInterrupted)
        assert not setup.fleet.has_work

    def test_an_agent_is_not_read_before_there_is_a_model(self, setup: Setup) -> None:
        create(setup, "ada")
        setup.settle()
        fleet = Fleet(new_engine, default="small", store=setup.store, budget_bytes=BUDGET_BYTES)
        with pytest.raises(UnknownModel):
            fleet.of("ada")
        with pytest.raises(UnknownModel):
            fleet.delete("ada")

    def test_an_unknown_model(self, setup: Setup) -> None:
        with pytest.raises(UnknownModel):
            setup.start("nobody", token_ids=[1])


class TestTwoModels:
    def test_what_was_said_goes_with_the_agent_and_kv_waits_for_it(self, setup: Setup) -> None:
        setup.attach("other")
        create(setup, "ada")
        first = setup.say("ada", "Hello " * 80)
        assert first.turn == 1
        second = setup.say("ada", "More " * 80, "other")
        assert second.turn == 2
        assert second.cache.cached_tokens == 0
        assert setup.fleet.of("ada").model == "other"
        third = setup.say("ada", "Again " * 80, "small")
        assert third.turn == 3
        assert third.cache.tier is Tier.HOT
        assert third.cache.cached_tokens >= first.usage.prompt_tokens
        messages = setup.fleet.of("ada").turns("ada")[-1].messages
        assert messages is not None
        assert [m["role"] for m in messages] == ["user", "assistant"] * 3

    def test_after_a_restart_the_last_words_count(self, tmp_path: Path) -> None:
        for turn, model in enumerate(["small", "other", "small", "other", "small"], 1):
            with opened(tmp_path) as setup:
                setup.attach("other")
                if turn == 1:
                    create(setup, "ada")
                said = setup.say("ada", f"number {turn} " * 40, model)
                assert said.turn == turn
                messages = setup.fleet.of("ada").turns("ada")[-1].messages
                assert messages is not None
                assert len(messages) == 2 * turn
                if turn > 2:
                    assert said.cache.cached_tokens > 0
                assert setup.fleet.close()

    def test_after_a_restart_the_model_that_answered_last_answers(self, tmp_path: Path) -> None:
        with opened(tmp_path) as setup:
            setup.attach("other")
            create(setup, "ada", "bob")
            for agent, model in (("ada", "other"), ("bob", "other"), ("bob", "small")):
                setup.say(agent, "Hello", model)
            assert setup.fleet.close()
        with opened(tmp_path) as setup:
            fleet = setup.fleet
            models = {view.agent_id: view.model for view in fleet.agents()}
            assert models == {"ada": "other", "bob": ""}
            assert [fleet.model_of(agent) for agent in models] == ["other", "small"]
            fleet.of("ada").configure("ada", priority=3)  # needs no model
            fleet.fork("ada", "eve")
            setup.attach("other")
            for agent in ("ada", "eve"):
                assert fleet.model_of(agent) == "other"
                assert setup.say(agent, "And now?").turn == 2
                assert fleet.of(agent).model == "other"
            assert setup.say("ada", "And here?", "small").turn == 3
            assert fleet.model_of("ada") == "small"

    def test_what_computes_after_a_restart_is_where_the_agent_is(self, tmp_path: Path) -> None:
        with opened(tmp_path) as setup:
            setup.attach("other")
            create(setup, "ada")
            setup.say("ada", "Hello " * 100, "small")
            setup.say("ada", "Hello " * 100, "other")
            assert setup.fleet.close()
        with opened(tmp_path) as setup:
            assert setup.fleet.model_of("ada") == "other"
            setup.attach("other")
            setup.fleet.bring("ada", "other").prefetch("ada")
            while setup.fleet.has_work:
                setup.step()
            assert setup.fleet.of("ada").agent("ada").tier is Tier.HOT
            setup.fleet.of("ada").park("ada")
            setup.settle()
            setup.step(2)
            assert setup.fleet.engine("other").agent("ada").tier is Tier.COLD

    def test_a_request_that_is_called_off_before_its_first_token_changes_nothing(
        self, setup: Setup
    ) -> None:
        setup.attach("other")
        create(setup, "ada")
        setup.say("ada", "Hello", "small")
        request = setup.start("other", agent_id="ada", token_ids=ids(900), max_tokens=3)
        setup.step()
        setup.fleet.cancel(request)
        setup.step(3)
        assert setup.fleet.model_of("ada") == "small"
        assert setup.say("ada", "And now?").turn == 2
        assert setup.fleet.of("ada").model == "small"

    def test_an_agent_of_two_tokenizers_is_exported(self, setup: Setup, tmp_path: Path) -> None:
        setup.attach("other")
        create(setup, "ada")
        for model in ("small", "other", "small"):
            setup.say("ada", "Hello", model)
        setup.fleet.of("ada").export("ada", tmp_path / "ada.kw")
        with pytest.raises(UnknownAgent):
            setup.fleet.of("eve").turns("eve")
        setup.import_agent(tmp_path / "ada.kw", "eve")
        assert len(setup.fleet.of("eve").turns("eve")) == 3
        assert setup.say("eve", "And you?").turn == 4

    def test_what_was_taken_back_does_not_come_back_with_a_bundle(
        self, setup: Setup, tmp_path: Path
    ) -> None:
        setup.attach("other")
        create(setup, "ada")
        for model in ("small", "other", "other", "small"):
            setup.say("ada", "Hello", model)
        setup.fleet.of("ada").rollback("ada", turn=1)
        setup.fleet.of("ada").export("ada", tmp_path / "ada.kw")
        setup.import_agent(tmp_path / "ada.kw", "eve")
        assert len(setup.fleet.of("eve").turns("eve")) == 1

    def test_beside_its_talk_with_one_model_another_is_asked_in_its_name(
        self, setup: Setup
    ) -> None:
        setup.attach("other")
        running = setup.start("small", agent_id="ada", token_ids=ids(300), max_tokens=400)
        setup.step(5)
        title = setup.run("other", agent_id="ada", token_ids=ids(40, 3), max_tokens=4)
        assert title.agent_id is None
        assert setup.fleet.model_of("ada") == "small"
        with pytest.raises(AgentBusy):
            setup.say("ada", "Hello", "other")
        assert len(setup.finish(running).token_ids) == 400

    def test_deleted_everywhere(self, setup: Setup) -> None:
        setup.attach("other")
        create(setup, "ada")
        setup.say("ada", "Hello")
        setup.say("ada", "Hello", "other")
        gone = setup.fleet.delete("ada")
        assert gone.durable is None
        with pytest.raises(AgentLeaving):
            setup.start("", agent_id="ada", append=[{"role": "user", "content": "And now?"}])
        setup.settle()
        assert gone.durable
        assert "ada" not in [view.agent_id for view in setup.fleet.agents()]
        with pytest.raises(UnknownAgent):
            setup.say("ada", "Hello")

    def test_a_request_that_is_refused_moves_no_agent(self, setup: Setup) -> None:
        setup.attach("other")
        create(setup, "ada")
        setup.say("ada", "Hello", "small")
        where = setup.fleet.of("ada")
        with pytest.raises(InvalidRequest):  # found when it is there: it moves back
            setup.start("other", agent_id="ada", append=[])
        with pytest.raises(UnknownAgent):
            setup.say("nobody", "Hello", "other")
        assert setup.fleet.of("ada") is where
        assert setup.fleet.model_of("ada") == "small"
        assert setup.fleet.model_of("nobody") == "small"
        assert setup.say("ada", "And now?").turn == 2

    def test_a_pin_at_another_engine_is_the_agents_own(self, setup: Setup) -> None:
        setup.attach("other")
        create(setup, "ada")
        setup.say("ada", "Hello")
        setup.fleet.engine("other").pin("ada")
        assert setup.fleet.book.get("ada").main.blocks.pinned
        setup.fleet.check()

    def test_the_side_line_used_last_is_kept_at_any_model(self, tmp_path: Path) -> None:
        with opened(tmp_path, new_engine=partial(new_engine, max_side_lines=2)) as setup:
            setup.attach("other")

            def aside(model: str, content: str) -> None:
                messages = [user(content * 30)]
                setup.run(model, agent_id="ada", messages=messages, max_tokens=3)

            create(setup, "ada")
            setup.say("ada", "one")
            aside("small", "first")
            setup.say("ada", "two", "other")
            aside("other", "second")
            for _ in range(3):
                aside("small", "first")
            aside("other", "third")
            lines = setup.fleet.book.get("ada").sides
            said = {str(line.messages[0]["content"])[:5] for line in lines if line.messages}
            assert said == {"first", "third"}

    def test_a_fork_of_an_earlier_turn(self, setup: Setup) -> None:
        setup.attach("other")
        create(setup, "ada")
        for number in range(3):
            setup.say("ada", f"message {number}", "small")
        setup.say("ada", "message 3", "other")
        setup.fleet.fork("ada", "eve", at_turn=1)
        assert len(setup.fleet.of("eve").turns("eve")) == 1
        assert setup.say("eve", "Hello").turn == 2

    def test_a_rollback_holds_for_the_other_model_as_well(self, setup: Setup) -> None:
        setup.attach("other")
        create(setup, "ada")
        setup.say("ada", "one", "small")
        setup.say("ada", "two", "other")
        append = [{"role": "user", "content": "three"}]
        request = setup.start("small", agent_id="ada", append=append, max_tokens=3)
        setup.fleet.cancel(request)
        setup.step(3)
        setup.fleet.of("ada").rollback("ada", turn=1)
        assert setup.say("ada", "four", "other").turn == 2


def refusing(store: AgentCacheStore, patch: pytest.MonkeyPatch) -> None:
    """Commits count as not written, though they were."""
    real = store.commit

    def commit(state: AgentState, answer: Callable[[bool], object]) -> None:
        real(state, lambda durable: answer(False))

    patch.setattr(store, "commit", commit)


class TestCommitsThatWereRefused:
    """They are sent again later, and must not bring back what is over."""

    def test_of_an_agent_that_went_on_elsewhere(
        self, setup: Setup, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        setup.attach("other")
        create(setup, "ada")
        with monkeypatch.context() as patch:
            refusing(setup.store, patch)
            assert not setup.say("ada", "one", "small").durable
        for number in range(3):
            assert setup.say("ada", f"more {number}", "other").durable
        setup.fleet.detach("small")
        state = setup.store.load_agent("ada")
        assert state is not None
        assert len(max(state.mains, key=lambda line: line.last_used).turns) == 4

    def test_of_an_agent_that_was_deleted(
        self, setup: Setup, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        setup.attach("other")
        create(setup, "ada")
        with monkeypatch.context() as patch:
            refusing(setup.store, patch)
            assert not setup.say("ada", "one", "small").durable
            assert not setup.say("ada", "two", "other").durable
        assert setup.fleet.delete("ada")
        setup.settle()
        setup.fleet.detach("small")
        setup.fleet.detach("other")
        assert setup.store.summaries() == []

    def test_of_a_model_that_got_other_weights(
        self, setup: Setup, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        create(setup, "ada")
        setup.settle()
        with monkeypatch.context() as patch:
            answers = setup.store._answers
            patch.setattr(setup.store, "commit", lambda _, answer: answers.add(answer, False))
            assert not setup.say("ada", "one").durable
            setup.fleet.detach("small", 0.01)
            setup.attach("small", fingerprint="others")
        assert setup.fleet.close()
        state = setup.store.load_agent("ada")
        assert state is not None
        assert len(state.lines[0].turns) == 1


@pytest.fixture
def tight(tmp_path: Path) -> Iterator[Setup]:
    """Forty blocks for both models."""
    with opened(tmp_path, budget_bytes=40 * BLOCK_BYTES) as setup:
        yield setup


def out_of_memory(*_: object) -> None:
    raise MemoryError("[malloc] unable to allocate")


class TestOneBudget:
    def used(self, setup: Setup) -> int:
        engines = [setup.fleet.engine(name) for name in NAMES if setup.fleet.has_engine(name)]
        used = sum(engine.tiers.pool.used_bytes for engine in engines)
        assert used <= 40 * BLOCK_BYTES
        return used

    def test_a_long_reply_goes_on_when_another_model_comes(self, tight: Setup) -> None:
        request = tight.start("small", token_ids=ids(256 * 10), max_tokens=256 * 20)
        tight.step(50)
        tight.attach("other")
        assert len(tight.finish(request).token_ids) == 256 * 20

    def test_a_request_waits_while_all_memory_is_taken(self, tight: Setup) -> None:
        first = tight.start("small", token_ids=ids(256 * 36), max_tokens=200)
        tight.step(60)
        tight.attach("other")
        second = tight.start("other", token_ids=ids(256 * 8), max_tokens=3)
        while second not in tight.ended:
            tight.step()
            self.used(tight)
        assert len(tight.finish(first).token_ids) == 200
        assert len(tight.finish(second).token_ids) == 3

    def test_both_grow_in_turn(self, tight: Setup) -> None:
        tight.attach("other")
        requests = [
            tight.start(
                name,
                agent_id=f"{name}-{number}",
                token_ids=ids(256 * 6, number),
                max_tokens=256 * 9,
            )
            for name in NAMES
            for number in range(2)
        ]
        while not all(request in tight.ended for request in requests):
            tight.step()
            self.used(tight)
        for request in requests:
            assert len(tight.finish(request).token_ids) == 256 * 9

    def test_what_rests_makes_room_for_the_other_model(self, tight: Setup) -> None:
        tight.run("small", agent_id="ada", token_ids=ids(256 * 30), max_tokens=3)
        tight.attach("other")
        assert len(tight.run("other", token_ids=ids(256 * 30, 9), max_tokens=3).token_ids) == 3
        self.used(tight)

    def test_a_model_away_gives_its_memory_back(self, tight: Setup) -> None:
        tight.run("small", agent_id="ada", token_ids=ids(256 * 20), max_tokens=3)
        tight.fleet.detach("small")
        assert self.used(tight) == 0
        assert tight.fleet.snapshot().pool.budget_bytes == 40 * BLOCK_BYTES

    def test_a_detach_that_fails_leaves_a_model_that_answers(
        self, tight: Setup, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tight.run("small", agent_id="ada", token_ids=ids(300), max_tokens=3)
        with monkeypatch.context() as patch:
            patch.setattr(tight.fleet.engine("small").tiers, "put_all_away", out_of_memory)
            with pytest.raises(MemoryError):
                tight.fleet.detach("small")
        assert tight.fleet.is_attached("small")
        assert len(tight.run("small", token_ids=ids(20), max_tokens=2).token_ids) == 2

    def test_kv_that_cannot_be_read_does_not_keep_a_model_from_going(
        self, tight: Setup, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        prompt = ids(300)
        tight.run("small", agent_id="ada", token_ids=prompt, max_tokens=3)
        with monkeypatch.context() as patch:
            generator = tight.fleet.engine("small").tiers.model.generator
            patch.setattr(generator, "extract", out_of_memory)
            patch.setattr(generator, "dismantle", out_of_memory)
            tight.fleet.detach("small")
        assert self.used(tight) == 0
        tight.attach("small")
        again = tight.run("small", agent_id="ada", token_ids=[*prompt, 1], max_tokens=3)
        assert again.token_ids == fresh_reply([*prompt, 1], max_tokens=3)


def test_two_engines_that_wait_for_the_disk_wait(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loop without pause would keep the store's thread from the interpreter."""
    setup.attach("other")
    create(setup, "ada")
    setup.fleet.engine("other").create("eve")
    setup.fleet.close()
    waits: list[float] = []
    monkeypatch.setattr(setup.store, "poll", list)
    monkeypatch.setattr(setup.store, "wait", waits.append)
    setup.fleet.of("ada").configure("ada", priority=1)
    setup.fleet.of("eve").configure("eve", priority=1)
    for _ in range(10):
        setup.fleet.step()
    assert len(waits) >= 8
    monkeypatch.undo()


class Crowd:
    """Agents talk to either model while the models come and go."""

    def __init__(self, setup: Setup, seed: int) -> None:
        self.setup = setup
        self.rng = random.Random(seed)  # noqa: S311 - to be the same each time
        self.said = {f"a{number}": 0 for number in range(5)}
        self.running: dict[str, str] = {}
        create(setup, *self.said)

    def play(self, times: int) -> None:
        for _ in range(times):
            if self.rng.random() < 0.25:
                self.swap_one()
            if self.rng.random() < 0.6:
                self.say_something()
            self.setup.step(self.rng.choice([1, 3, 10]))
            for agent in list(self.running):
                if self.running[agent] in self.setup.ended:
                    self.take_end(agent)

    def swap_one(self) -> None:
        name = self.rng.choice(NAMES)
        if self.setup.fleet.is_attached(name):
            self.setup.fleet.detach(name)
        else:
            self.setup.attach(name)

    def say_something(self) -> None:
        idle = [agent for agent in self.said if agent not in self.running]
        if idle:
            agent = self.rng.choice(idle)
            content = "word " * self.rng.choice([1, 60, 150])
            self.running[agent] = self.setup.start(
                self.rng.choice(NAMES),
                agent_id=agent,
                append=[{"role": "user", "content": content}],
                max_tokens=20,
            )

    def take_end(self, agent: str) -> None:
        self.said[agent] += 1
        assert self.setup.finish(self.running.pop(agent)).turn == self.said[agent]

    def end(self) -> None:
        for name in NAMES:
            if not self.setup.fleet.is_attached(name):
                self.setup.attach(name)
        for agent in list(self.running):
            self.take_end(agent)


@pytest.mark.parametrize("seed", range(6))
def test_any_order_of_events(setup: Setup, seed: int) -> None:
    """Every turn arrives, in order, and is remembered by whichever model comes next."""
    setup.attach("other")
    crowd = Crowd(setup, seed)
    crowd.play(120)
    crowd.end()
    for agent, num_said in crowd.said.items():
        turns = setup.fleet.of(agent).turns(agent)
        assert len(turns) == num_said > 0
        assert len(turns[-1].messages or ()) == 2 * num_said
