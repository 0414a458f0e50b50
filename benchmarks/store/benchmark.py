"""What the disk costs, in time and in bytes, and what it gives."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from benchmarks.store.beside import decode_beside_writes
from benchmarks.store.feed import WITHOUT_PAUSE
from benchmarks.store.home import home_figures
from benchmarks.store.restore import restore_figures
from benchmarks.store.write import bytes_written, commit_figure, most_on_disk
from keepwarm.bench.progress import OnProgress, no_progress
from keepwarm.bench.report import Figure, Report
from keepwarm.core.ports import LoadedModel

MB = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class StorePlan:
    """Sizes, and how often each figure is repeated.

    context_tokens: how long the agent is that is restored. chat_turns: how long the chat is whose
    bytes are counted. num_agents: how many the home has, with ten blocks each. bytes_per_s: how
    much is written beside what is timed.
    """

    context_tokens: int = 6000
    num_repeats: int = 9
    chat_turns: int = 50
    num_agents: int = 10_000
    num_look_ups: int = 2000
    bytes_per_s: float = 100 * MB
    num_rounds: int = 10
    steps_per_round: int = 24
    budget_bytes: int = 200 * MB
    load_bytes: int = 2000 * MB
    num_commits: int = 200
    seed: int = 0


QUICK = partial(
    StorePlan,
    context_tokens=400,
    num_repeats=3,
    chat_turns=10,
    num_agents=1000,
    num_look_ups=200,
    num_rounds=2,
    steps_per_round=8,
    budget_bytes=40 * MB,
    load_bytes=200 * MB,
    num_commits=20,
)
"""Small sizes, to see that it works."""


def run_store(
    loaded: LoadedModel, plan: StorePlan, on_progress: OnProgress = no_progress
) -> Report:
    parts = _parts(loaded, plan)
    figures: list[Figure] = []
    for number, (label, measure) in enumerate(parts.items()):
        on_progress(label, number, len(parts))
        figures += measure()
    on_progress("done", len(parts), len(parts))
    return Report(tuple(figures))


def _parts(loaded: LoadedModel, plan: StorePlan) -> dict[str, Callable[[], Iterable[Figure]]]:
    """Return what is measured, by its label, in order."""
    writing = partial(bytes_written, loaded, num_turns=plan.chat_turns)
    committing = partial(commit_figure, loaded, num_turns=plan.num_commits)
    return {
        "an agent comes back": partial(
            restore_figures,
            loaded,
            num_tokens=plan.context_tokens,
            num_repeats=plan.num_repeats,
            seed=plan.seed,
        ),
        "bytes of a chat": lambda: [writing(demoting=False), writing(demoting=True)],
        "a home of many agents": partial(
            home_figures,
            num_agents=plan.num_agents,
            num_look_ups=plan.num_look_ups,
            seed=plan.seed,
        ),
        "decode beside writes": lambda: [
            decode_beside_writes(
                loaded,
                bytes_per_s=plan.bytes_per_s,
                num_rounds=plan.num_rounds,
                num_steps=plan.steps_per_round,
                seed=plan.seed,
            )
        ],
        "the budget": lambda: [
            most_on_disk(
                loaded,
                budget_bytes=plan.budget_bytes,
                load_bytes=plan.load_bytes,
                seed=plan.seed,
            )
        ],
        "commits": lambda: [
            committing(),
            committing(
                beside=f", while {plan.bytes_per_s / 1e6:,.0f} MB/s are written",
                bytes_per_s=plan.bytes_per_s,
            ),
            committing(
                beside=", while records are written without a pause", bytes_per_s=WITHOUT_PAUSE
            ),
        ],
    }
