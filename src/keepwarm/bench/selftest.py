"""What `keepwarm doctor --selftest` runs: short EXP-005 and EXP-006 on the user's own device."""

from dataclasses import dataclass

from keepwarm.bench.exp005 import run_exp005
from keepwarm.bench.exp005_result import Exp005Result, Form
from keepwarm.bench.exp006 import QUICK_SIZES, Exp006Result, Sizes, run_exp006
from keepwarm.bench.plan import Plan, quick_plan
from keepwarm.bench.progress import OnProgress, no_progress
from keepwarm.core.ports import LoadedModel


@dataclass(frozen=True, slots=True)
class SelftestResult:
    """Both experiments' results. Times are shown and never fail: other programs disturb them."""

    computation: Exp005Result
    reconstruction: Exp006Result

    @property
    def computation_passed(self) -> bool:
        return self.computation.passed

    @property
    def computation_detail(self) -> str:
        failed = self.computation.notes
        if failed:
            return f"{len(failed)} of {len(self.computation.results)} failed: {failed[0]}"
        compared = [r for r in self.computation.results if r.form in (Form.NORMAL, Form.FREE)]
        bits = self.computation.strict_note or "every path bit-identical in deterministic mode"
        return (
            f"{self.computation.num_steps:,} steps beside bare mlx-lm, logits within "
            f"{max(r.max_logits for r in compared):.1e}, KV within "
            f"{max(r.max_kv for r in compared):.1e}, {self.computation.num_ties} ties; {bits}"
        )

    @property
    def reconstruction_passed(self) -> bool:
        shapes = self.reconstruction.results
        return all(shape.same_bits and not shape.slab_moved for shape in shapes)

    @property
    def reconstruction_detail(self) -> str:
        largest = self.reconstruction.results[-1]
        return (
            f"{largest.shape} blocks x layers ({largest.nbytes / 1e6:,.0f} MB): hot in "
            f"{1e3 * largest.hot.p50_s:.1f} ms, gathered in {1e3 * largest.gathered.p50_s:.0f} ms"
        )


def run_selftest(
    loaded: LoadedModel,
    on_progress: OnProgress = no_progress,
    *,
    plan: Plan | None = None,
    sizes: Sizes = QUICK_SIZES,
) -> SelftestResult:
    computation = run_exp005(loaded, plan or quick_plan(), on_progress)
    return SelftestResult(computation, run_exp006(sizes, on_progress))
