"""Random use of a fleet of two models: an agent is in one book, and remembers what was said."""

from itertools import count
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engines import BLOCK_BYTES, assistant, check_values, user
from fleets import NAMES, loaded, new_engine, tokenizer_of
from keepwarm.core.errors import AgentBusy, ContextTooLong, InvalidRequest, NeverFits
from keepwarm.core.events import Completed, Failed
from keepwarm.core.ports import Message
from keepwarm.engine.requests import GenerateRequest
from keepwarm.fleet.fleet import Fleet
from keepwarm.fleet.idle_builder import IDLE_S
from keepwarm.testing.agent_store import MemoryAgentStore
from keepwarm.testing.clock import FakeClock

Conversation = tuple[Message, ...]

agents = st.sampled_from(["ada", "bob", "cleo"])
models = st.sampled_from(NAMES)
texts = st.sampled_from(["Hello", "What now?", "z" * 300, "w" * 700])


class FleetMachine(RuleBasedStateMachine):
    """`said` has each agent's conversation after each turn, `running` what is sent to it now."""

    @initialize(num_blocks=st.integers(14, 40), max_side_lines=st.integers(0, 3))
    def make(self, num_blocks: int, max_side_lines: int) -> None:
        self.store = MemoryAgentStore()
        self.clock = FakeClock()
        self.budget_bytes = num_blocks * BLOCK_BYTES
        self.max_side_lines = max_side_lines
        self.weights = dict.fromkeys(NAMES, "first")
        self.numbers = count()
        self.said: dict[str, list[Conversation]] = {}
        self.begun: dict[str, Conversation] = {}
        self.running: dict[str, tuple[str, Conversation]] = {}
        self.beside: set[str] = set()
        self.ended: dict[str, Completed | Failed] = {}
        self.open()

    def open(self) -> None:
        def make(*given: Any) -> Any:
            return new_engine(*given, max_side_lines=self.max_side_lines)

        self.fleet = Fleet(
            make,
            default="small",
            store=self.store,
            budget_bytes=self.budget_bytes,
            builds_when_idle=True,
            clock=self.clock,
        )
        for name in NAMES:
            self.attach(name)

    def attach(self, name: str) -> None:
        fingerprint = f"{name}-{self.weights[name]}"
        tokenizer = tokenizer_of(name)
        self.fleet.attach(loaded(name, tokenizer=tokenizer, fingerprint=fingerprint))

    def known(self, agent: str) -> Conversation:
        turns = self.said[agent]
        return turns[-1] if turns else self.begun[agent]

    # -- requests --------------------------------------------------------------------------------

    @rule(agent=agents, system=st.booleans(), pinned=st.booleans())
    def create(self, agent: str, system: bool, pinned: bool) -> None:
        if agent not in self.said:
            prompt = "Be brief." if system else None
            self.fleet.of(agent).create(agent, system=prompt)
            self.fleet.of(agent).pin(agent, pinned=pinned)
            self.said[agent] = []
            self.begun[agent] = ({"role": "system", "content": prompt},) if prompt else ()

    @rule(agent=agents, model=models, text=texts, max_tokens=st.sampled_from([1, 8, 300]))
    def say(self, agent: str, model: str, text: str, max_tokens: int) -> None:
        self.submit(agent, model, max_tokens, append=[user(text)])

    @rule(agent=agents, talk=st.lists(st.tuples(models, texts), min_size=1, max_size=4))
    def talk(self, agent: str, talk: list[tuple[str, str]]) -> None:
        """Several turns, each to its end, now with one model and now with the other."""
        self.create(agent, system=False, pinned=False)
        for model, text in talk:
            self.finish()
            self.submit(agent, model, 5, append=[user(text)])
            self.nothing_is_lost()
        self.finish()

    @rule(agent=agents, model=models, text=texts)
    def say_all(self, agent: str, model: str, text: str) -> None:
        """The whole conversation again, as a stateless client sends it, and a new message."""
        if self.said.get(agent) and agent not in self.running:
            self.submit(agent, model, 5, messages=[*self.known(agent), user(text)])

    def submit(self, agent: str, model: str, max_tokens: int, **source: Any) -> None:
        request = GenerateRequest(agent_id=agent, model=model, max_tokens=max_tokens, **source)
        if agent not in self.said:
            return
        if agent in self.running:
            self.refused(request)
            return
        known = self.known(agent)
        try:
            number = self.fleet.submit(request)
        except (ContextTooLong, NeverFits):
            return
        engine = self.fleet.of(agent)
        assert engine.model == model
        sent = (*known, *(source.get("append") or source["messages"][len(known) :]))
        self.check_prompt(number, model, sent)
        if engine._turns.active[number].line is self.fleet.book.get(agent).main:
            self.running[agent] = number, sent
        else:  # a side line is more like it than what the main line has in this model's ids
            assert "append" not in source
            self.beside.add(number)

    def refused(self, request: GenerateRequest) -> None:
        if request.append is not None:
            with pytest.raises(AgentBusy):
                self.fleet.submit(request)

    def check_prompt(self, number: str, model: str, messages: Conversation) -> None:
        """The prompt is the conversation, wherever its ids come from."""
        transcript = self.fleet.engine(model)._turns.active[number].wanted.prompt.transcript
        pieces = tokenizer_of(model).render(messages)
        expected = "".join(piece.text for piece in pieces)
        texts = [span.text for span in transcript.spans]
        if None not in texts:
            assert "".join(text or "" for text in texts) == expected

    @rule(agent=agents, model=models, text=texts)
    def ask_beside(self, agent: str, model: str, text: str) -> None:
        """Something else in the name of an agent that is in the middle of a request."""
        if agent in self.running:
            messages = [user(f"{next(self.numbers)} {text}")]
            request = GenerateRequest(model=model, agent_id=agent, messages=messages, max_tokens=5)
            self.beside.add(self.fleet.submit(request))

    @rule(agent=agents)
    def say_something_wrong(self, agent: str) -> None:
        """A request that is refused leaves the agent where it was."""
        if agent in self.said and not self.fleet.book.get(agent).in_use:
            before = self.fleet.model_of(agent)
            where = self.fleet.of(agent)
            for model in NAMES:
                with pytest.raises(InvalidRequest):
                    self.fleet.submit(GenerateRequest(model=model, agent_id=agent, append=[]))
            assert self.fleet.model_of(agent) == before
            assert self.fleet.of(agent) is where

    @rule(agent=agents)
    def cancel_before_its_first_token(self, agent: str) -> None:
        """What was never answered was never said."""
        if agent in self.running:
            number, _ = self.running[agent]
            engine = self.fleet.of(agent)
            has_begun = engine._turns.active[number].first_token_s is not None
            if not has_begun:
                assert self.fleet.cancel(number)
                del self.running[agent]
                self.step(1)

    @rule(times=st.sampled_from([1, 3, 30]))
    def step(self, times: int) -> None:
        for _ in range(times):
            events = self.fleet.step()
            self.fleet.check()
            for event in events:
                if isinstance(event, Completed | Failed):
                    self.end(event)

    def end(self, event: Completed | Failed) -> None:
        if event.request_id in self.beside:
            self.beside.remove(event.request_id)
            if isinstance(event, Completed):
                assert event.turn is None
            return
        agent = next((a for a, (n, _) in self.running.items() if n == event.request_id), None)
        if agent is None:
            return
        _, sent = self.running.pop(agent)
        if isinstance(event, Completed):
            self.said[agent].append((*sent, assistant(event.text)))
            assert event.turn == len(self.said[agent])

    def finish(self) -> None:
        for name in NAMES:
            if not self.fleet.is_attached(name):
                self.attach(name)
        for _ in range(5000):
            if not (self.running or self.beside or self.fleet.has_work):
                return
            self.step(1)
        raise AssertionError(f"{self.running}, {self.fleet!r}")

    # -- agents ----------------------------------------------------------------------------------

    @rule(agent=agents, turn=st.integers(0, 3))
    def rollback(self, agent: str, turn: int) -> None:
        if agent in self.said and turn <= len(self.said[agent]):
            if agent in self.running:
                self.busy(lambda: self.fleet.of(agent).rollback(agent, turn=turn))
                return
            self.fleet.of(agent).rollback(agent, turn=turn)
            if not turn:
                self.begun[agent] = _opening(self.known(agent))
            del self.said[agent][turn:]

    @rule(agent=agents, new=agents, turn=st.integers(0, 3))
    def fork(self, agent: str, new: str, turn: int) -> None:
        is_free = agent in self.said and new not in self.said and agent not in self.running
        if is_free and turn <= len(self.said[agent]):
            self.fleet.fork(agent, new, at_turn=turn)
            self.begun[new] = self.begun[agent] if turn else _opening(self.known(agent))
            self.said[new] = self.said[agent][:turn]

    @rule(agent=agents)
    def delete(self, agent: str) -> None:
        if agent not in self.said:
            return
        if agent in self.running:
            self.busy(lambda: self.fleet.delete(agent))
            return
        commit = self.fleet.delete(agent)
        self.step(1)
        assert commit.durable is not None
        if commit.durable:
            del self.said[agent], self.begun[agent]

    def busy(self, change: Any) -> None:
        with pytest.raises(AgentBusy):
            change()

    @rule(agent=agents, action=st.sampled_from(["park", "demote", "forget_cache", "prefetch"]))
    def rest(self, agent: str, action: str) -> None:
        if agent in self.said and not self.fleet.book.get(agent).in_use:
            getattr(self.fleet.of(agent), action)(agent)

    @rule(agent=agents, pinned=st.booleans())
    def pin(self, agent: str, pinned: bool) -> None:
        if agent in self.said:
            self.fleet.of(agent).pin(agent, pinned=pinned)

    # -- models, time and the disk ---------------------------------------------------------------

    @rule(model=models)
    def swap(self, model: str) -> None:
        if self.fleet.is_attached(model):
            self.fleet.detach(model, 0.01 if self.store.refuses else 60.0)
        else:
            self.attach(model)

    @rule(model=models)
    def replace(self, model: str) -> None:
        """Other weights under the same name: what runs there fails, and nothing said is lost."""
        if not self.fleet.is_attached(model):
            self.weights[model] += "+"
            self.attach(model)
            self.step(1)  # says what failed

    @rule(times=st.sampled_from([1, 4, 40]))
    def be_idle(self, times: int) -> None:
        for _ in range(times):
            self.clock.advance(IDLE_S)
            self.step(1)
            self.fleet._builder.wait(60.0)

    @rule(refuses=st.booleans())
    def disk(self, refuses: bool) -> None:
        self.store.refuses = refuses

    @precondition(lambda self: not self.store.refuses)
    @rule()
    def restart(self) -> None:
        self.finish()
        assert self.fleet.close()
        self.open()

    @invariant()
    def nothing_is_lost(self) -> None:
        if not hasattr(self, "fleet"):
            return
        self.fleet.check()
        for name in NAMES:
            check_values(self.fleet.engine(name).tiers)
        assert {view.agent_id for view in self.fleet.agents()} == set(self.said)
        for agent, turns in self.said.items():
            known = self.fleet.of(agent).turns(agent)
            assert [turn.messages for turn in known] == turns
            assert self.fleet.book.get(agent).main.messages == self.known(agent)

    def teardown(self) -> None:
        if not hasattr(self, "fleet"):
            return
        self.store.refuses = False
        self.finish()
        self.nothing_is_lost()
        self.check_leaks()

    def check_leaks(self) -> None:
        """All lines in the memory of a model are an agent's, or anonymous."""
        held = [blocks for agent in self.fleet.book for _, blocks in agent.holdings()]
        for name in NAMES:
            engine = self.fleet.engine(name)
            held += [line.blocks for line in engine._lines.anonymous]
        known = {id(blocks) for blocks in held}
        for name in NAMES:
            for line in self.fleet.engine(name).tiers._lines.values():
                assert id(line) in known, f"{name}: {line} belongs to no agent"


def _opening(messages: Conversation) -> Conversation:
    return tuple(message for message in messages[:1] if message["role"] == "system")


TestFleet = FleetMachine.TestCase
TestFleet.settings = settings(
    max_examples=40,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
