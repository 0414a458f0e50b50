"""Engines on the fake generator, and the questions that many tests ask of them."""

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from keepwarm import BlockPool, BlockPoolBatchEngine
from keepwarm.core.agent_store import AgentStore
from keepwarm.core.events import Completed, Delta, Event, Failed
from keepwarm.core.layout import BLOCK_TOKENS
from keepwarm.core.policies import EngineConfig
from keepwarm.core.ports import LoadedModel, RowInput, Tokenizer
from keepwarm.engine.agents.book import AgentBook
from keepwarm.kv.tiers import Tiers
from keepwarm.testing.clock import FakeClock
from keepwarm.testing.generator import (
    FAKE_LAYOUT,
    FakeBatchGenerator,
    FakePayload,
    FakeSlab,
    kv_of,
)
from keepwarm.testing.tokenizer import FakeTokenizer

TOKENIZER = FakeTokenizer()
BLOCK_BYTES = FAKE_LAYOUT.block_bytes
PLENTY = 4096 * BLOCK_BYTES
DEVICE_S = 20e-6
MAX_KNOWN = 200


class FakeFactory:
    """Makes generators and keeps them all; `fail_at` has the failing calls of one after another.

    A step in which rows decode sleeps `pause_s` seconds without the interpreter's lock, as if a
    device computed: DEVICE_S suffices. Otherwise the engine's thread can keep the lock from a
    server's event loop for seconds.
    """

    def __init__(
        self,
        *,
        script: Sequence[int] | None = None,
        fail_at: Sequence[Sequence[int]] = (),
        vocab_size: int = 256,
        pause_s: float = 0.0,
    ) -> None:
        self.made: list[FakeBatchGenerator] = []
        self._script = script
        self._fail_at = fail_at
        self._vocab_size = vocab_size
        self._pause_s = pause_s

    def __call__(self, *, deterministic: bool) -> FakeBatchGenerator:
        number = len(self.made)
        generator = FakeBatchGenerator(
            vocab_size=self._vocab_size,
            script=self._script,
            fail_at=self._fail_at[number] if number < len(self._fail_at) else (),
            deterministic=deterministic,
        )
        if self._pause_s:
            _pause(generator, self._pause_s)
        self.made.append(generator)
        return generator

    @property
    def num_prefilled(self) -> int:
        return sum(length for made in self.made for _, length in made.prefilled)


def _pause(generator: FakeBatchGenerator, pause_s: float) -> None:
    step = generator.step

    def slow_step(inputs: Sequence[RowInput]) -> list[list[int]]:
        if any(item.draws for item in inputs):
            time.sleep(pause_s)
        return step(inputs)

    generator.step = slow_step  # type: ignore[method-assign]


def fake_loaded(
    *,
    factory: FakeFactory | None = None,
    tokenizer: Tokenizer = TOKENIZER,
    max_context_tokens: int = 100_000,
    fingerprint: str = "fake",
) -> LoadedModel:
    """Build a model on the fake generator."""
    return LoadedModel(
        name="fake",
        fingerprint=fingerprint,
        layout=FAKE_LAYOUT,
        max_context_tokens=max_context_tokens,
        vocab_size=tokenizer.vocab_size,
        tokenizer=tokenizer,
        batch_gen_factory=factory or FakeFactory(),
        computed_by="computed by a fake",
    )


def fake_engine(
    *,
    num_blocks: int | None = None,
    max_context_tokens: int = 100_000,
    tokenizer: Tokenizer = TOKENIZER,
    factory: FakeFactory | None = None,
    store: AgentStore | None = None,
    fingerprint: str = "fake",
    recorded_as: str = "",
    book: AgentBook | None = None,
    **config: Any,
) -> BlockPoolBatchEngine:
    """Build an engine on a fake generator with a budget of `num_blocks` blocks."""
    loaded = fake_loaded(
        factory=factory,
        tokenizer=tokenizer,
        max_context_tokens=max_context_tokens,
        fingerprint=fingerprint,
    )
    budget_bytes = PLENTY if num_blocks is None else num_blocks * BLOCK_BYTES
    return BlockPoolBatchEngine(
        loaded,
        pool=BlockPool(budget_bytes),
        store=store,
        # The fake computes faster than any disk reads.
        config=EngineConfig(**{"always_restore": True, **config}),
        clock=FakeClock(),
        recorded_as=recorded_as,
        book=book,
    )


def scripted(*token_ids: int, **more: Any) -> BlockPoolBatchEngine:
    """Build an engine whose every reply is these ids."""
    return fake_engine(factory=FakeFactory(script=token_ids), **more)


def generator_of(engine: BlockPoolBatchEngine) -> FakeBatchGenerator:
    generator = engine.tiers.model.generator
    assert isinstance(generator, FakeBatchGenerator)
    return generator


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def ids(num_tokens: int, salt: int = 0) -> list[int]:
    """Return prompt ids; those of two salts differ from the first on."""
    return [(7 + salt + position * (3 + salt)) % 256 for position in range(num_tokens)]


def step(engine: BlockPoolBatchEngine, times: int = 1) -> list[Event]:
    """Step `times` times, check the engine after each, and return the events."""
    events: list[Event] = []
    for _ in range(times):
        events += engine.step()
        engine.check()
        check_values(engine.tiers)
    return events


def settle(engine: BlockPoolBatchEngine) -> None:
    """Step until the store has taken all KV that waits for it."""
    for _ in range(10_000):
        if not len(engine.tiers.saves):
            engine.check()
            check_values(engine.tiers)
            return
        engine._store.wait(0.05)
        engine.step()
    raise AssertionError(f"{engine.tiers.saves!r}")


def drain(engine: BlockPoolBatchEngine, *, max_steps: int = 20_000) -> list[Event]:
    """Step until the engine has no work; return the events."""
    events: list[Event] = []
    for _ in range(max_steps):
        if not engine.has_work:
            return events
        events += step(engine)
    raise AssertionError(f"{engine!r} still has work after {max_steps} steps")


def ending_of(events: Sequence[Event], request_id: str) -> Completed | Failed:
    """Return the one event that ended the request."""
    endings = [
        event
        for event in events
        if isinstance(event, Completed | Failed) and event.request_id == request_id
    ]
    assert len(endings) == 1, endings
    return endings[0]


def completed(events: Sequence[Event], request_id: str) -> Completed:
    ending = ending_of(events, request_id)
    assert isinstance(ending, Completed), ending
    return ending


def failed(events: Sequence[Event], request_id: str) -> Failed:
    ending = ending_of(events, request_id)
    assert isinstance(ending, Failed), ending
    return ending


def run(engine: BlockPoolBatchEngine, **request: Any) -> Completed:
    """Submit a request and step until the engine has no work; return its end."""
    request_id = engine.submit(**request)
    return completed(drain(engine), request_id)


def deltas_of(events: Sequence[Event], request_id: str) -> list[Delta]:
    return [e for e in events if isinstance(e, Delta) and e.request_id == request_id]


def text_of(events: Sequence[Event], request_id: str) -> str:
    return "".join(delta.text for delta in deltas_of(events, request_id))


def fresh_reply(
    prompt_ids: Sequence[int], *, vocab_size: int = 256, **request: Any
) -> tuple[int, ...]:
    """Return what a new engine with plenty of memory replies."""
    engine = fake_engine(factory=FakeFactory(vocab_size=vocab_size))
    request_id = engine.submit(token_ids=list(prompt_ids), **request)
    events: list[Event] = []
    while engine.has_work:
        events += engine.step()
    return completed(events, request_id).token_ids


@dataclass(slots=True)
class KnownValues:
    """The KV of a run of ids, which the next step's ids most often go on from."""

    token_ids: list[int] = field(default_factory=list)
    values: list[int] = field(default_factory=list)

    def of(self, token_ids: Sequence[int]) -> list[int]:
        """Return the fake KV that these ids must have; only new ids are computed."""
        num_known = len(self.token_ids)
        if token_ids[:num_known] != self.token_ids:
            num_known = 0
        del self.token_ids[num_known:], self.values[num_known:]
        for token_id in token_ids[num_known:]:
            self.values.append(kv_of(self.values[-1] if self.values else 0, token_id))
        self.token_ids += token_ids[num_known:]
        return self.values


_KNOWN: defaultdict[int, KnownValues] = defaultdict(KnownValues)
"""By the line's id: a line that comes to have another's is told apart by its ids."""


def check_values(tiers: Tiers) -> None:
    """Check that all that lines hold, in slab, blocks and tail, is the KV of their ids.

    Only the fake generator's KV is known.
    """
    if not isinstance(tiers.model.generator, FakeBatchGenerator):
        return
    if len(_KNOWN) > MAX_KNOWN:
        _KNOWN.clear()
    for line in tiers._lines.values():
        expected = _KNOWN[id(line)].of(line.token_ids)
        if line.slab is not None:
            assert isinstance(line.slab, FakeSlab)
            assert line.slab.values == expected[: line.slab.num_tokens]
        for block in line.blocks:
            start = block.depth * BLOCK_TOKENS
            if block.payload is not None:
                assert isinstance(block.payload, FakePayload)
                assert list(block.payload.values) == expected[start : start + BLOCK_TOKENS]
        if line.tail is not None:
            assert isinstance(line.tail, FakePayload)
            assert list(line.tail.values) == expected[len(line.blocks) * BLOCK_TOKENS :]


def main_blocks(engine: BlockPoolBatchEngine, agent_id: str) -> Any:
    """Return the block table of the agent's main line."""
    return engine.book.get(agent_id).main.blocks


def prompt_of(engine: BlockPoolBatchEngine, request_id: str) -> list[int]:
    """Return the prompt's ids of a request that has not ended."""
    sequence = engine._turns.active[request_id].sequence
    return list(sequence.prompt_ids)


def phase_of(engine: BlockPoolBatchEngine, request_id: str) -> str:
    return engine._turns.active[request_id].sequence.phase.value
