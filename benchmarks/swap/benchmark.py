"""What two models cost that share memory for one of them."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import mlx.core as mx

from benchmarks.swap.house import OTHER, House, ModelPair, house_of
from benchmarks.swap.load import LoadPlan, load_figure, reply_of
from keepwarm.bench.progress import OnProgress, no_progress
from keepwarm.bench.prompts import prompt_ids
from keepwarm.bench.report import Figure, Report
from keepwarm.bench.requiring import require
from keepwarm.bench.timing import median, timed
from keepwarm.core.events import Completed
from keepwarm.core.ports import LoadedModel
from keepwarm.engine.requests import GenerateRequest
from keepwarm.mlx_backend.compute.canonical import why_not_promised
from keepwarm.mlx_backend.loading.loader import load_model
from keepwarm.mlx_backend.memory import release_memory

NEW_TOKENS = 16
SHORT_TOKENS = 64

MAX_RATIO_TO_BARE = 1.2
ALLOWANCE_S = 0.3
MIN_SPEED_UP = 50.0
MAX_GROWTH_PERCENT = 2.0

_STATUS = Path("/proc/self/status")


@dataclass(frozen=True, slots=True, kw_only=True)
class SwapPlan:
    """Sizes, and how often each figure is repeated.

    num_alternations: timed swaps in either direction. num_tokens: how long the agent is that is
    left and found again, `num_returns` times. num_swaps: over how many swaps memory is watched. The
    other fields are the load's; `patience_s` is how long its models may go on answering when they
    have to go.
    """

    num_alternations: int = 5
    num_tokens: int = 6000
    num_returns: int = 3
    num_swaps: int = 50
    load_s: float = 600.0
    num_clients: int = 4
    num_turns: int = 6
    reply_tokens: int = 8
    patience_s: float = 5.0
    seed: int = 0


QUICK = partial(
    SwapPlan,
    num_alternations=1,
    num_tokens=400,
    num_returns=1,
    num_swaps=4,
    load_s=3.0,
    num_turns=3,
    patience_s=0.2,
)
"""Small sizes, to see that it works."""


def run_swap(model: str, plan: SwapPlan, on_progress: OnProgress = no_progress) -> Report:
    with TemporaryDirectory(prefix="keepwarm-bench-swap-") as name:
        pair = ModelPair.beside(model, Path(name) / OTHER, seed=plan.seed)
        return asyncio.run(_measure(pair, Path(name), plan, on_progress))


async def _measure(
    pair: ModelPair, folder: Path, plan: SwapPlan, on_progress: OnProgress
) -> Report:
    """Run each part on a server of its own."""
    figures: list[Figure] = []
    notes: list[str] = []
    parts = _parts(plan)
    for number, part in enumerate(parts):
        on_progress(part.label, number, len(parts))
        async with house_of(pair, folder / f"home-{number}", **part.settings) as house:
            result = await part.measure(house, plan)
        figures += result.figures
        notes += result.notes
    on_progress("done", len(parts), len(parts))
    return Report(tuple(figures), tuple(notes))


@dataclass(frozen=True, slots=True)
class _Part:
    label: str
    measure: Callable[[House, SwapPlan], Awaitable[Report]]
    settings: Mapping[str, object] = field(default_factory=dict)


def _parts(plan: SwapPlan) -> list[_Part]:
    # Under load models are impatient, so that swaps cut into replies.
    loaded = {"model__patience_s": plan.patience_s, "model__deterministic": True}
    return [
        _Part("swaps beside bare loads", _swap_times),
        _Part(f"memory over {plan.num_swaps} swaps", _memory),
        _Part(f"an agent of {plan.num_tokens:,} tokens comes back", _return),
        _Part(f"{plan.load_s:g} s of clients on both models", _load, loaded),
    ]


# -- how long a swap takes -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Swap:
    """Seconds of a swap in which nothing drains; they begin when the files have been measured."""

    unload_s: float
    load_s: float
    attach_s: float

    @property
    def total_s(self) -> float:
        return self.unload_s + self.load_s + self.attach_s


async def _swap_times(house: House, plan: SwapPlan) -> Report:
    """Compare a swap to either model with a bare load of it, in turns, after one turn for the
    caches.
    """
    swaps: list[_Swap] = []
    bare_s: list[float] = []
    for number in range(plan.num_alternations + 1):
        for name, source in reversed(house.sources.items()):
            swap = await _timed_swap(house, name)
            seconds = await asyncio.to_thread(_bare_load_s, source)
            if number:
                swaps.append(swap)
                bare_s.append(seconds)
    swap_s = median([swap.total_s for swap in swaps])
    figure = Figure(
        f"a swap after the drain, less {ALLOWANCE_S:g} s, over a bare load of the same weights",
        max(swap_s - ALLOWANCE_S, 0.0) / median(bare_s),
        MAX_RATIO_TO_BARE,
        facts={
            "swap_ms": 1e3 * swap_s,
            "bare_ms": 1e3 * median(bare_s),
            "unload_ms": 1e3 * median([swap.unload_s for swap in swaps]),
            "load_ms": 1e3 * median([swap.load_s for swap in swaps]),
            "attach_ms": 1e3 * median([swap.attach_s for swap in swaps]),
        },
    )
    return Report((figure,))


async def _timed_swap(house: House, name: str) -> _Swap:
    await house.swap_to(name)
    ready_s = time.perf_counter()
    times = house.source
    return _Swap(
        times.began_s - times.measured_s, times.loaded_s - times.began_s, ready_s - times.loaded_s
    )


def _bare_load_s(source: str) -> float:
    loaded: list[LoadedModel] = []
    seconds = timed(lambda: loaded.append(load_model(source)))
    loaded.pop().close()
    release_memory()
    return seconds


# -- how soon an agent is back ---------------------------------------------------------------------


async def _return(house: House, plan: SwapPlan) -> Report:
    """Compare an agent's own first prefill with its TTFT after its model went and came back."""
    prompt = prompt_ids(house.source.tokenizer, plan.num_tokens, seed=plan.seed)
    new = prompt_ids(house.source.tokenizer, NEW_TOKENS, seed=plan.seed + 1)
    first = await _first_token(house, prompt)
    cold_s = first.timing.first_token_s or 0.0
    returned_s: list[float] = []
    for _ in range(plan.num_returns):
        await house.swap_to(OTHER)
        await house.swap_to(house.pair.first)
        reply = await _first_token(house, (*prompt, *first.token_ids, *new))
        require(reply.cache.cached_tokens >= plan.num_tokens, f"it was computed: {reply.cache}")
        returned_s.append(reply.timing.first_token_s or 0.0)
        await house.engine.call_at("ada", lambda engine: engine.rollback("ada", turn=1))
    figure = Figure(
        f"TTFT of a prefill of {plan.num_tokens:,} tokens over that after a swap and back "
        f"({NEW_TOKENS} new tokens)",
        cold_s / median(returned_s),
        MIN_SPEED_UP,
        at_least=True,
        facts={"prefill_ms": 1e3 * cold_s, "returned_ms": 1e3 * median(returned_s)},
    )
    return Report((figure,))


async def _first_token(house: House, token_ids: Sequence[int]) -> Completed:
    request = GenerateRequest(
        model=house.pair.first, agent_id="ada", token_ids=token_ids, max_tokens=1
    )
    return await reply_of(house.engine, request)


# -- what is left of a model in memory -------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Level:
    """Bytes: MLX's active memory, and the process's resident memory where the system tells it."""

    active: int
    resident: int | None


async def _memory(house: House, plan: SwapPlan) -> Report:
    """Watch memory while the models come and go, after one turn for what is made only once."""
    names = list(house.sources)
    levels: list[_Level] = []
    weight_bytes = 0
    for number in range(plan.num_swaps + len(names)):
        name = names[number % len(names)]
        await house.swap_to(name)
        weight_bytes = mx.get_active_memory()
        await _say_something(house, name)
        await house.models.unload(name)
        if number >= len(names) - 1:
            levels.append(_Level(mx.get_active_memory(), _resident_bytes()))
    return Report(_growth(levels, weight_bytes))


async def _say_something(house: House, name: str) -> None:
    prompt = prompt_ids(house.source.tokenizer, SHORT_TOKENS, seed=0)
    request = GenerateRequest(
        model=name, agent_id=f"of-{name == OTHER:d}", token_ids=prompt, max_tokens=4
    )
    await reply_of(house.engine, request)


def _growth(levels: Sequence[_Level], weight_bytes: int) -> tuple[Figure, ...]:
    num_swaps = len(levels) - 1
    first, largest = levels[0].active, max(level.active for level in levels)
    active = Figure(
        f"MLX's active memory without a model, over {num_swaps} swaps: largest growth, of a "
        "model's weights (%)",
        100.0 * (largest - first) / weight_bytes,
        MAX_GROWTH_PERCENT,
        unit="%",
        facts={
            "first_bytes": first,
            "largest_bytes": largest,
            "last_bytes": levels[-1].active,
            "weights_mb": weight_bytes / 1e6,
        },
    )
    resident = [level.resident for level in levels if level.resident is not None]
    return (active, _resident_growth(resident)) if resident else (active,)


def _resident_growth(sizes_bytes: Sequence[int]) -> Figure:
    first, last = sizes_bytes[0], sizes_bytes[-1]
    return Figure(
        f"resident memory without a model, over {len(sizes_bytes) - 1} swaps: growth (%)",
        100.0 * (last - first) / first,
        MAX_GROWTH_PERCENT,
        unit="%",
        facts={
            "first_mb": first / 1e6,
            "half_way_mb": sizes_bytes[len(sizes_bytes) // 2] / 1e6,
            "last_mb": last / 1e6,
            "largest_mb": max(sizes_bytes) / 1e6,
        },
    )


def _resident_bytes() -> int | None:
    """Return the process's resident memory; None where the system does not tell it: only Linux
    does.
    """
    if not _STATUS.exists():
        return None
    lines = _STATUS.read_text("ascii").splitlines()
    (kilobytes,) = (line.split()[1] for line in lines if line.startswith("VmRSS:"))
    return int(kilobytes) * 1024


# -- clients on both -------------------------------------------------------------------------------


async def _load(house: House, plan: SwapPlan) -> Report:
    load = LoadPlan(
        seconds=plan.load_s,
        num_clients=plan.num_clients,
        num_turns=plan.num_turns,
        reply_tokens=plan.reply_tokens,
        compares_replies=not why_not_promised(),
    )
    figure, problems = await load_figure(house.engine, list(house.sources), load)
    return Report((figure,), problems)
