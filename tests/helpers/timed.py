"""Engines on a fake device whose steps take known time on a clock that nothing else moves."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engines import PLENTY, fake_loaded
from keepwarm import BlockPool, BlockPoolBatchEngine
from keepwarm.core.policies import EngineConfig
from keepwarm.core.ports import RowInput
from keepwarm.testing.clock import FakeClock
from keepwarm.testing.generator import FakeBatchGenerator


@dataclass(frozen=True)
class Device:
    """What a step costs in seconds: a pass over the weights, and each token in it.

    Where the parts of a step do not share a pass, each chunk has one of its own.
    """

    pass_s: float
    decoded_s: float
    prefilled_s: float
    shares_passes: bool

    def seconds(self, inputs: Sequence[RowInput]) -> float:
        chunks = [len(item.token_ids) for item in inputs if not item.draws]
        num_decoded = len(inputs) - len(chunks)
        num_passes = bool(num_decoded) + len(chunks)
        if self.shares_passes:
            num_passes = 1
        tokens_s = num_decoded * self.decoded_s + sum(chunks) * self.prefilled_s
        return num_passes * self.pass_s + tokens_s


NATIVE = Device(0.0045, 0.002, 0.0017, shares_passes=True)
"""About SmolLM2 on the native step, on two cores."""
MLX = Device(0.045, 0.016, 0.0055, shares_passes=False)
"""About SmolLM2 on MLX's CPU device, on two cores."""


class TimedGenerator(FakeBatchGenerator):
    """The fake, whose steps move the clock; `steps` has the inputs and the seconds of each."""

    def __init__(self, device: Device, clock: FakeClock) -> None:
        super().__init__(least_chunk_tokens=1 if device.shares_passes else 32)
        self.steps: list[tuple[tuple[RowInput, ...], float]] = []
        self._device = device
        self._clock = clock

    def step(self, inputs: Sequence[RowInput]) -> list[list[int]]:
        tokens = super().step(inputs)
        seconds = self._device.seconds(inputs)
        self._clock.advance(seconds)
        self.steps.append((tuple(inputs), seconds))
        return tokens


def timed_engine(device: Device, **config: Any) -> tuple[BlockPoolBatchEngine, FakeClock]:
    """Build an engine on the device, and return the clock that it reads."""
    clock = FakeClock(tick_s=0.0)

    def factory(*, deterministic: bool) -> TimedGenerator:
        return TimedGenerator(device, clock)

    engine = BlockPoolBatchEngine(
        fake_loaded(factory=factory),  # type: ignore[arg-type]
        pool=BlockPool(PLENTY),
        config=EngineConfig(always_restore=True, **config),
        clock=clock,
    )
    return engine, clock


def device_of(engine: BlockPoolBatchEngine) -> TimedGenerator:
    generator = engine.tiers.model.generator
    assert isinstance(generator, TimedGenerator)
    return generator
