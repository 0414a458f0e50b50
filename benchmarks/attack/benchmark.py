"""What attackers, crowds and crashes can do to a server: every campaign, one after the other."""

from dataclasses import dataclass, field, replace
from functools import partial

from benchmarks.attack import hangups, kills, sizes
from benchmarks.attack.hangups import HangUpPlan
from benchmarks.attack.kills import KillPlan
from benchmarks.attack.sizes import MEBIBYTE, SizesPlan
from keepwarm.bench.progress import OnProgress, no_progress
from keepwarm.bench.report import Report


@dataclass(frozen=True, slots=True, kw_only=True)
class AttackPlan:
    """The plan of each campaign; `seed` decides both that are random.

    Requests that are too large run against the model, the rest against the fake generator.
    """

    sizes: SizesPlan = field(default_factory=SizesPlan)
    hang_ups: HangUpPlan = field(default_factory=HangUpPlan)
    kills: KillPlan = field(default_factory=KillPlan)
    seed: int = 0


QUICK = partial(
    AttackPlan,
    sizes=SizesPlan(
        steady_s=3.0, num_times=1, header_bytes=8 * MEBIBYTE, sent_of_claim_bytes=8 * MEBIBYTE
    ),
    hang_ups=HangUpPlan(sizes=(50,), num_rounds=2),
    kills=KillPlan(num_kills=5),
)
"""Small sizes, to see that it works."""


def run_attack(model: str, plan: AttackPlan, on_progress: OnProgress = no_progress) -> Report:
    results = (
        sizes.run(model, plan.sizes, on_progress),
        hangups.run(plan=replace(plan.hang_ups, seed=plan.seed), on_progress=on_progress),
        kills.run(replace(plan.kills, seed=plan.seed), on_progress),
    )
    return Report(
        tuple(figure for result in results for figure in result.figures),
        tuple(note for result in results for note in result.notes),
    )
