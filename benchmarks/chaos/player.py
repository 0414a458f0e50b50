"""Does one random thing after another to an engine's agents, and says what."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.chaos.speaker import Speaker, sizes_of
from benchmarks.chaos.state import State, after_turns, kept_ids, state_of, submitted
from benchmarks.chaos.traps import Phase, Tell
from keepwarm.core.events import Completed, Failed
from keepwarm.core.ports import Tokenizer
from keepwarm.engine.batch_engine import BlockPoolBatchEngine

SETTLE_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class _Running:
    name: str
    prompt_ids: list[int]
    messages: list[Any] | None


class Player:
    """Owns the engine; `tell` hears of every intention before it and every result after it."""

    def __init__(
        self,
        engine: BlockPoolBatchEngine,
        speaker: Speaker,
        tell: Tell,
        *,
        tokenizer: Tokenizer,
        world: str,
        phase: Phase | None,
    ) -> None:
        self._engine = engine
        self._speaker = speaker
        self._random = speaker.random
        self._tell = tell
        self._tokenizer = tokenizer
        self._sizes = sizes_of(world)
        self._running: dict[str, _Running] = {}
        self._states = {view.agent_id: state_of(engine, view.agent_id) for view in engine.agents()}
        self._weights = _weights(phase)

    def play(self, num_operations: int) -> None:
        """Draw and do this many operations, with a random number of steps behind each."""
        for _ in range(num_operations):
            (name,) = self._random.choices(list(self._weights), list(self._weights.values()))
            getattr(self, f"_{name}")()
            self._steps(self._random.choice((0, 1, 3, 10, 40)))

    def settle(self) -> None:
        """Step until no request runs and the store has taken what it can."""
        until = time.monotonic() + SETTLE_TIMEOUT_S
        while self._engine.has_work or (len(self._engine.tiers.saves) and time.monotonic() < until):
            if not self._engine.has_work:
                time.sleep(0.001)  # the store's thread would not get the interpreter otherwise
            self._step()
        if not len(self._engine.tiers.saves):
            sizes = {name: len(state["ids"]) for name, state in self._states.items()}
            self._tell({"did": "settle", "tokens": sizes})

    # -- operations ------------------------------------------------------------------------------

    def _turn(self) -> None:
        names = self._idle()
        if len(self._states) < self._sizes.num_agents and self._random.random() < 0.4:
            names = []
        name = self._random.choice(names) if names else self._speaker.new_name()
        state = self._states.get(name)
        if state is not None and len(state["ids"]) > self._sizes.agent:
            self._roll_back(name, 0)
            state = self._states[name]
        request = self._speaker.request(name, state)
        num_reply = self._speaker.num_reply()
        request_id = self._engine.submit(agent_id=name, max_tokens=num_reply, **request)
        prompt_ids, max_tokens = submitted(self._engine, request_id)
        messages = [*((state or {}).get("messages") or []), *_messages_of(request)]
        running = _Running(name, prompt_ids, None if "token_ids" in request else messages)
        self._running[request_id] = running
        self._states.setdefault(name, {"ids": [], "messages": [], "turns": []})
        self._tell(
            {
                "doing": "turn",
                "agent": name,
                "prompt": running.prompt_ids,
                "messages": running.messages,
                "max_tokens": max_tokens,
                "num_turns": len(state["turns"]) if state else 0,
            }
        )

    def _anonymous(self) -> None:
        length = self._random.randint(self._sizes.short, self._sizes.long)
        self._engine.submit(token_ids=self._speaker.ids(length), max_tokens=2)

    def _demote(self) -> None:
        self._with_idle_agent(self._engine.demote)

    def _park(self) -> None:
        self._with_idle_agent(self._engine.park)

    def _prefetch(self) -> None:
        self._with_idle_agent(self._engine.prefetch)

    def _with_idle_agent(self, call: Callable[[str], object]) -> None:
        names = [name for name in self._idle() if self._is_known(name)]
        if names:
            call(self._random.choice(names))

    def _fork(self) -> None:
        parents = [name for name in self._idle() if self._states[name]["turns"]]
        if not parents or len(self._states) >= 2 * self._sizes.num_agents:
            return
        parent = self._random.choice(parents)
        kind = parent.partition("-")[0]
        name = f"{kind}-{self._speaker.new_name().partition('-')[2]}"
        at_turn = self._random.randint(1, len(self._states[parent]["turns"]))
        expected = after_turns(self._states[parent], at_turn)
        self._change(
            name,
            expected,
            lambda: self._engine.fork(parent, name, at_turn=at_turn),
            parent=parent,
        )

    def _rollback(self) -> None:
        names = [name for name in self._idle() if self._states[name]["turns"]]
        if names:
            name = self._random.choice(names)
            self._roll_back(name, self._random.randint(0, len(self._states[name]["turns"])))

    def _roll_back(self, name: str, turn: int) -> None:
        expected = after_turns(self._states[name], turn)
        self._change(name, expected, lambda: self._engine.rollback(name, turn=turn))

    def _delete(self) -> None:
        names = [name for name in self._idle() if self._is_known(name)]
        if len(names) > 2:
            name = self._random.choice(names)
            self._change(name, None, lambda: self._engine.delete(name))

    def _quota(self) -> None:
        """Leave little room for one agent's own blocks, or enough again."""
        names = [name for name in self._idle() if self._is_known(name)]
        if names:
            name = self._random.choice(names)
            quota_bytes = self._random.choice((4, 100_000)) * 80_000
            self._engine.configure(name, quota_bytes=quota_bytes)
            self._tell({"did": "quota", "agent": name})

    def _settle(self) -> None:
        self.settle()

    def _change(
        self, name: str, expected: State | None, call: Callable[[], object], **facts: str
    ) -> None:
        self._tell({"doing": "change", "agent": name, "state": expected, **facts})
        call()
        if expected is None:
            del self._states[name]
        else:
            self._states[name] = expected
            if state_of(self._engine, name) != expected:
                self._tell({"wrong": f"{name} is not as it should be after a fork or rollback"})
        if self._engine.flush():
            self._tell({"did": "change", "agent": name, "state": expected})

    # -- inside ----------------------------------------------------------------------------------

    def _steps(self, num_steps: int) -> None:
        for _ in range(num_steps):
            if not self._engine.has_work:
                return
            self._step()

    def _step(self) -> None:
        for event in self._engine.step():
            if isinstance(event, Failed):
                self._tell({"failed": f"{event.agent_id}: {event.error!r}"})
                self._running.pop(event.request_id, None)
            elif isinstance(event, Completed) and event.request_id in self._running:
                self._complete(self._running.pop(event.request_id), event)

    def _complete(self, running: _Running, completed: Completed) -> None:
        state = self._states[running.name] = state_of(self._engine, running.name)
        detokenizer = self._tokenizer.detokenizer()
        kept = kept_ids(completed, detokenizer, is_of_ids=running.messages is None)
        said = state["ids"] == [*running.prompt_ids, *kept]
        if running.messages is not None:
            reply = {"role": "assistant", "content": completed.text}
            said = said and state["messages"] == [*running.messages, reply]
        if not said:
            self._tell({"wrong": f"{running.name} does not remember what was said"})
        if completed.durable:
            self._tell({"did": "turn", "agent": running.name, "state": state})

    def _idle(self) -> list[str]:
        busy = {running.name for running in self._running.values()}
        return [name for name in self._states if name not in busy and not self._is_in_use(name)]

    def _is_in_use(self, name: str) -> bool:
        return self._is_known(name) and self._engine.agent(name).in_use

    def _is_known(self, name: str) -> bool:
        return name in self._engine.book


def _messages_of(request: dict[str, Any]) -> list[Any]:
    return [*request.get("messages", ()), *request.get("append", ())]


def _weights(phase: Phase | None) -> dict[str, float]:
    """Return how often each operation is drawn: more often those that the phase is made of."""
    weights: dict[str, float] = {
        "turn": 10,
        "anonymous": 1,
        "demote": 1,
        "park": 1,
        "prefetch": 1,
        "fork": 1,
        "rollback": 0.5,
        "delete": 0.3,
        "quota": 0.3,
        "settle": 1,
    }
    favoured: dict[Phase | None, dict[str, float]] = {
        Phase.READ: {"park": 5, "prefetch": 2},
        Phase.RESTORE: {"park": 5, "prefetch": 2},
        Phase.DEMOTION: {"demote": 5},
        Phase.REMOVAL: {"delete": 2, "quota": 2},
        Phase.DELETE: {"delete": 5},
        Phase.SCRUB: {"delete": 5},
    }
    return weights | favoured.get(phase, {})
