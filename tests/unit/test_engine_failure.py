"""A generator that raises: who fails, with what, and that service goes on."""

import pytest

from engines import (
    FakeFactory,
    assistant,
    completed,
    drain,
    ending_of,
    failed,
    fake_engine,
    fresh_reply,
    generator_of,
    ids,
    main_blocks,
    phase_of,
    run,
    step,
    text_of,
    user,
)
from keepwarm import BlockPoolBatchEngine
from keepwarm.core.errors import GeneratorFailed
from keepwarm.core.events import FinishReason
from keepwarm.testing.generator import GeneratorFault


def failing(*ordinals: int, **config: int) -> BlockPoolBatchEngine:
    return fake_engine(factory=FakeFactory(fail_at=[ordinals]), **config)


def fail_next_call(engine: BlockPoolBatchEngine) -> None:
    generator = generator_of(engine)
    generator._fail_at.add(generator.num_calls + 1)


def test_a_failed_prefill_is_said_with_its_cause() -> None:
    engine = failing(1)
    request_id = engine.submit(agent_id="ada", token_ids=ids(300), max_tokens=5)
    error = failed(drain(engine), request_id).error
    assert isinstance(error, GeneratorFailed)
    assert isinstance(error.cause, GeneratorFault)


def test_a_failed_decode_says_what_had_been_sent() -> None:
    engine = failing(4)
    request_id = engine.submit(messages=[user("Hello")], max_tokens=50)
    events = drain(engine)
    assert failed(events, request_id).text == text_of(events, request_id)


@pytest.mark.parametrize("ordinal", range(1, 7))
def test_all_that_run_fail_and_all_that_wait_are_served(ordinal: int) -> None:
    engine = failing(ordinal, max_rows=2, idle_prefill_tokens=256)
    requests = [engine.submit(token_ids=ids(300, salt), max_tokens=4) for salt in range(4)]
    events = drain(engine)
    assert [failed(events, request_id) for request_id in requests[:2]]
    for salt in (2, 3):
        alone = fresh_reply(ids(300, salt), max_tokens=4)
        assert completed(events, requests[salt]).token_ids == alone
    assert engine.batch.counters.generator_failures == 1


def test_the_generator_is_made_anew() -> None:
    factory = FakeFactory(fail_at=[[1], [1]])
    engine = fake_engine(factory=factory)
    for _ in range(2):
        request_id = engine.submit(token_ids=ids(9), max_tokens=1)
        failed(drain(engine), request_id)
    run(engine, token_ids=ids(9), max_tokens=1)
    assert len(factory.made) == 3


@pytest.mark.parametrize("hot", [True, False])
def test_the_conversation_is_as_before_and_can_be_continued(hot: bool) -> None:
    engine = fake_engine()
    first = run(engine, agent_id="ada", messages=[user("Hello")], max_tokens=9)
    before = engine.agent("ada")
    if not hot:
        engine.demote("ada")
    request_id = engine.submit(agent_id="ada", append=[user("And?")], max_tokens=9)
    fail_next_call(engine)
    failed(drain(engine), request_id)
    after = engine.agent("ada")
    assert (after.num_tokens, after.num_turns, after.in_use) == (before.num_tokens, 1, False)
    again = run(engine, agent_id="ada", append=[user("And?")], max_tokens=9)
    messages = [user("Hello"), assistant(first.text), user("And?")]
    witness = fake_engine()
    run(witness, agent_id="ada", messages=[user("Hello")], max_tokens=9)
    assert (
        again.token_ids == run(witness, agent_id="ada", messages=messages, max_tokens=9).token_ids
    )


def test_rows_that_were_not_in_the_call_keep_their_cache() -> None:
    engine = fake_engine(idle_prefill_tokens=256)
    held = run(engine, agent_id="bob", token_ids=ids(300, 1), max_tokens=5)
    said = [*ids(300, 1), *held.token_ids]
    engine.submit(agent_id="ada", token_ids=ids(500), max_tokens=5)
    engine.submit(agent_id="bob", token_ids=[*said, *ids(800, 2)], max_tokens=5)
    fail_next_call(engine)  # which computes a chunk of the shorter prompt
    drain(engine)
    assert engine.agent("ada").held_tokens == 0
    assert engine.agent("bob").held_tokens == len(said) - 1


def test_what_was_sent_before_a_chunk_beside_it_failed() -> None:
    engine = fake_engine()
    decoding = engine.submit(agent_id="ada", token_ids=ids(20), max_tokens=9)
    events = step(engine, 3)
    prefilling = engine.submit(agent_id="bob", token_ids=ids(800, 1), max_tokens=5)
    generator = generator_of(engine)
    generator._fail_at.add(generator.num_calls + 1)
    events += drain(engine)
    assert failed(events, decoding).text == text_of(events, decoding) != ""
    assert isinstance(failed(events, prefilling).error, GeneratorFailed)
    assert run(engine, agent_id="ada", token_ids=ids(20), max_tokens=9).token_ids == fresh_reply(
        ids(20), max_tokens=9
    )


def test_blocks_that_others_computed_survive_a_failure() -> None:
    engine = fake_engine()
    run(engine, agent_id="ada", token_ids=ids(600), max_tokens=1)
    request_id = engine.submit(agent_id="bob", token_ids=[*ids(600), 1, 2], max_tokens=1)
    fail_next_call(engine)
    failed(drain(engine), request_id)
    assert run(engine, agent_id="bob", token_ids=ids(600), max_tokens=1).usage.cached_tokens == 512


def test_a_token_whose_outcome_was_lost_is_not_sampled_again() -> None:
    engine = fake_engine()
    request_id = engine.submit(token_ids=ids(300), max_tokens=20)
    sequence = engine._turns.active[request_id].sequence
    while sequence.num_reply_tokens < 9:
        engine.batch.step()
        engine.check()
    reply_ids = tuple(sequence.token_ids[sequence.num_prompt_tokens :])
    assert reply_ids == fresh_reply(ids(300), max_tokens=20)[:9]


class TestRowsThatAreRestored:
    """What goes wrong beside them or with them ends or delays them, and holds nothing for good."""

    @pytest.fixture
    def engine(self) -> BlockPoolBatchEngine:
        """With an agent whose KV is in blocks."""
        engine = fake_engine(num_blocks=60)
        run(engine, agent_id="ada", token_ids=ids(4100), max_tokens=2)
        engine.tiers.demote(main_blocks(engine, "ada"))
        engine.tiers.drop_spares()
        return engine

    def restoring(self, engine: BlockPoolBatchEngine, monkeypatch: pytest.MonkeyPatch) -> str:
        """Begin a request of the agent, whose slab is still being prepared."""
        with monkeypatch.context() as patch:
            patch.setattr(engine.tiers.promotion, "prepare", lambda *_: False)
            request = engine.submit(agent_id="ada", token_ids=[*ids(4100), 1, 2], max_tokens=5)
            step(engine, 3)
        assert phase_of(engine, request) == "restoring"
        return request

    def test_one_whose_slab_cannot_be_read_when_it_is_cancelled(
        self, engine: BlockPoolBatchEngine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        request = self.restoring(engine, monkeypatch)
        break_calls(engine, monkeypatch)
        assert engine.cancel(request)
        assert completed(drain(engine), request).finish_reason is FinishReason.CANCELLED
        engine.check()
        assert not main_blocks(engine, "ada").is_held

    def test_a_generator_that_does_nothing_more(
        self, engine: BlockPoolBatchEngine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        other = engine.submit(token_ids=ids(300, 1), max_tokens=1500)
        step(engine, 5)
        request = self.restoring(engine, monkeypatch)
        break_calls(engine, monkeypatch)
        events = drain(engine)
        assert isinstance(failed(events, other).error, GeneratorFailed)
        ending_of(events, request)
        assert not main_blocks(engine, "ada").is_held


def break_calls(engine: BlockPoolBatchEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise GeneratorFault("device out of memory")

    for call in ("step", "extract", "dismantle", "trim", "copy_span", "reconstruct"):
        monkeypatch.setattr(generator_of(engine), call, broken)
