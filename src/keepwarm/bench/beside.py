"""What a step costs the agents that decode when another one joins or prefills beside them."""

from collections.abc import Sequence

import numpy as np

from keepwarm.bench.decode import run_steps, start_rows, stop_rows
from keepwarm.bench.lab import Lab
from keepwarm.bench.prompts import prompt_ids
from keepwarm.bench.report import Figure
from keepwarm.bench.timing import median, timed
from keepwarm.core.ports import LoadedModel

NUM_COMPANIONS = 4
COMPANION_TOKENS = 200
STEADY_STEPS = 10
MAX_JOIN_RATIO = 1.15
MAX_STEP_RATIO = 4.0


def join(
    loaded: LoadedModel, lab: Lab, parked: Sequence[int], *, num_repeats: int, seed: int
) -> Figure:
    """Measure the step in which the agent "ada" joins, over the steps that follow.

    The agent holds all of `parked` but its last token, hot and at rest.
    """
    companions = start_rows(lab, _companions(loaded, seed))
    joining: list[float] = []
    steady: list[float] = []
    for _ in range(num_repeats + 1):
        turn = lab.start("ada", parked, STEADY_STEPS + 2)
        joining.append(timed(lab.step))
        steady.append(median([timed(lab.step) for _ in range(STEADY_STEPS)]))
        lab.finish(turn)
        lab.engine.rollback("ada", turn=1)
        run_steps(lab, 2)
    stop_rows(lab, companions)
    joining_s, steady_s = median(joining[1:]), median(steady[1:])
    return Figure(
        f"a parked agent of {len(parked):,} tokens joins {NUM_COMPANIONS}: its step over the next",
        joining_s / steady_s,
        MAX_JOIN_RATIO,
        facts={"joining_ms": 1e3 * joining_s, "steady_ms": 1e3 * steady_s},
    )


def prefill(loaded: LoadedModel, lab: Lab, *, num_tokens: int, seed: int) -> Figure:
    """Measure the longest step while a new agent's prompt is computed, over the steady one.

    The companions' contexts grow meanwhile, and their steady step with them: it is measured before
    and after, and taken to grow evenly in between.
    """
    companions = start_rows(lab, _companions(loaded, seed))
    run_steps(lab, 2)
    before = median([timed(lab.step) for _ in range(STEADY_STEPS)])
    turn = lab.start("eve", prompt_ids(loaded.tokenizer, num_tokens, seed=seed + 50), 1)
    beside: list[float] = []
    while not lab.has_finished(turn):
        beside.append(timed(lab.step))
    after = median([timed(lab.step) for _ in range(STEADY_STEPS)])
    stop_rows(lab, companions)
    lab.engine.delete("eve")
    ratios = np.array(beside) / np.linspace(before, after, len(beside))
    return Figure(
        f"a prefill of {num_tokens:,} tokens beside {NUM_COMPANIONS}: longest step over steady",
        float(max(ratios)),
        MAX_STEP_RATIO,
        facts={
            "p99_ratio": float(np.percentile(ratios, 99)),
            "median_ratio": float(np.median(ratios)),
            "longest_ms": 1e3 * max(beside),
            "steady_before_ms": 1e3 * before,
            "steady_after_ms": 1e3 * after,
            "steps": len(beside),
            "total_s": sum(beside),
        },
    )


def _companions(loaded: LoadedModel, seed: int) -> list[tuple[int, ...]]:
    return [
        prompt_ids(loaded.tokenizer, COMPANION_TOKENS, seed=seed + 60 + number)
        for number in range(NUM_COMPANIONS)
    ]
