"""Agents beside agents, in speed and in bytes."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import count

from keepwarm.bench import beside, decode
from keepwarm.bench.context import prefilled
from keepwarm.bench.lab import Lab
from keepwarm.bench.progress import OnProgress, no_progress
from keepwarm.bench.prompts import prompt_ids
from keepwarm.bench.report import Figure, Report
from keepwarm.core.pool import Kind
from keepwarm.core.ports import LoadedModel

MAX_SHARED_BYTES_RATIO = 1.05
NUM_SHARERS = 20
REMAINDER_TOKENS = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPlan:
    """How many tokens the contexts have, and how often each figure is repeated."""

    long_tokens: int = 6000
    mixed_tokens: tuple[int, ...] = (200, 743, 1286, 1829, 2371, 2914, 3457, 4000)
    short_tokens: int = 64
    shared_tokens: int = 2048
    num_repeats: int = 5
    num_rounds: int = 6
    reply_tokens: int = 48
    seed: int = 0


QUICK = partial(
    BatchPlan,
    long_tokens=600,
    mixed_tokens=(50, 100, 150, 200, 250, 300, 350, 400),
    shared_tokens=512,
    num_repeats=2,
    num_rounds=2,
    reply_tokens=16,
)
"""Small sizes, to see that it works."""


def run_batch(
    loaded: LoadedModel, plan: BatchPlan, on_progress: OnProgress = no_progress
) -> Report:
    """Measure what agents cost each other.

    The long context is prefilled once; other agents take their beginnings from its blocks.
    """
    numbers = count(0)
    total = 9

    def measure(label: str, run: Callable[[], Figure]) -> Figure:
        on_progress(label, next(numbers), total)
        return run()

    on_progress(f"prefill of {plan.long_tokens:,} tokens", next(numbers), total)
    lab = Lab(loaded, checked=False, budget_bytes=8 << 30)
    prompt = prompt_ids(loaded.tokenizer, plan.long_tokens, seed=plan.seed)
    first, context = prefilled(lab, "ada", prompt)
    parked = (*prompt, *lab.completed(first).token_ids)
    repeated = {"num_repeats": plan.num_repeats, "seed": plan.seed}
    in_rounds = partial(decode.eight_agents, loaded, lab, context, num_rounds=plan.num_rounds)
    in_mode = partial(decode.deterministic, loaded, num_rounds=plan.num_rounds, seed=plan.seed)
    equal = (plan.short_tokens,) * 8
    figures = (
        measure("a parked agent joins", partial(beside.join, loaded, lab, parked, **repeated)),
        measure("8 agents, mixed", partial(in_rounds, plan.mixed_tokens, at_least=1.4)),
        measure("8 agents, short", partial(in_rounds, equal, at_least=0.95)),
        measure(
            "1 agent",
            partial(decode.one_agent, loaded, num_tokens=plan.reply_tokens, **repeated),
        ),
        measure("deterministic, 1 row", partial(in_mode, num_rows=1)),
        measure("deterministic, 4 rows", partial(in_mode, num_rows=4)),
        measure(
            "prefill beside decode",
            partial(beside.prefill, loaded, lab, num_tokens=plan.long_tokens, seed=plan.seed),
        ),
        measure("20 agents share a prefix", partial(shared_bytes, loaded, plan)),
    )
    on_progress("done", total, total)
    return Report(figures)


def shared_bytes(loaded: LoadedModel, plan: BatchPlan) -> Figure:
    """Measure what demoted agents that begin alike hold, over the bytes that they need."""
    lab = Lab(loaded, budget_bytes=2 << 30)
    prefix = prompt_ids(loaded.tokenizer, plan.shared_tokens, seed=plan.seed + 70)
    for number in range(NUM_SHARERS):
        rest = prompt_ids(loaded.tokenizer, REMAINDER_TOKENS, seed=plan.seed + 71 + number)
        lab.finish(lab.start(f"agent-{number}", (*prefix, *rest), 1))
        lab.engine.demote(f"agent-{number}")
    pool = lab.engine.snapshot().pool.bytes_by_kind
    held = pool.get(Kind.BLOCK.value, 0) + pool.get(Kind.TAIL.value, 0)
    num_rest = sum(view.held_tokens - len(prefix) for view in lab.engine.agents())
    needed = (len(prefix) + num_rest) * loaded.layout.token_bytes
    return Figure(
        f"{NUM_SHARERS} agents that share {plan.shared_tokens:,} tokens, warm: bytes over needed",
        held / needed,
        MAX_SHARED_BYTES_RATIO,
        facts={"held_mb": held / 1e6, "needed_mb": needed / 1e6},
    )
