"""The process that chaos kills: agents that talk, move and vanish at random, and a trap somewhere.

It says on its output, in a line of JSON each, what it is about to do to an agent (`doing`) and what
it may count on from now on (`did`), and where it is when it dies (`hit`).
"""

import json
import os
import random
import signal
import sys
import threading
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.chaos.traps import Phase, Trap, set_trap
from keepwarm.core.errors import InvariantBroken
from keepwarm.core.events import Completed, Failed
from keepwarm.core.layout import BLOCK_TOKENS, CacheLayout, LayerLayout
from keepwarm.core.policies import EngineConfig
from keepwarm.core.pool import BlockPool
from keepwarm.core.ports import Detokenizer, LoadedModel, Payload
from keepwarm.core.stored import AgentState
from keepwarm.engine.batch_engine import BlockPoolBatchEngine
from keepwarm.store.agent_cache_store import AgentCacheStore, StoreConfig
from keepwarm.testing.generator import FakeBatchGenerator, FakePayload
from keepwarm.testing.tokenizer import FakeTokenizer

FAKE = "fake"
NUM_FAKE_LAYERS = 32
FAKE_VOCABULARY = 256
SETTLE_TIMEOUT_S = 5.0

State = dict[str, Any]
"""An agent as both processes speak of it: see `plain_state`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildSpec:
    """What the process to be killed is told. `phase` None: it plays, closes properly and ends."""

    home: str
    world: str
    seed: int
    phase: Phase | None
    visit: int
    ram_blocks: int
    disk_budget_bytes: int
    num_operations: int

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "ChildSpec":
        fields = json.loads(text)
        phase = fields.pop("phase")
        return cls(phase=None if phase is None else Phase(phase), **fields)


@dataclass(frozen=True, slots=True)
class Sizes:
    """How long prompts (in tokens or letters) and replies are, and an agent at most."""

    short: int
    long: int
    reply: int
    agent: int
    num_agents: int


FAKE_SIZES = Sizes(short=40, long=900, reply=30, agent=2200, num_agents=6)
MODEL_SIZES = Sizes(short=20, long=280, reply=6, agent=600, num_agents=2)


def sizes_of(world: str) -> Sizes:
    return FAKE_SIZES if world == FAKE else MODEL_SIZES


class WideFakeGenerator(FakeBatchGenerator):
    """The fake with KV of a model's size: every layer holds the same, and must still when read."""

    def __init__(self, *, deterministic: bool) -> None:
        super().__init__(
            layout=CacheLayout((LayerLayout(1, 1, 1),) * NUM_FAKE_LAYERS, "float32"),
            vocab_size=FAKE_VOCABULARY,
            deterministic=deterministic,
        )

    @property
    def layout(self) -> CacheLayout:
        return self._layout

    def pack(self, payload: Payload) -> tuple[memoryview, ...]:
        if not isinstance(payload, FakePayload):
            raise InvariantBroken(f"{payload!r} is no payload of this generator")
        layer = memoryview(array("Q", payload.values).tobytes())
        half = layer.nbytes // 2
        return (layer[:half], layer[half:]) * NUM_FAKE_LAYERS

    def unpack(self, num_tokens: int, data: memoryview) -> Payload:
        layer_bytes = 8 * num_tokens
        layer = bytes(data[:layer_bytes])
        if data != layer * NUM_FAKE_LAYERS:
            raise InvariantBroken("the layers of a payload differ")
        return super().unpack(num_tokens, memoryview(layer))


def load_world(world: str) -> LoadedModel:
    """The fake, or a model by its name."""
    if world != FAKE:
        from keepwarm.mlx_backend.loading.loader import load_model

        return load_model(world)
    return LoadedModel(
        name=FAKE,
        fingerprint="chaos",
        layout=WideFakeGenerator(deterministic=True).layout,
        max_context_tokens=100_000,
        vocab_size=FakeTokenizer().vocab_size,
        tokenizer=FakeTokenizer(),
        batch_gen_factory=WideFakeGenerator,
    )


def new_engine(
    loaded: LoadedModel, store: AgentCacheStore | None, ram_blocks: int
) -> BlockPoolBatchEngine:
    """Strict, and it reads from the disk what it could compute as fast."""
    return BlockPoolBatchEngine(
        loaded,
        pool=BlockPool(ram_blocks * loaded.layout.block_bytes),
        store=store,
        config=EngineConfig(always_restore=True),
        deterministic=True,
    )


def open_store(home: str, disk_budget_bytes: int) -> AgentCacheStore:
    config = StoreConfig(disk_budget_bytes=disk_budget_bytes, free_floor_bytes=0)
    return AgentCacheStore(home, config=config)


def plain_state(state: AgentState) -> State:
    """The main line in plain values. A turn is its tokens and the number of its messages."""
    main = next(line for line in state.lines if line.number == 0)
    return {
        "ids": list(main.transcript.token_ids),
        "messages": None if main.messages is None else [dict(m) for m in main.messages],
        "turns": [
            [turn.num_tokens, None if turn.messages is None else len(turn.messages)]
            for turn in main.turns
        ],
    }


def kept_ids(completed: Completed, detokenizer: Detokenizer, *, is_of_ids: bool) -> tuple[int, ...]:
    """The reply's ids as its line remembers them: of a reply to messages, those of its text."""
    if is_of_ids:
        return completed.token_ids
    text, num_kept = "", 0
    while text != completed.text:
        text += detokenizer.push(completed.token_ids[num_kept])
        num_kept += 1
    return completed.token_ids[:num_kept]


def after_turns(state: State, num_turns: int) -> State:
    """The agent as it was after so many of its turns."""
    if num_turns == 0:
        return {"ids": [], "messages": [], "turns": []}
    num_tokens, num_messages = state["turns"][num_turns - 1]
    return {
        "ids": state["ids"][:num_tokens],
        "messages": None if num_messages is None else state["messages"][:num_messages],
        "turns": state["turns"][:num_turns],
    }


class Speaker:
    """Draws what agents are told. Agents whose names begin with `chat` are told messages."""

    def __init__(self, seed: int, sizes: Sizes, vocab_size: int) -> None:
        self.random = random.Random(seed)  # noqa: S311 - a seeded campaign, not a secret
        self._sizes = sizes
        self._vocab_size = min(vocab_size, 10_000)

    def new_name(self) -> str:
        kind = self.random.choice(("chat", "ids"))
        return f"{kind}-{self.random.getrandbits(48):012x}"

    def request(self, name: str, state: State | None) -> dict[str, Any]:
        """What continues the agent, in terms of `submit`."""
        if name.startswith("chat"):
            message = {"role": "user", "content": self._words()}
            return {"append" if state and state["messages"] else "messages": [message]}
        known = state["ids"] if state else []
        return {"token_ids": [*known, *self.ids(self._num_new(len(known)))]}

    def ids(self, num_tokens: int) -> list[int]:
        return [self.random.randrange(self._vocab_size) for _ in range(num_tokens)]

    def num_reply(self) -> int:
        if self.random.random() < 0.05:
            return 8 * self._sizes.reply
        return self.random.randint(1, self._sizes.reply)

    def _num_new(self, num_known: int) -> int:
        drawn = self._length()
        if self.random.random() < 0.2:  # to the end of a block, or one token off
            return drawn - (num_known + drawn) % BLOCK_TOKENS + BLOCK_TOKENS
        return drawn

    def _words(self) -> str:
        letters = "abcdefgh ijklmnop qrstuvwxyz ü\n"
        return "".join(self.random.choice(letters) for _ in range(self._length()))

    def _length(self) -> int:
        if self.random.random() < 0.5:
            return self.random.randint(1, self._sizes.short)
        return self.random.randint(self._sizes.short, self._sizes.long)


@dataclass(frozen=True, slots=True)
class _Running:
    name: str
    prompt_ids: list[int]
    messages: list[Any] | None


class Player:
    """Owns the engine and does one random thing after another."""

    def __init__(
        self,
        spec: ChildSpec,
        engine: BlockPoolBatchEngine,
        speaker: Speaker,
        tell: Callable[[dict[str, Any]], None],
    ) -> None:
        self._engine = engine
        self._speaker = speaker
        self._random = speaker.random
        self._tell = tell
        self._sizes = sizes_of(spec.world)
        self._running: dict[str, _Running] = {}
        self._states = {view.agent_id: self._state(view.agent_id) for view in engine.agents()}
        self._weights = _weights(spec.phase)

    def play(self, num_operations: int) -> None:
        for _ in range(num_operations):
            (name,) = self._random.choices(list(self._weights), list(self._weights.values()))
            getattr(self, f"_{name}")()
            self._steps(self._random.choice((0, 1, 3, 10, 40)))

    def settle(self) -> None:
        """Until nobody talks and the store has taken what it can."""
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
        sequence = self._engine._active[request_id].sequence
        prompt_ids = list(sequence.prompt_ids)
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
                "max_tokens": sequence.max_tokens,
                "num_turns": len(state["turns"]) if state else 0,
            }
        )

    def _anonymous(self) -> None:
        length = self._random.randint(self._sizes.short, self._sizes.long)
        self._engine.submit(token_ids=self._speaker.ids(length), max_tokens=2)

    def _demote(self) -> None:
        self._with_somebody(self._engine.demote)

    def _park(self) -> None:
        self._with_somebody(self._engine.park)

    def _prefetch(self) -> None:
        self._with_somebody(self._engine.prefetch)

    def _with_somebody(self, call: Callable[[str], object]) -> None:
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
        """Little room for one agent's own blocks, or enough again."""
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
            if self._state(name) != expected:
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
        state = self._states[running.name] = self._state(running.name)
        detokenizer = self._engine.intake.reader._tokenizer.detokenizer()
        kept = kept_ids(completed, detokenizer, is_of_ids=running.messages is None)
        said = state["ids"] == [*running.prompt_ids, *kept]
        if running.messages is not None:
            reply = {"role": "assistant", "content": completed.text}
            said = said and state["messages"] == [*running.messages, reply]
        if not said:
            self._tell({"wrong": f"{running.name} does not remember what was said"})
        if completed.durable:
            self._tell({"did": "turn", "agent": running.name, "state": state})

    def _state(self, name: str) -> State:
        return plain_state(self._engine._states.state_of(self._engine._book.get(name)))

    def _idle(self) -> list[str]:
        busy = {running.name for running in self._running.values()}
        return [name for name in self._states if name not in busy and not self._is_in_use(name)]

    def _is_in_use(self, name: str) -> bool:
        return self._is_known(name) and self._engine.agent(name).in_use

    def _is_known(self, name: str) -> bool:
        return name in self._engine._book


def _messages_of(request: dict[str, Any]) -> list[Any]:
    return [*request.get("messages", ()), *request.get("append", ())]


def _weights(phase: Phase | None) -> dict[str, float]:
    """How often each operation is drawn; what the phase is made of, more often."""
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


class Teller:
    """Writes lines to a pipe, whole ones, from any thread, with nothing kept back."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lock = threading.Lock()

    def __call__(self, said: dict[str, Any]) -> None:
        line = (json.dumps(said) + "\n").encode()
        with self._lock:
            while line:
                line = line[os.write(self._descriptor, line) :]


def main(arguments: Sequence[str] = ()) -> None:
    spec = ChildSpec.from_json(sys.stdin.read())
    tell = Teller(sys.stdout.fileno())
    loaded = load_world(spec.world)
    if spec.phase is not None:
        set_trap(Trap(spec.phase, spec.visit, spec.seed, tell), loaded)
    store = open_store(spec.home, spec.disk_budget_bytes)
    engine = new_engine(loaded, store, spec.ram_blocks)
    tell({"did": "open"})
    speaker = Speaker(spec.seed, sizes_of(spec.world), loaded.vocab_size)
    player = Player(spec, engine, speaker, tell)
    player.play(spec.num_operations)
    if spec.phase is None:
        player.settle()
        engine.close()
        store.close()
        return
    tell({"missed": spec.phase})
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
