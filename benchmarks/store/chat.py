"""Agents that talk on a real engine, store and tokenizer, without a model.

The fake generator's KV takes as many bytes for each token as the model's would.
"""

import threading
import time
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

from keepwarm.bench.prompts import passages, prompt_ids
from keepwarm.bench.requiring import require
from keepwarm.core.agent_store import AgentStore
from keepwarm.core.events import Completed, Event, Failed
from keepwarm.core.layout import CacheLayout
from keepwarm.core.policies import EngineConfig
from keepwarm.core.pool import BlockPool
from keepwarm.core.ports import BatchGenerator, LoadedModel, Payload, RowInput
from keepwarm.engine.batch_engine import BlockPoolBatchEngine
from keepwarm.testing.generator import FakeBatchGenerator, FakePayload

REPLY_TOKENS = 20
WORDS_PER_MESSAGE = 9
"""About 20 tokens, with the template's own."""
SETTLE_TIMEOUT_S = 60.0

_ITEM_BYTES = array("Q").itemsize


@contextmanager
def temporary_home() -> Iterator[Path]:
    with TemporaryDirectory(prefix="keepwarm-bench-store-") as name:
        yield Path(name)


class FullSizeGenerator(FakeBatchGenerator):
    """Packs as many bytes as the layout says, the first of which hold the fake KV.

    `decoded_s`: when it sampled last.
    """

    def __init__(self, layout: CacheLayout, script: Sequence[int]) -> None:
        super().__init__(layout=layout, script=script)
        self.decoded_s = 0.0

    def step(self, inputs: Sequence[RowInput]) -> list[list[int]]:
        tokens = super().step(inputs)
        if any(tokens):
            self.decoded_s = time.perf_counter()
        return tokens

    def pack(self, payload: Payload) -> tuple[memoryview, ...]:
        data = bytearray(payload.nbytes)
        values = array("Q", cast("FakePayload", payload).values).tobytes()
        data[: len(values)] = values
        return pieces_of(memoryview(data), self._layout, payload.num_tokens)

    def unpack(self, num_tokens: int, data: memoryview) -> Payload:
        values = array("Q", bytes(data[: num_tokens * _ITEM_BYTES]))
        return FakePayload(tuple(values), self._layout.token_bytes)


def pieces_of(data: memoryview, layout: CacheLayout, num_tokens: int) -> tuple[memoryview, ...]:
    """Cut `num_tokens` tokens of bytes into the layout's tensors."""
    ends = accumulate(tensor.nbytes for tensor in layout.tensors(num_tokens))
    return tuple(data[start:end] for start, end in pairwise([0, *ends]))


class Chat:
    """Owns an engine on which agents say short turns one after another."""

    def __init__(
        self, loaded: LoadedModel, store: AgentStore, *, budget_bytes: int = 8 << 30
    ) -> None:
        script = prompt_ids(loaded.tokenizer, REPLY_TOKENS, seed=REPLY_TOKENS)
        self.layout = loaded.layout
        self._generator = FullSizeGenerator(loaded.layout, script)

        def the_generator(*, deterministic: bool) -> BatchGenerator:
            require(not deterministic, "the fake has one way to compute")
            return self._generator

        self.engine = BlockPoolBatchEngine(
            replace(loaded, batch_gen_factory=the_generator, bare=lambda: None),
            pool=BlockPool(budget_bytes),
            store=store,
            config=EngineConfig(always_restore=True),  # the fake computes faster than disks read
        )
        self._words = " ".join(passages()).split()
        self._num_turns = 0

    def say(self, agent_id: str) -> float:
        """Say a turn of a few new words. Returns the seconds from its last token to its final
        event.
        """
        request_id = self.engine.submit(
            agent_id=agent_id, append=[self._message()], max_tokens=REPLY_TOKENS
        )
        return self._finish(request_id)

    def begin(self, agent_id: str) -> float:
        """Say the first turn of a new agent. Returns the seconds from its last token to its final
        event.
        """
        request_id = self.engine.submit(
            agent_id=agent_id, messages=[self._message()], max_tokens=REPLY_TOKENS
        )
        return self._finish(request_id)

    def read(self, agent_id: str, token_ids: Sequence[int]) -> None:
        """Run a turn with a prompt of ids."""
        self._finish(self.engine.submit(agent_id=agent_id, token_ids=token_ids, max_tokens=4))

    def settle(self) -> None:
        """Step until the store has taken all that was for it."""
        until = time.monotonic() + SETTLE_TIMEOUT_S
        while self.engine.has_work or len(self.engine.tiers.saves):
            require(time.monotonic() < until, f"{self.engine!r} after a minute")
            time.sleep(0.0005)
            self.engine.step()

    def kv_bytes(self, agent_id: str) -> int:
        return self.engine.agent(agent_id).held_tokens * self.layout.token_bytes

    def _message(self) -> dict[str, str]:
        start = self._num_turns * WORDS_PER_MESSAGE % (len(self._words) - WORDS_PER_MESSAGE)
        self._num_turns += 1
        return {"role": "user", "content": " ".join(self._words[start:][:WORDS_PER_MESSAGE])}

    def _finish(self, request_id: str) -> float:
        while True:
            completed = _completed(self.engine.step(), request_id)
            if completed is not None:
                require(completed.durable, f"{completed.agent_id}'s turn is not durable")
                return time.perf_counter() - self._generator.decoded_s


def _completed(events: Sequence[Event], request_id: str) -> Completed | None:
    for event in events:
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, Completed) and event.request_id == request_id:
            return event
    return None


def store_thread_bytes() -> int | None:
    """Return how many bytes the store's thread has handed to write calls so far.

    None where the system does not count them: only Linux does.
    """
    ids = [t.native_id for t in threading.enumerate() if t.name == "keepwarm-store"]
    require(len(ids) == 1, f"{len(ids)} stores are open")
    try:
        counts = Path(f"/proc/self/task/{ids[0]}/io").read_text("ascii")
    except OSError:
        return None
    (written,) = (line.split()[1] for line in counts.splitlines() if line.startswith("wchar:"))
    return int(written)
