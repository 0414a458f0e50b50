"""Random use of the whole engine: every request gets the answer that it would get alone."""

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from engines import (
    TOKENIZER,
    FakeFactory,
    check_values,
    drain,
    fake_engine,
    fresh_reply,
    prompt_of,
    user,
)
from keepwarm.core.errors import (
    AgentBusy,
    AgentExists,
    GeneratorFailed,
    InvalidRequest,
    PoolExhausted,
    QueueFull,
    UnknownAgent,
    VerifyInterrupted,
)
from keepwarm.core.events import Completed, Delta, Event, Failed, FinishReason
from keepwarm.kv.verifier import VerifyReport

pytestmark = pytest.mark.slow

REFUSALS = (AgentBusy, AgentExists, InvalidRequest, QueueFull, UnknownAgent)
SYSTEMS = ["x" * 290, "y" * 530, "short"]

agents = st.sampled_from(["ada", "bob", "cleo"])
names = st.one_of(st.none(), agents)
texts = st.sampled_from(["Hello", "What now?", "z" * 200, "w" * 400, "<|im_end|>"])
systems = st.sampled_from(SYSTEMS)
limits = st.sampled_from([1, 2, 5, 30, 300])
samplings = st.sampled_from([{"temperature": 0.0}, {"temperature": 1.0, "seed": 3}])
stops = st.sampled_from([None, None, "a", ["ab", "é"], ["Hello", "b"]])
priorities = st.sampled_from([0, 0, 0, 5, -5])


@dataclass
class Sent:
    """A request, and what came of it so far."""

    prompt_ids: list[int]
    settings: dict[str, Any]
    deltas: list[Delta] = field(default_factory=list)
    cancelled: bool = False


class EngineMachine(RuleBasedStateMachine):
    @initialize(
        num_blocks=st.integers(4, 14),
        max_rows=st.integers(1, 5),
        chunk=st.sampled_from([1, 60, 256]),
        idle=st.sampled_from([50, 512, 2000]),
        reserve=st.sampled_from([0, 0, 256]),
        restore=st.sampled_from([1, 5000, 1 << 20]),
        max_lines=st.integers(0, 3),
        vocab_size=st.sampled_from([256, TOKENIZER.vocab_size]),
    )
    def make(
        self,
        num_blocks: int,
        max_rows: int,
        chunk: int,
        idle: int,
        reserve: int,
        restore: int,
        max_lines: int,
        vocab_size: int,
    ) -> None:
        # The special ids, of which two end a reply, are above the 256 bytes.
        self.vocab_size = vocab_size
        self.factory = FakeFactory(vocab_size=vocab_size)
        self.engine = fake_engine(
            factory=self.factory,
            num_blocks=num_blocks,
            max_rows=max_rows,
            max_waiting=6,
            prefill_chunk_tokens=chunk,
            idle_prefill_tokens=idle,
            reserve_reply_tokens=reserve,
            restore_bytes_per_step=restore,
            max_side_lines=max_lines,
            max_anonymous_lines=max_lines,
        )
        self.running: dict[str, Sent] = {}
        self.verifying: list[Future[VerifyReport]] = []
        self.was_pinned = False

    # -- requests --------------------------------------------------------------------------------

    @rule(name=names, system=systems, text=texts, more=st.data())
    def start(self, name: str | None, system: str, text: str, more: Any) -> None:
        messages = [{"role": "system", "content": system}, user(text)]
        self.submit(more, agent_id=name, messages=messages)

    @rule(
        system=systems,
        temperature=st.sampled_from([0.0, 1.0]),
        times=st.sampled_from([1, 100, 500]),
    )
    def crowd(self, system: str, temperature: float, times: int) -> None:
        """Everybody at once, with long replies."""
        for name in ("ada", "bob", "cleo", None):
            messages = [{"role": "system", "content": system}, user(name or "nobody")]
            wanted = {"max_tokens": 600, "temperature": temperature, "seed": 4}
            self.submit_wanted(wanted, 0, agent_id=name, messages=messages)
        self.step(times)

    @rule(name=agents, text=texts, more=st.data())
    def append(self, name: str, text: str, more: Any) -> None:
        self.submit(more, agent_id=name, append=[user(text)])

    @rule(name=names, system=systems, text=texts, more=st.data())
    def edit(self, name: str | None, system: str, text: str, more: Any) -> None:
        """The whole conversation again, with something in its middle changed."""
        known = None if name is None or name not in self.engine.book else self.messages_of(name)
        if known:
            messages = [*known[:-2], user(text), *known[-1:], user("and?")]
            self.submit(more, agent_id=name, messages=messages)

    @rule(name=names, num_kept=st.integers(0, 900), more=st.data())
    def send_ids(self, name: str | None, num_kept: int, more: Any) -> None:
        lines = self.engine._lines.of(name)
        known = list(lines[-1].transcript.token_ids[:num_kept]) if lines else []
        self.submit(more, agent_id=name, token_ids=[*known, *range(97, 110)])

    def submit(self, more: Any, **request: Any) -> None:
        wanted = {
            "max_tokens": more.draw(limits),
            **more.draw(samplings),
            "stop": more.draw(stops),
        }
        self.submit_wanted(wanted, more.draw(priorities), **request)

    def submit_wanted(self, wanted: dict[str, Any], priority: int, **request: Any) -> None:
        before = self.state()
        try:
            request_id = self.engine.submit(**request, **wanted, priority=priority)
        except REFUSALS:
            assert self.state() == before
        else:
            self.running[request_id] = Sent(prompt_of(self.engine, request_id), wanted)
        self.check()

    @rule(index=st.integers(0, 9))
    def cancel(self, index: int) -> None:
        if self.running:
            request_id = list(self.running)[index % len(self.running)]
            sent = self.running[request_id]
            assert self.engine.cancel(request_id) is not sent.cancelled
            assert not self.engine.cancel(request_id)
            sent.cancelled = True
            self.check()

    @rule(times=st.sampled_from([1, 1, 3, 20, 100]))
    def step(self, times: int) -> None:
        for _ in range(times):
            self.see(self.engine.step())
            self.check()

    @rule(num_calls=st.integers(1, 12))
    def fail_soon(self, num_calls: int) -> None:
        """The generator raises in one of its next calls."""
        generator = self.factory.made[-1]
        generator._fail_at.add(generator.num_calls + num_calls)
        self.step(num_calls)

    @rule()
    def finish_all(self) -> None:
        self.see(drain(self.engine))
        assert not self.running

    # -- agents ----------------------------------------------------------------------------------

    @rule(name=agents, other=agents, turn=st.one_of(st.none(), st.integers(0, 3)))
    def fork(self, name: str, other: str, turn: int | None) -> None:
        self.act(lambda: self.engine.fork(name, other, at_turn=turn))

    @rule(name=agents, turn=st.integers(0, 3))
    def rollback(self, name: str, turn: int) -> None:
        self.act(lambda: self.engine.rollback(name, turn=turn))

    @rule(name=agents)
    def demote(self, name: str) -> None:
        self.act(lambda: self.engine.demote(name))

    @rule(name=agents)
    def forget_cache(self, name: str) -> None:
        self.act(lambda: self.engine.forget_cache(name))

    @rule(name=agents)
    def delete(self, name: str) -> None:
        self.act(lambda: self.engine.delete(name))

    @rule(pinned=st.booleans())
    def pin(self, pinned: bool) -> None:
        self.was_pinned = self.was_pinned or pinned
        self.act(lambda: self.engine.pin("ada", pinned=pinned))

    @rule(name=agents)
    def prefetch(self, name: str) -> None:
        self.act(lambda: self.engine.prefetch(name))

    @rule(name=agents)
    def verify(self, name: str) -> None:
        result: Future[VerifyReport] = Future()
        self.verifying.append(result)
        self.act(lambda: self.engine.begin_verify(name, result))

    def act(self, action: Any) -> None:
        is_alone = not self.engine._prefetches and not self.engine._verifies
        before = self.state()
        try:
            action()
        except REFUSALS:
            assert self.state() == before or not is_alone
        self.check()

    # -- what must hold --------------------------------------------------------------------------

    def see(self, events: list[Event]) -> None:
        for event in events:
            sent = self.running[event.request_id]
            if isinstance(event, Delta):
                sent.deltas.append(event)
            elif isinstance(event, Failed):
                self.see_failed(event, sent)
            elif isinstance(event, Completed):
                self.see_completed(event, sent)

    def see_failed(self, event: Failed, sent: Sent) -> None:
        del self.running[event.request_id]
        assert event.text == "".join(delta.text for delta in sent.deltas)
        if isinstance(event.error, GeneratorFailed):
            assert len(self.factory.made) > 1
        else:
            assert isinstance(event.error, PoolExhausted)
            assert self.was_pinned

    def see_completed(self, event: Completed, sent: Sent) -> None:
        del self.running[event.request_id]
        assert event.text == "".join(delta.text for delta in sent.deltas)
        assert event.token_ids == tuple(i for delta in sent.deltas for i in delta.token_ids)
        assert event.usage.prompt_tokens == len(sent.prompt_ids)
        assert 0 <= event.usage.cached_tokens < len(sent.prompt_ids)
        assert event.cache.cached_tokens <= event.cache.diverged_at <= len(sent.prompt_ids)
        alone = fresh_reply(
            sent.prompt_ids, vocab_size=self.vocab_size, **self.as_far_as_room(sent)
        )
        if sent.cancelled:
            assert event.finish_reason is FinishReason.CANCELLED
            assert event.token_ids == alone[: len(event.token_ids)]
        else:
            assert event.finish_reason is not FinishReason.CANCELLED
            assert event.token_ids == alone

    def as_far_as_room(self, sent: Sent) -> dict[str, Any]:
        """The reply ends where the whole budget does."""
        num_tokens = self.engine.tiers.pool.budget_bytes // 2048 * 256
        room = num_tokens - len(sent.prompt_ids)
        return {**sent.settings, "max_tokens": min(sent.settings["max_tokens"], room)}

    def messages_of(self, name: str) -> list[Any]:
        return list(self.engine.book.get(name).main.messages or ())

    def state(self) -> object:
        engine = self.engine
        return (
            engine.agents(),
            engine.tiers.pool.snapshot(),
            list(engine.batch.waiting),
            len(engine.tiers._lines),
            list(engine._turns.active),
        )

    def check(self) -> None:
        self.engine.check()
        check_values(self.engine.tiers)
        for agent in self.engine.book:
            for line in agent.lines:
                line.transcript.check()
                if not line.in_use and not self.engine._prefetches:
                    assert not line.blocks.is_held
        assert len(self.engine.batch.running) <= self.engine.config.max_rows

    def see_verified(self) -> None:
        """Whatever a verification ended with, it found nothing wrong."""
        for result in self.verifying:
            if not result.done():
                continue
            error = result.exception()
            assert isinstance(error, VerifyInterrupted | GeneratorFailed | PoolExhausted | None), (
                error
            )
            if error is None:
                assert result.result().passed

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            self.finish_all()
            self.see_verified()
            assert not self.engine._verifies
            for agent in self.engine.agents():
                assert agent.num_side_lines <= self.engine.config.max_side_lines
                self.engine.delete(agent.agent_id)
            self.engine.tiers.make_room(self.engine.tiers.pool.budget_bytes)
            assert self.engine.tiers.pool.used_bytes == 0


TestEngine = EngineMachine.TestCase
TestEngine.settings = settings(
    max_examples=40,
    stateful_step_count=30,
    deadline=None,
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.too_slow],
)
