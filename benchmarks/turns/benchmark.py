"""How long agents wait for their turns over HTTP, and beside other servers on the same weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from benchmarks.server.process import server_of
from benchmarks.turns.rivals import LLAMA_PACKAGE, MLX_LM, installed_rivals, rival_server
from benchmarks.turns.workload import Timings, Workload, run_workload
from keepwarm.bench.progress import OnProgress, no_progress
from keepwarm.bench.report import Figure, Report
from keepwarm.bench.requiring import require
from keepwarm.mlx_backend.loading.embedded_model import EMBEDDED_NAME

MAX_SPREAD = 0.6
MAX_TOTAL_RATIO = 0.6
MAX_LATER_RATIO = 0.3
MAX_ROWS = 16
WARM_UP = Workload(num_agents=1, first_tokens=20, reply_tokens=4)
COLD = Workload(num_agents=8, first_tokens=1450)
TALK = Workload(num_agents=4, num_turns=3, first_tokens=850, new_tokens=80)


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnsPlan:
    """`cold`: prompts that come at once. `talk`: agents that take turns, on each server.

    Each side runs `num_repeats` times, always on a server that was just started.
    """

    cold: Workload = COLD
    talk: Workload = TALK
    num_repeats: int = 3
    seed: int = 0


QUICK = partial(
    TurnsPlan,
    cold=Workload(num_agents=4, first_tokens=300, reply_tokens=4),
    talk=Workload(num_agents=2, num_turns=2, first_tokens=200, new_tokens=20, reply_tokens=4),
    num_repeats=1,
)
"""Small sizes, to see that it works."""


def run_turns(model: str, plan: TurnsPlan, on_progress: OnProgress = no_progress) -> Report:
    """Measure Keepwarm's server on the model; on the embedded one others beside it as well."""
    rivals = installed_rivals() if model == EMBEDDED_NAME else ()
    num_parts = 1 + plan.num_repeats * (1 + len(rivals))
    on_progress("cold prompts at once", 0, num_parts)
    cold = _ours(model, plan.cold)
    ours: list[Timings] = []
    others: dict[str, list[Timings]] = {name: [] for name in rivals}
    for repeat in range(plan.num_repeats):
        done = 1 + repeat * (1 + len(rivals))
        on_progress("agents that take turns", done, num_parts)
        ours.append(_ours(model, plan.talk))
        for number, name in enumerate(rivals, 1):
            on_progress(f"the same on {name}'s server", done + number, num_parts)
            others[name].append(_theirs(name, plan.talk))
    ratios = [figure for name, theirs in others.items() for figure in _ratios(name, ours, theirs)]
    return Report((_spread(cold), _later_over_first(ours), *ratios), _notes(model, rivals))


def _ours(model: str, workload: Workload) -> Timings:
    with _home() as home, server_of(model, home, max_rows=MAX_ROWS) as port:
        return _measured(port, model, workload)


def _theirs(name: str, workload: Workload) -> Timings:
    slots = workload.num_agents
    with _home() as home, rival_server(name, home, num_slots=slots) as (port, model):
        return _measured(port, model, workload)


def _measured(port: int, model: str, workload: Workload) -> Timings:
    run_workload(port, model, WARM_UP)
    timings = run_workload(port, model, workload)
    require(timings.num_tokens >= workload.num_agents, "there were agents without a reply")
    return timings


def _spread(cold: Timings) -> Figure:
    return Figure(
        f"{len(cold.first_s)} cold prompts at once: median TTFT over the last one's",
        cold.spread,
        MAX_SPREAD,
        facts={"median_s": median(cold.first_s), "last_s": max(cold.first_s)},
    )


def _later_over_first(ours: list[Timings]) -> Figure:
    """Say what a warm turn waits for beside what the cold ones waited for."""
    first_s = median(median(timings.first_s) for timings in ours)
    later_s = median(median(timings.later_s) for timings in ours)
    return Figure(
        "later turns' median TTFT over the first turns'",
        later_s / first_s,
        MAX_LATER_RATIO,
        facts={"first_s": first_s, "later_s": later_s, "total_s": _total_s(ours)},
    )


def _ratios(name: str, ours: list[Timings], theirs: list[Timings]) -> tuple[Figure, Figure]:
    later_s, their_later_s = (median(median(t.later_s) for t in some) for some in (ours, theirs))
    total = Figure(
        f"all turns, in time over {name}'s server",
        _total_s(ours) / _total_s(theirs),
        MAX_TOTAL_RATIO,
        facts={"ours_s": _total_s(ours), "theirs_s": _total_s(theirs), **_tokens(ours, theirs)},
    )
    later = Figure(
        f"later turns' median TTFT over {name}'s server",
        later_s / their_later_s,
        MAX_LATER_RATIO,
        facts={"ours_s": later_s, "theirs_s": their_later_s},
    )
    return total, later


def _total_s(timings: list[Timings]) -> float:
    return median(one.total_s for one in timings)


def _tokens(ours: list[Timings], theirs: list[Timings]) -> dict[str, float]:
    """Return how many tokens the replies had: texts differ, and some end early."""
    return {
        "our_tokens": median(one.num_tokens for one in ours),
        "their_tokens": median(one.num_tokens for one in theirs),
    }


def _notes(model: str, rivals: tuple[str, ...]) -> tuple[str, ...]:
    if model != EMBEDDED_NAME:
        return (f"Other servers were not run: they are set up for {EMBEDDED_NAME}.",)
    if rivals == (MLX_LM,):
        return (f"llama.cpp's server was not run: the package {LLAMA_PACKAGE} is not installed.",)
    return ()


@contextmanager
def _home() -> Iterator[Path]:
    with TemporaryDirectory(prefix="keepwarm-bench-turns-") as name:
        yield Path(name)
