"""Decoding speed beside bare mlx-lm's and beside the deterministic mode's, in turns."""

from collections.abc import Sequence
from typing import Any, cast

import mlx.core as mx
from mlx import nn
from mlx_lm.generate import BatchGenerator, generate_step, generation_stream

from keepwarm.bench.context import Context
from keepwarm.bench.lab import Lab, Turn
from keepwarm.bench.prompts import prompt_ids
from keepwarm.bench.report import Figure
from keepwarm.bench.timing import median, timed
from keepwarm.core.ports import LoadedModel

SHORT_TOKENS = 64
UNTIL_CANCELLED = 7_500
STEPS_PER_ROUND = 8
MAX_DETERMINISTIC_RATIO = 1.7


def one_agent(loaded: LoadedModel, *, num_repeats: int, num_tokens: int, seed: int) -> Figure:
    """Compare tokens per second after the first one.

    mlx-lm's side is the loop inside `stream_generate`.
    """
    prompt = prompt_ids(loaded.tokenizer, SHORT_TOKENS, seed=seed)
    model = cast("nn.Module", loaded.bare())
    lab = Lab(loaded, checked=False)
    ours: list[float] = []
    bare: list[float] = []
    for repeat in range(num_repeats + 1):
        ours.append(_decode_s(lab, f"agent-{repeat}", prompt, num_tokens))
        bare.append(_bare_decode_s(model, prompt, num_tokens))
    return _speed(
        f"decode, 1 agent of {SHORT_TOKENS} tokens, over bare mlx-lm",
        median(ours[1:]) / num_tokens,
        median(bare[1:]) / num_tokens,
        at_least=0.95,
    )


def eight_agents(
    loaded: LoadedModel,
    lab: Lab,
    context: Context,
    lengths: Sequence[int],
    *,
    num_rounds: int,
    at_least: float,
) -> Figure:
    """Compare the steps of eight rows whose prompts are beginnings of the context."""
    turns = start_rows(lab, [context.prompt[:length] for length in lengths])
    bare = _BareBatch(cast("nn.Module", loaded.bare()), context, lengths)
    ours_s: list[float] = []
    bare_s: list[float] = []
    for _ in range(num_rounds):
        ours_s.append(timed(lambda: run_steps(lab, STEPS_PER_ROUND)) / STEPS_PER_ROUND)
        bare_s.append(timed(lambda: bare.run_steps(STEPS_PER_ROUND)) / STEPS_PER_ROUND)
    bare.close()
    stop_rows(lab, turns)
    return _speed(
        f"decode, 8 agents of {lengths[0]:,} to {lengths[-1]:,} tokens, over BatchGenerator",
        median(ours_s),
        median(bare_s),
        at_least=at_least,
    )


def deterministic(loaded: LoadedModel, *, num_rows: int, num_rounds: int, seed: int) -> Figure:
    prompts = [
        prompt_ids(loaded.tokenizer, 4 * SHORT_TOKENS, seed=seed + row) for row in range(num_rows)
    ]
    labs = {
        mode: Lab(loaded, deterministic=mode, checked=False, budget_bytes=1 << 30)
        for mode in (False, True)
    }
    for lab in labs.values():
        start_rows(lab, prompts)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(num_rounds):
        for mode, lab in labs.items():
            seconds[mode].append(timed(lambda lab=lab: run_steps(lab, STEPS_PER_ROUND)))  # type: ignore[misc]
    normal_s, deterministic_s = median(seconds[False]), median(seconds[True])
    return Figure(
        f"deterministic decode step at {num_rows} rows, over normal",
        deterministic_s / normal_s,
        MAX_DETERMINISTIC_RATIO,
        facts={
            "normal_ms": 1e3 * normal_s / STEPS_PER_ROUND,
            "deterministic_ms": 1e3 * deterministic_s / STEPS_PER_ROUND,
        },
    )


def start_rows(lab: Lab, prompts: Sequence[Sequence[int]]) -> list[Turn]:
    """Start agents, all of which decode when this returns."""
    turns = [
        lab.start(f"row-{number}", prompt, UNTIL_CANCELLED) for number, prompt in enumerate(prompts)
    ]
    while not all(lab.num_draws(turn) for turn in turns):
        lab.step()
    return turns


def stop_rows(lab: Lab, turns: Sequence[Turn]) -> None:
    for number, turn in enumerate(turns):
        lab.engine.cancel(turn.request_id)
        lab.finish(turn)
        lab.engine.delete(f"row-{number}")


def run_steps(lab: Lab, num_steps: int) -> None:
    """Run `num_steps` steps and wait for them."""
    for _ in range(num_steps):
        lab.step()


def _decode_s(lab: Lab, agent_id: str, prompt: Sequence[int], num_tokens: int) -> float:
    """Return the seconds from the first token to the last of `num_tokens` more."""
    turn = lab.start(agent_id, prompt, num_tokens + 1)
    while not lab.num_draws(turn):
        lab.step()
    seconds = timed(lambda: lab.finish(turn))
    lab.engine.delete(agent_id)
    return seconds


def _bare_decode_s(model: nn.Module, prompt: Sequence[int], num_tokens: int) -> float:
    steps = generate_step(mx.array(list(prompt)), model, max_tokens=num_tokens + 1)
    next(steps)
    seconds = timed(lambda: [next(steps) for _ in range(num_tokens)])
    mx.synchronize(generation_stream)
    return seconds


class _BareBatch:
    """mlx-lm's BatchGenerator over ready caches of the same contexts."""

    def __init__(self, model: nn.Module, context: Context, lengths: Sequence[int]) -> None:
        self._generator: Any = BatchGenerator(model)
        self._generator.insert(
            [[context.prompt[length - 1]] for length in lengths],
            max_tokens=[UNTIL_CANCELLED] * len(lengths),
            caches=[context.bare_cache(model, length - 1) for length in lengths],
            all_tokens=[list(context.prompt[: length - 1]) for length in lengths],
        )
        while len(self._generator.next()[1]) < len(lengths):
            pass
        mx.synchronize(self._generator.stream)

    def run_steps(self, num_steps: int) -> None:
        """Run `num_steps` steps. It computes one ahead; waiting for that one makes it as many."""
        for _ in range(num_steps):
            self._generator.next()
        mx.synchronize(self._generator.stream)

    def close(self) -> None:
        self._generator.close()


def _speed(name: str, ours_s: float, bare_s: float, *, at_least: float) -> Figure:
    return Figure(
        name,
        bare_s / ours_s,
        at_least,
        at_least=True,
        facts={"ours_ms": 1e3 * ours_s, "bare_ms": 1e3 * bare_s},
    )
