"""What decode steps cost while the store writes."""

import time

from benchmarks.store.chat import temporary_home
from benchmarks.store.feed import FedStore
from keepwarm.bench.decode import run_steps, start_rows, stop_rows
from keepwarm.bench.lab import Lab
from keepwarm.bench.prompts import prompt_ids
from keepwarm.bench.report import Figure
from keepwarm.bench.timing import median
from keepwarm.core.ports import LoadedModel

NUM_ROWS = 4
PROMPT_TOKENS = 64
WARM_UP_STEPS = 4
MAX_STEP_RATIO = 1.10


def decode_beside_writes(
    loaded: LoadedModel, *, bytes_per_s: float, num_rounds: int, num_steps: int, seed: int
) -> Figure:
    """Compare steps with and without writing, in turns. A step includes handing over what is
    written.
    """
    prompts = [
        prompt_ids(loaded.tokenizer, PROMPT_TOKENS, seed=seed + row) for row in range(NUM_ROWS)
    ]
    with temporary_home() as home, FedStore(home, loaded.layout) as store:
        lab = Lab(loaded, checked=False, store=store)
        turns = start_rows(lab, prompts)
        run_steps(lab, WARM_UP_STEPS)
        quiet: list[float] = []
        writing: list[float] = []
        for _ in range(num_rounds):
            quiet += [_step_s(lab, store) for _ in range(num_steps)]
            with store.fed(bytes_per_s):
                writing += [_step_s(lab, store) for _ in range(num_steps)]
            store.drain()
            run_steps(lab, WARM_UP_STEPS)
        stop_rows(lab, turns)
    return Figure(
        f"decode step of {NUM_ROWS} agents while {bytes_per_s / 1e6:,.0f} MB/s are written,"
        " over without",
        median(writing) / median(quiet),
        MAX_STEP_RATIO,
        facts={
            "writing_ms": 1e3 * median(writing),
            "quiet_ms": 1e3 * median(quiet),
            "writing_mean_ms": 1e3 * sum(writing) / len(writing),
            "quiet_mean_ms": 1e3 * sum(quiet) / len(quiet),
            "written_mb_per_s": store.written_per_s / 1e6,
        },
    )


def _step_s(lab: Lab, store: FedStore) -> float:
    started = time.perf_counter()
    store.feed()
    lab.step()
    return time.perf_counter() - started
