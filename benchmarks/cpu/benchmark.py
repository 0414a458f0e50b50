"""The native CPU step beside llama.cpp and MLX: decode and prefill, called without an engine."""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from time import sleep
from typing import Protocol

from benchmarks.cpu.llama import LlamaSide
from benchmarks.cpu.llama_weights import requantise_to_q8_0
from benchmarks.cpu.own import ROOM_TOKENS, OwnSide
from keepwarm.bench.progress import OnProgress, no_progress
from keepwarm.bench.prompts import prompt_ids
from keepwarm.bench.report import Figure, Report
from keepwarm.bench.requiring import require
from keepwarm.bench.timing import median
from keepwarm.core.ports import LoadedModel
from keepwarm.mlx_backend.loading.embedded_model import EMBEDDED_NAME, embedded_source
from keepwarm.mlx_backend.loading.loader import load_model
from keepwarm.native.library import num_cores

NUM_SLOTS = 8
WARM_UP_TOKENS = 64
OWN = "native step"
MLX = "MLX"
REST_S = 0.5
"""How many seconds nothing runs before a side is measured: the threads of MKL and llama.cpp spin
on for 0.2 s after their last work, and would take the next side's cores."""
LLAMA_WHEELS = ("xllamacpp", "gguf")


class Side(Protocol):
    """One way of computing the model."""

    name: str

    def prefill_s(self, prompt: Sequence[int]) -> float: ...

    def decode_s(self, prompts: Sequence[Sequence[int]], num_steps: int) -> float: ...


@dataclass(frozen=True, slots=True)
class Case:
    """What is measured: a decode step of rows of these lengths, or a prefill.

    `over_llama` and `over_mlx` are the least ratios of the others' time to the native step's; None
    where they are not measured.
    """

    lengths: tuple[int, ...]
    over_llama: float | None
    over_mlx: float | None = None
    is_prefill: bool = False

    @property
    def name(self) -> str:
        if self.is_prefill:
            return f"prefill of {self.lengths[0]:,} tokens"
        first, last = self.lengths[0], self.lengths[-1]
        span = f"{first:,}" if first == last else f"{first:,} to {last:,}"
        return f"decode, {len(self.lengths)} at {span} tokens"


MIXED = tuple(200 + 3_800 * number // (NUM_SLOTS - 1) for number in range(NUM_SLOTS))


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuPlan:
    """The cases, and how often each is measured: sides take turns in every round."""

    num_rounds: int = 3
    num_steps: int = 16
    cases: tuple[Case, ...] = (
        Case((32,), 1.5, 7.0),
        Case((2_048,), 2.5),
        Case((7_500,), 2.5),
        Case((32,) * NUM_SLOTS, 1.5, 4.5),
        Case((2_048,) * NUM_SLOTS, None, 6.0),
        Case(MIXED, 2.0),
        Case((512,), 1.5, 2.8, is_prefill=True),
        Case((2_048,), 1.5, is_prefill=True),
        Case((4_096,), 1.5, is_prefill=True),
    )
    seed: int = 0


QUICK = partial(
    CpuPlan,
    num_rounds=1,
    num_steps=2,
    cases=(
        Case((32,), 1.5, 7.0),
        Case((32,) * NUM_SLOTS, 1.5, 4.5),
        Case((256,), 1.5, 2.8, is_prefill=True),
    ),
)
"""Small sizes, to see that it works."""


def run_cpu(model: str, plan: CpuPlan, on_progress: OnProgress = no_progress) -> Report:
    """Measure each case with all sides in turns. Without llama.cpp's wheels, beside MLX only.

    Raises PathNotTaken where the native step does not compute the model.
    """
    native = load_model(model)
    require(native.is_reproducible, f"{model} is computed by {native.computed_by}")
    own = OwnSide(OWN, native.batch_gen_factory(deterministic=False))
    mlx = OwnSide(MLX, load_model(model, native=False).batch_gen_factory(deterministic=False))
    figures: list[Figure] = []
    missing = _why_no_llama(model)
    with TemporaryDirectory(prefix="keepwarm-bench-cpu-") as folder:
        weights = {} if missing else _weights(Path(folder))
        for number, case in enumerate(plan.cases):
            on_progress(case.name, number, len(plan.cases))
            with _llama_sides(weights, case) as llama:
                figures += _measured(case, plan, native, own, mlx, llama)
            own.forget()
            mlx.forget()
    notes = (f"cores: {num_cores()}, load of the machine: {os.getloadavg()[0]:.1f}",)
    return Report(tuple(figures), notes + missing)


def _why_no_llama(model: str) -> tuple[str, ...]:
    if model != EMBEDDED_NAME:
        return (f"not compared with llama.cpp: only {EMBEDDED_NAME} is there as GGUF",)
    wheels = [name for name in LLAMA_WHEELS if find_spec(name) is None]
    if not wheels:
        return ()
    return (f"not compared with llama.cpp, which needs `pip install {' '.join(wheels)}`",)


def _weights(folder: Path) -> dict[str, Path]:
    packaged = embedded_source().path
    requantised = folder / "q8_0.gguf"
    requantise_to_q8_0(packaged, requantised)
    return {"llama.cpp Q4_1": packaged, "llama.cpp Q8_0": requantised}


@contextmanager
def _llama_sides(weights: dict[str, Path], case: Case) -> Iterator[list[Side]]:
    if case.over_llama is None:
        yield []
        return
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                LlamaSide(
                    name,
                    path,
                    num_threads=num_cores(),
                    num_slots=len(case.lengths),
                    slot_tokens=max(case.lengths) + ROOM_TOKENS,
                )
            )
            for name, path in weights.items()
        ]


def _measured(
    case: Case,
    plan: CpuPlan,
    loaded: LoadedModel,
    own: Side,
    mlx: Side,
    llama: Sequence[Side],
) -> list[Figure]:
    sides = [own, *llama, *([mlx] if case.over_mlx else [])]
    prompts = [
        prompt_ids(loaded.tokenizer, length, seed=plan.seed + row)
        for row, length in enumerate(case.lengths)
    ]
    seconds: dict[str, list[float]] = {side.name: [] for side in sides}
    for side in sides:
        _warm_up(case, side, prompts)
    for _ in range(plan.num_rounds):
        for side in sides:
            sleep(REST_S)
            seconds[side.name].append(
                side.prefill_s(prompts[0])
                if case.is_prefill
                else side.decode_s(prompts, plan.num_steps)
            )
    times = {name: median(values) for name, values in seconds.items()}
    facts = {f"{name} ms": 1e3 * value for name, value in times.items()}
    figures = []
    if llama and case.over_llama is not None:
        best = min(times[side.name] for side in llama)
        figures.append(
            _figure(case, "llama.cpp's better", best / times[OWN], case.over_llama, facts)
        )
    if case.over_mlx is not None:
        figures.append(_figure(case, MLX, times[MLX] / times[OWN], case.over_mlx, facts))
    return figures


def _warm_up(case: Case, side: Side, prompts: Sequence[Sequence[int]]) -> None:
    """Touch weights and memory; before decode, compute the prompts."""
    if case.is_prefill:
        side.prefill_s(prompts[0][:WARM_UP_TOKENS])
    else:
        side.decode_s(prompts, 1)


def _figure(case: Case, other: str, ratio: float, aim: float, facts: dict[str, float]) -> Figure:
    return Figure(f"{case.name}: as fast as {other}, times", ratio, aim, at_least=True, facts=facts)
