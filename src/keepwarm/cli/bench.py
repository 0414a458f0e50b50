"""`keepwarm bench`: the experiments and two benchmarks, with a verdict on each."""

from typing import TYPE_CHECKING

from keepwarm.cli.benchmark import Benchmark, Order, command_line

if TYPE_CHECKING:
    from keepwarm.bench.report import Result


def _output(order: Order) -> "Result":
    from keepwarm.bench.exp005 import run_exp005
    from keepwarm.bench.plan import full_plan, quick_plan

    return run_exp005(order.load(), order.plan(full_plan, quick_plan), order.tell)


def _reconstruct(order: Order) -> "Result":
    from keepwarm.bench.exp006 import FULL_SIZES, QUICK_SIZES, run_exp006

    return run_exp006(QUICK_SIZES if order.quick else FULL_SIZES, order.tell)


def _resume(order: Order) -> "Result":
    from keepwarm.bench.resume import QUICK, ResumePlan, run_resume

    return run_resume(order.load(), order.plan(ResumePlan, QUICK), order.tell)


def _batch(order: Order) -> "Result":
    from keepwarm.bench.batch import QUICK, BatchPlan, run_batch

    return run_batch(order.load(), order.plan(BatchPlan, QUICK), order.tell)


BENCHMARKS = (
    Benchmark(
        name="output",
        title="EXP-005: the same computation",
        question="EXP-005: does every path compute the same?",
        aims="logits and KV within bounds of bare mlx-lm's, equal bits in deterministic mode",
        run=_output,
    ),
    Benchmark(
        name="reconstruct",
        title="EXP-006: reconstruction (milliseconds)",
        question="EXP-006: how fast is an agent's KV where the next token needs it?",
        aims="at 32 blocks x 48 layers, hot within 5 ms (p95), gathered within 1.3 plain copies",
        run=_reconstruct,
        needs_model=False,
    ),
    Benchmark(
        name="resume",
        title="Resuming an agent",
        question="How soon does a resting agent say its first token?",
        aims="hot within 1.1 times bare mlx-lm plus 5 ms, and 100 times sooner than cold",
        run=_resume,
    ),
    Benchmark(
        name="batch",
        title="Agents beside agents",
        question="What do agents cost each other?",
        aims="steps as fast as mlx-lm's or faster, no long step when others join or prefill",
        run=_batch,
    ),
)

bench = command_line("bench", "Whether resumed agents compute the same, and how fast.", BENCHMARKS)
