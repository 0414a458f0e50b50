"""What a request brings with it, and what came with the model, ends at most that request."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest

from engines import (
    FakeFactory,
    assistant,
    completed,
    drain,
    failed,
    fake_engine,
    run,
    step,
    text_of,
    user,
)
from keepwarm import BlockPoolBatchEngine
from keepwarm.core.errors import InvariantBroken, RequestBroke, TemplateRefused
from keepwarm.core.events import Event, Failed, FinishReason
from keepwarm.core.ports import Message, Piece
from keepwarm.engine.turn import turns
from keepwarm.fleet.idle_builder import IdleBuilder
from keepwarm.testing.tokenizer import FakeDetokenizer, FakeTokenizer

EXCEPTIONS = [
    ValueError("substring not found"),
    KeyError("content"),
    IndexError("list index out of range"),
    ZeroDivisionError("division by zero"),
    RecursionError("maximum recursion depth exceeded"),
    MemoryError(),
    UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed"),
]


@dataclass(frozen=True, slots=True)
class RefusingTokenizer(FakeTokenizer):
    """Its template refuses a conversation that a reply has ended."""

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True
    ) -> tuple[Piece, ...]:
        if not add_generation_prompt:
            raise TemplateRefused("roles must alternate")
        return FakeTokenizer.render(self, messages, add_generation_prompt=add_generation_prompt)


class BrokenDetokenizer(FakeDetokenizer):
    """Raises at its third token."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self._error = error
        self._num_pushed = 0

    def push(self, token_id: int) -> str:
        self._num_pushed += 1
        if self._num_pushed == 3:
            raise self._error
        return super().push(token_id)


def check_is_as_before(engine: BlockPoolBatchEngine, agent_id: str) -> None:
    """The agent can be spoken to, and nothing is left of what ended."""
    assert not engine._turns.active
    assert not engine.batch.running
    assert not engine.agent(agent_id).in_use
    engine.check()
    run(engine, agent_id=agent_id, messages=[user("Hello")], max_tokens=3)


@pytest.mark.parametrize("agent_id", ["ada", None])
def test_a_reply_that_the_template_refuses_is_kept(agent_id: str | None) -> None:
    engine = fake_engine(tokenizer=RefusingTokenizer())
    witness = fake_engine()
    for _ in range(5):
        said = run(engine, agent_id=agent_id, messages=[user("Hello")], max_tokens=5)
        expected = run(witness, agent_id=agent_id, messages=[user("Hello")], max_tokens=5)
        assert (said.text, said.finish_reason) == (expected.text, FinishReason.LENGTH)
    following = [user("Hello"), assistant(said.text), user("And?")]
    again = run(engine, agent_id=agent_id, messages=following, max_tokens=5)
    assert again.usage.cached_tokens == said.usage.prompt_tokens + len(said.token_ids) - 1
    assert again.text == run(witness, agent_id=agent_id, messages=following, max_tokens=5).text


def test_an_agent_whose_history_the_template_refuses_is_not_built_in_advance() -> None:
    home = fake_engine()
    other = fake_engine(
        tokenizer=RefusingTokenizer(), fingerprint="other", recorded_as="other", book=home.book
    )
    run(other, agent_id="ada", messages=[user("Good")], max_tokens=3)
    run(home, agent_id="ada", messages=[user("Hello")], max_tokens=3)
    clock = [0.0]
    builder = IdleBuilder({"home": home, "other": other}, home.book, clock=lambda: clock[0])
    builder.look()
    clock[0] = 10.0
    builder.look()
    builder.wait(60.0)
    builder.look()
    assert not other.building.is_computing
    assert not drain(other)
    other.check()


@pytest.mark.parametrize("error", EXCEPTIONS, ids=lambda error: type(error).__name__)
def test_a_detokenizer_that_raises_ends_its_own_request(error: Exception) -> None:
    engine = fake_engine()
    run(engine, agent_id="ada", messages=[user("Hello")], max_tokens=5)
    broken = engine.submit(agent_id="ada", messages=[user("Hello")], max_tokens=5)
    engine._turns.active[broken].reply._detokenizer = BrokenDetokenizer(error)
    beside = engine.submit(agent_id="bob", messages=[user("Hello")], max_tokens=5)
    events = drain(engine)
    ending = failed(events, broken)
    assert isinstance(ending.error, RequestBroke)
    assert ending.error.cause is error
    assert ending.text == text_of(events, broken)
    assert len(completed(events, beside).token_ids) == 5
    assert engine.batch.counters.generator_failures == 0
    check_is_as_before(engine, "ada")


PLACES: dict[str, Callable[[BlockPoolBatchEngine, str], tuple[object, str]]] = {
    "its start": lambda engine, request_id: (engine._turns.active[request_id], "wanted"),
    "its reply": lambda engine, request_id: (engine._turns.active[request_id].reply, "_send"),
    "its turn": lambda engine, request_id: (engine._lines, "record_turn"),
    "its commit": lambda engine, request_id: (engine._commits, "commit"),
}


@pytest.mark.parametrize("place", PLACES)
def test_whatever_raises_for_a_request_ends_that_request(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = fake_engine()
    run(engine, agent_id="ada", messages=[user("Hello")], max_tokens=3)
    beside = engine.submit(messages=[user("Good")], max_tokens=9)
    broken = engine.submit(agent_id="ada", messages=[user("Hello")], max_tokens=3)

    def fail(*arguments: object, **named: object) -> None:
        raise LookupError(place)

    target, name = PLACES[place](engine, broken)
    wanted = engine._turns.active[broken].wanted
    value = replace(wanted, locate=fail) if name == "wanted" else fail
    events: list[Event] = []
    with monkeypatch.context() as patch:
        patch.setattr(target, name, value)
        while not any(isinstance(event, Failed) for event in events):
            events += step(engine)
    events += drain(engine)
    assert isinstance(failed(events, broken).error, RequestBroke)
    assert len(completed(events, beside).token_ids) == 9
    check_is_as_before(engine, "ada")


def test_what_raises_when_a_client_hangs_up_ends_that_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = fake_engine()
    request_id = engine.submit(agent_id="ada", messages=[user("Hello")], max_tokens=9)
    step(engine, 3)

    def fail(*arguments: object, **named: object) -> None:
        raise LookupError

    with monkeypatch.context() as patch:
        patch.setattr(engine._lines, "record_turn", fail)
        assert engine.cancel(request_id)
        assert isinstance(failed(drain(engine), request_id).error, RequestBroke)
    check_is_as_before(engine, "ada")


def test_bookkeeping_that_contradicts_itself_fails_every_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = fake_engine()
    engine.submit(messages=[user("Hello")], max_tokens=3)

    def fail(*arguments: object, **named: object) -> None:
        raise InvariantBroken("lost")

    monkeypatch.setattr(engine._lines, "record_turn", fail)
    with pytest.raises(InvariantBroken):
        drain(engine)


def test_a_reply_that_cannot_begin_takes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = fake_engine()

    def fail(*arguments: object, **named: object) -> None:
        raise LookupError

    with monkeypatch.context() as patch:
        patch.setattr(turns, "ReplyText", fail)
        with pytest.raises(LookupError):
            engine.submit(agent_id="ada", messages=[user("Hello")])
    assert not engine._turns.active
    assert not engine.knows("ada")


def test_a_script_of_nothing_but_the_end_is_an_empty_reply() -> None:
    end = min(FakeTokenizer().eos_token_ids)
    engine = fake_engine(tokenizer=RefusingTokenizer(), factory=FakeFactory(script=[end]))
    assert run(engine, agent_id="ada", messages=[user("Hello")], max_tokens=3).text == ""
