"""What `keepwarm doctor --selftest` runs: short EXP-005 and EXP-006 on this very device."""

from dataclasses import dataclass

from keepwarm.bench.exp005 import Exp005Result, run_exp005
from keepwarm.bench.exp006 import QUICK_SIZES, Exp006Result, run_exp006
from keepwarm.bench.plan import quick_plan
from keepwarm.bench.report import OnProgress, no_progress
from keepwarm.core.ports import LoadedModel


@dataclass(frozen=True, slots=True)
class SelftestResult:
    same_computation: Exp005Result
    reconstruction: Exp006Result

    @property
    def passed(self) -> bool:
        """EXP-006's times are shown; only its bits can fail here, as other work disturbs times."""
        shapes = self.reconstruction.results
        kept = all(shape.same_bits and not shape.slab_moved for shape in shapes)
        return self.same_computation.passed and kept


def run_selftest(loaded: LoadedModel, on_progress: OnProgress = no_progress) -> SelftestResult:
    same = run_exp005(loaded, quick_plan(), on_progress)
    speed = run_exp006(QUICK_SIZES, on_progress)
    return SelftestResult(same, speed)
