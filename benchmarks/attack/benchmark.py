"""What attackers, crowds and crashes can do to a server: every campaign, one after the other."""

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.attack import hangups, kills, sizes
from benchmarks.attack.hangups import HangUpPlan
from benchmarks.attack.kills import KillPlan
from benchmarks.attack.sizes import MEBIBYTE, SizesPlan
from keepwarm.bench.figures import FiguresResult
from keepwarm.bench.report import OnProgress, no_progress


@dataclass(frozen=True, slots=True, kw_only=True)
class AttackPlan:
    """Requests that are too large run against the model; the rest against the fake generator."""

    sizes: SizesPlan
    hang_ups: HangUpPlan
    kills: KillPlan


def attack_plan(*, quick: bool = False, seed: int = 0) -> AttackPlan:
    if not quick:
        return AttackPlan(
            sizes=SizesPlan(), hang_ups=HangUpPlan(seed=seed), kills=KillPlan(seed=seed)
        )
    return AttackPlan(
        sizes=SizesPlan(
            steady_s=3.0,
            num_times=1,
            header_bytes=8 * MEBIBYTE,
            sent_of_claim_bytes=8 * MEBIBYTE,
        ),
        hang_ups=HangUpPlan(sizes=(50,), num_rounds=2, seed=seed),
        kills=KillPlan(num_kills=5, seed=seed),
    )


def run_attack(
    model: str, plan: AttackPlan, on_progress: OnProgress = no_progress
) -> FiguresResult:
    campaigns: tuple[Callable[[], FiguresResult], ...] = (
        lambda: sizes.run(model, plan.sizes, on_progress),
        lambda: hangups.run(plan=plan.hang_ups, on_progress=on_progress),
        lambda: kills.run(plan.kills, on_progress),
    )
    results = [campaign() for campaign in campaigns]
    return FiguresResult(
        tuple(figure for result in results for figure in result.figures),
        tuple(note for result in results for note in result.notes),
    )
