"""How long a resting agent with a long context takes to its next first token."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import mlx.core as mx
from mlx import nn
from mlx_lm.generate import generate_step, generation_stream
from mlx_lm.models.cache import KVCache, trim_prompt_cache

from keepwarm.bench.context import prefilled
from keepwarm.bench.lab import Lab
from keepwarm.bench.progress import OnProgress, no_progress
from keepwarm.bench.prompts import prompt_ids
from keepwarm.bench.report import Figure, Report
from keepwarm.bench.timing import median, timed
from keepwarm.core.ports import LoadedModel

NEW_TOKENS = 16
MAX_RATIO_TO_BARE = 1.1
ALLOWANCE_S = 0.005
MIN_SPEED_UP = 100.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumePlan:
    """Hot, bare mlx-lm and warm take turns, `num_repeats` times."""

    num_tokens: int = 6000
    num_repeats: int = 7
    seed: int = 0


QUICK = partial(ResumePlan, num_tokens=400, num_repeats=3)
"""Small sizes, to see that it works."""


@dataclass(frozen=True, slots=True)
class _Times:
    cold_s: float
    hot_s: float
    bare_s: float
    warm_s: float


def run_resume(
    loaded: LoadedModel, plan: ResumePlan, on_progress: OnProgress = no_progress
) -> Report:
    times = _measure(loaded, plan, on_progress)
    facts = {
        "hot_ms": 1e3 * times.hot_s,
        "bare_ms": 1e3 * times.bare_s,
        "warm_ms": 1e3 * times.warm_s,
        "cold_ms": 1e3 * times.cold_s,
    }
    where = f"{plan.num_tokens:,} tokens, {NEW_TOKENS} new"
    return Report(
        (
            Figure(
                f"TTFT hot over bare mlx-lm's on a ready cache plus 5 ms ({where})",
                times.hot_s / (MAX_RATIO_TO_BARE * times.bare_s + ALLOWANCE_S) * MAX_RATIO_TO_BARE,
                MAX_RATIO_TO_BARE,
                facts=facts,
            ),
            Figure(
                f"TTFT cold over hot ({where})",
                times.cold_s / times.hot_s,
                MIN_SPEED_UP,
                at_least=True,
                facts=facts,
            ),
            Figure(
                f"TTFT cold over warm ({where})", times.cold_s / times.warm_s, 1.0, at_least=True
            ),
        )
    )


def _measure(loaded: LoadedModel, plan: ResumePlan, on_progress: OnProgress) -> _Times:
    on_progress(f"cold prefill of {plan.num_tokens:,} tokens", 0, plan.num_repeats + 1)
    lab = Lab(loaded, checked=False)
    prompt = prompt_ids(loaded.tokenizer, plan.num_tokens, seed=plan.seed)
    first, context = prefilled(lab, "ada", prompt)
    said = lab.completed(first).token_ids
    new = prompt_ids(loaded.tokenizer, NEW_TOKENS, seed=plan.seed + 1)
    ids = (*prompt, *said, *new)
    bare = _Bare(
        cast("nn.Module", loaded.bare()),
        context.bare_cache(cast("nn.Module", loaded.bare()), plan.num_tokens),
        (*said, *new),
    )
    bare.time_first_token()
    hot: list[float] = []
    bare_s: list[float] = []
    warm: list[float] = []
    for repeat in range(plan.num_repeats):
        on_progress(f"repeat {repeat + 1}", repeat + 1, plan.num_repeats + 1)
        hot.append(_first_token_s(lab, ids))
        bare_s.append(bare.time_first_token())
        lab.engine.demote("ada")
        warm.append(_first_token_s(lab, ids))
    cold_s = lab.completed(first).timing.first_token_s or 0.0
    return _Times(cold_s, median(hot), median(bare_s), median(warm))


def _first_token_s(lab: Lab, ids: Sequence[int]) -> float:
    """Return the seconds from submit to the first token; the agent is then rolled back."""
    turn = lab.start("ada", ids, 1)
    lab.finish(turn)
    lab.engine.rollback("ada", turn=1)
    return lab.completed(turn).timing.first_token_s or 0.0


class _Bare:
    """mlx-lm with a cache that is ready: nothing is copied or allocated in the timed call."""

    def __init__(self, model: nn.Module, cache: list[KVCache], ids: Sequence[int]) -> None:
        self._model = model
        self._cache = cache
        self._ids = mx.array(list(ids))
        self._num_tokens = cache[0].offset

    def time_first_token(self) -> float:
        seconds = timed(self._first_token)
        mx.synchronize(generation_stream)
        trim_prompt_cache(self._cache, self._cache[0].offset - self._num_tokens)
        return seconds

    def _first_token(self) -> None:
        steps = generate_step(self._ids, self._model, max_tokens=1, prompt_cache=self._cache)
        next(steps)
        steps.close()
