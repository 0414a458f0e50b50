"""KV that is computed while nobody asks for anything, on the models that an agent is not at."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from engines import BLOCK_BYTES, ids
from fleets import NAMES, Setup, create, opened
from keepwarm.core.agent import AgentBlocks, Tier
from keepwarm.core.errors import InvalidRequest
from keepwarm.fleet.idle_builder import IDLE_S
from keepwarm.testing.clock import FakeClock


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def setup(tmp_path: Path, clock: FakeClock) -> Iterator[Setup]:
    """Ada has talked to both models, and last to the other one, which knows more of her."""
    with opened(tmp_path, builds_when_idle=True, clock=clock) as setup:
        setup.attach("other")
        create(setup, "ada")
        setup.say("ada", "one " * 100, "small")
        setup.say("ada", "two " * 200, "other")
        yield setup


def num_prefilled(setup: Setup, name: str) -> int:
    return setup.fleet.engine(name).batch.counters.prefilled_tokens


def kv_at_small(setup: Setup, agent_id: str) -> AgentBlocks:
    """What the small model's memory has of the agent's main line, wherever the agent is."""
    agent, small = setup.fleet.book.get(agent_id), setup.fleet.engine("small").place
    return agent.main.blocks if agent.place is small else agent.main.resting[small]


def is_building(setup: Setup) -> bool:
    return any(setup.fleet.engine(name).building.is_computing for name in NAMES)


def rest(setup: Setup, clock: FakeClock, seconds: float = 2 * IDLE_S) -> None:
    """Let time pass without requests, then step until nothing is built any more."""
    while setup.fleet.has_work:  # a commit
        setup.step()
    setup.step()
    clock.advance(seconds)
    setup.step(2)
    while setup.fleet.has_work:
        setup.step()


def test_an_agent_that_returns_finds_what_it_said_elsewhere(setup: Setup, clock: FakeClock) -> None:
    rest(setup, clock)
    before = num_prefilled(setup, "small")
    reply = setup.say("ada", "three", "small")
    assert reply.turn == 3
    assert reply.cache.tier is Tier.HOT
    assert reply.cache.cached_tokens > reply.usage.prompt_tokens - 20
    assert num_prefilled(setup, "small") - before < 20


def test_the_reply_is_the_same(setup: Setup, clock: FakeClock, tmp_path: Path) -> None:
    rest(setup, clock)
    built = setup.say("ada", "three", "small")
    with opened(tmp_path / "without") as plain:
        plain.attach("other")
        create(plain, "ada")
        plain.say("ada", "one " * 100, "small")
        plain.say("ada", "two " * 200, "other")
        expected = plain.say("ada", "three", "small")
    assert built.token_ids == expected.token_ids
    assert built.usage.prompt_tokens == expected.usage.prompt_tokens
    assert built.cache.cached_tokens > expected.cache.cached_tokens + 500


def test_not_before_it_has_been_quiet_for_a_while(setup: Setup, clock: FakeClock) -> None:
    before = num_prefilled(setup, "small")
    for _ in range(5):
        setup.say("ada", "more", "other")
        setup.step()
        clock.advance(0.9 * IDLE_S)
        setup.step(3)
        assert not is_building(setup)
    assert num_prefilled(setup, "small") == before


def test_once_and_again_when_there_is_more(setup: Setup, clock: FakeClock) -> None:
    rest(setup, clock)
    built = num_prefilled(setup, "small")
    rest(setup, clock)
    assert num_prefilled(setup, "small") == built
    setup.say("ada", "more " * 50, "other")
    rest(setup, clock)
    assert built < num_prefilled(setup, "small") < built + 400


def test_a_request_calls_it_off_and_what_is_there_stays(setup: Setup, clock: FakeClock) -> None:
    setup.step()
    clock.advance(2 * IDLE_S)
    setup.step(8)
    assert is_building(setup)
    begun = num_prefilled(setup, "small")
    request = setup.start("small", token_ids=ids(30), max_tokens=3)
    assert not is_building(setup)
    setup.finish(request)
    assert num_prefilled(setup, "small") == begun + 29
    rest(setup, clock)
    total = num_prefilled(setup, "small")
    reply = setup.say("ada", "three", "small")
    assert reply.cache.cached_tokens > reply.usage.prompt_tokens - 20
    assert total - begun - 29 < reply.usage.prompt_tokens - 500


@pytest.mark.parametrize("steps", [0, 1, 3, 8])
def test_the_agent_itself_may_return_or_go_in_the_middle(
    setup: Setup, clock: FakeClock, steps: int
) -> None:
    setup.step()
    clock.advance(2 * IDLE_S)
    setup.step(steps)
    assert setup.say("ada", "three", "small").turn == 3
    setup.step()
    clock.advance(2 * IDLE_S)
    setup.step(steps)
    setup.fleet.delete("ada")
    setup.settle()  # the agent is gone when the disk has let it go
    assert not is_building(setup)
    assert all(view.agent_id != "ada" for view in setup.fleet.agents())


@pytest.mark.parametrize("name", NAMES)
def test_a_model_may_go_in_the_middle(setup: Setup, clock: FakeClock, name: str) -> None:
    setup.step()
    clock.advance(2 * IDLE_S)
    setup.step(8)
    setup.fleet.detach(name)
    setup.step(3)
    setup.attach(name)
    rest(setup, clock)
    reply = setup.say("ada", "three", "small")
    assert reply.cache.cached_tokens > reply.usage.prompt_tokens - 20


def test_what_is_asked_of_the_engine_comes_first(setup: Setup, clock: FakeClock) -> None:
    setup.step()
    clock.advance(2 * IDLE_S)
    setup.step(8)
    assert is_building(setup)
    assert setup.fleet.bring("ada", "other").verify("ada").passed
    assert not is_building(setup)


def test_a_shutdown_in_the_middle_saves_what_there_is(
    tmp_path: Path, setup: Setup, clock: FakeClock
) -> None:
    setup.step()
    clock.advance(2 * IDLE_S)
    setup.step(8)
    assert is_building(setup)
    assert setup.fleet.close()
    assert not is_building(setup)
    setup.fleet.check()


def test_only_in_memory_that_is_free(tmp_path: Path, clock: FakeClock) -> None:
    budget_bytes = 20 * BLOCK_BYTES
    with opened(tmp_path, budget_bytes=budget_bytes, builds_when_idle=True, clock=clock) as setup:
        setup.attach("other")
        create(setup, "ada")
        setup.say("ada", "one " * 100, "small")
        setup.say("ada", "two " * 200, "other")
        setup.run("small", agent_id="bob", token_ids=ids(256 * 8), max_tokens=3)
        setup.settle()
        tiers = [setup.fleet.engine(name).tiers for name in NAMES]
        assert tiers[0].pool.free_bytes < 6 * BLOCK_BYTES
        before = [repr(some) for some in tiers]
        rest(setup, clock)
        assert [repr(some) for some in tiers] == before


@pytest.mark.parametrize(
    "error", [InvalidRequest("messages", "roles must alternate"), ZeroDivisionError("in Jinja")]
)
def test_a_conversation_that_the_other_template_refuses(
    setup: Setup, clock: FakeClock, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def refuse(*_: object) -> tuple[int, ...]:
        raise error

    monkeypatch.setattr(setup.fleet.engine("small").intake.reader, "history_ids", refuse)
    rest(setup, clock)
    assert not is_building(setup)
    assert setup.say("ada", "three", "other").turn == 3


def test_not_on_a_model_that_it_never_talked_to(setup: Setup, clock: FakeClock) -> None:
    rest(setup, clock)
    before = num_prefilled(setup, "small")
    create(setup, "bob")  # in the default model's engine
    setup.say("bob", "word " * 200, "other")
    rest(setup, clock)
    assert num_prefilled(setup, "small") == before


def test_not_for_one_with_a_quota(setup: Setup, clock: FakeClock) -> None:
    """Its records would push out those of the model that it talks to."""
    setup.fleet.of("ada").configure("ada", quota_bytes=1 << 20)
    before = num_prefilled(setup, "small")
    rest(setup, clock)
    assert num_prefilled(setup, "small") == before


def test_a_pinned_agent_is_pinned_where_it_is(setup: Setup, clock: FakeClock) -> None:
    setup.fleet.of("ada").pin("ada")
    rest(setup, clock)
    built = kv_at_small(setup, "ada")
    assert built.num_tokens > 800
    assert not built.pinned
    setup.say("ada", "three", "small")
    assert setup.fleet.of("ada").agent("ada").pinned
    assert kv_at_small(setup, "ada") is built
    assert built.pinned


def test_what_was_built_unasked_goes_first(setup: Setup, clock: FakeClock) -> None:
    create(setup, "bob")
    setup.say("bob", "word " * 100, "small")
    rest(setup, clock)
    built = kv_at_small(setup, "ada")
    assert built.num_tokens > 800
    assert built.last_used < kv_at_small(setup, "bob").last_used


def test_one_attempt_at_a_time(
    setup: Setup, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"a{number}" for number in range(5)]
    create(setup, *names)
    for name in names:
        setup.say(name, "one", "small")
        setup.say(name, "two", "other")
    looks: list[object] = []

    def refuse(*read: object) -> tuple[int, ...]:
        looks.append(read)
        raise InvalidRequest("messages", "roles must alternate")

    monkeypatch.setattr(setup.fleet.engine("small").intake.reader, "history_ids", refuse)
    setup.step()
    clock.advance(2 * IDLE_S)
    for number in range(1, 7):
        setup.step(2)  # it is begun, and refused
        assert len(looks) == number
    setup.step(3)
    assert len(looks) == 6


def test_when_memory_comes_free(tmp_path: Path, clock: FakeClock) -> None:
    budget_bytes = 20 * BLOCK_BYTES
    with opened(tmp_path, budget_bytes=budget_bytes, builds_when_idle=True, clock=clock) as setup:
        setup.attach("other")
        create(setup, "ada")
        setup.say("ada", "one " * 100, "small")
        setup.say("ada", "two " * 200, "other")
        setup.run("small", agent_id="bob", token_ids=ids(256 * 8), max_tokens=3)
        before = num_prefilled(setup, "small")
        rest(setup, clock)
        assert num_prefilled(setup, "small") == before
        setup.fleet.delete("bob")
        setup.settle()
        for _ in range(3):  # what the disk is still taking holds memory, too
            rest(setup, clock)
            setup.settle()
        assert num_prefilled(setup, "small") > before + 700


def test_a_spare_slab_counts_as_room(tmp_path: Path) -> None:
    with opened(tmp_path, budget_bytes=20 * BLOCK_BYTES) as setup:
        setup.run("small", agent_id="bob", token_ids=ids(256 * 8), max_tokens=3)
        setup.settle()
        engine = setup.fleet.engine("small")
        engine.demote("bob")
        memory = engine.tiers.pool.snapshot().bytes_by_kind
        assert memory["spare"] > 8 * BLOCK_BYTES
        assert engine.building.has_room_for(256 * 8)
        assert not engine.building.has_room_for(256 * 16)


def test_what_the_generator_raises_costs_nothing(
    setup: Setup, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no kernel")

    setup.step()
    clock.advance(2 * IDLE_S)
    setup.step(3)
    assert is_building(setup)
    monkeypatch.setattr(setup.fleet.engine("small").tiers.model.generator, "step", fail)
    rest(setup, clock)
    assert not is_building(setup)
    assert setup.say("ada", "three", "small").turn == 3


@pytest.mark.parametrize("seed", range(6))
def test_any_order_of_events(setup: Setup, clock: FakeClock, seed: int) -> None:
    """Every turn is answered with all that was said before, wherever KV was built in between."""
    rng = random.Random(seed)  # noqa: S311 - to be the same each time
    said = {"ada": 2, "bob": 0, "eve": 0}
    create(setup, "bob", "eve")
    for _ in range(40):
        agent, model = rng.choice(sorted(said)), rng.choice(NAMES)
        action = rng.choice(["say", "say", "rest", "pause", "swap", "rollback"])
        if action == "say":
            said[agent] += 1
            assert setup.say(agent, "word " * rng.choice([1, 60, 150]), model).turn == said[agent]
        elif action == "rest":
            rest(setup, clock)
        elif action == "pause":
            clock.advance(2 * IDLE_S)
            setup.step(rng.randrange(12))
        elif action == "swap":
            setup.fleet.detach(model)
            setup.step(rng.randrange(4))
            setup.attach(model)
        elif said[agent]:
            said[agent] -= 1
            setup.fleet.of(agent).rollback(agent, turn=said[agent])
    for agent, num_said in said.items():
        assert len(setup.fleet.of(agent).turns(agent)) == num_said
