"""EXP-005: however the KV came about, the computation is the same.

Normal form: the reference's tokens are fed through each path, and logits and KV must stay within
bounds of bare mlx-lm's. Free-running: the reply is the same up to the first tie. Strict form: every
path gives the bits of the engine's own cold run; where MLX computes, in canonical shapes. The
canaries are damages that the same comparisons must notice.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import cast

from mlx import nn

from keepwarm.bench.canaries import CANARIES, ONE_ULP, Canary
from keepwarm.bench.compare import (
    FLOAT32_BOUNDS,
    Bounds,
    Difference,
    bounds_from,
    bounds_of_rounding,
    difference,
    why_not_identical,
)
from keepwarm.bench.exp005_result import Exp005Result, Form, PathResult
from keepwarm.bench.lab import Case, Setting
from keepwarm.bench.paths import PATHS, Path, cold
from keepwarm.bench.plan import Plan
from keepwarm.bench.progress import OnProgress, no_progress
from keepwarm.bench.prompts import prompt_ids
from keepwarm.bench.recording import Recording
from keepwarm.bench.reference import PREFILL_TOKENS, run_reference
from keepwarm.bench.requiring import PathNotTaken
from keepwarm.bench.round_trip import round_trip_problem
from keepwarm.core.ports import LoadedModel
from keepwarm.mlx_backend.compute.canonical import why_not_promised

_UNNOTICED = "the damage was not noticed"


def run_exp005(
    loaded: LoadedModel, plan: Plan, on_progress: OnProgress = no_progress
) -> Exp005Result:
    """Take every path of the plan and compare its replies. Reports the progress in jobs."""
    on_progress("bare mlx-lm", 0, 1)
    note = "" if loaded.is_reproducible else why_not_promised()
    experiment = Experiment(loaded, plan, has_strict=not note)
    jobs = list(experiment.jobs())
    results: list[PathResult] = []
    for number, job in enumerate(jobs):
        on_progress(job.label, number, len(jobs))
        results += job.run()
    on_progress("done", len(jobs), len(jobs))
    return Exp005Result(experiment.bounds, tuple(results), note)


@dataclass(frozen=True, slots=True)
class Job:
    """A part of the experiment, for the progress bar."""

    label: str
    run: Callable[[], list[PathResult]]


class Experiment:
    """Owns the references and the cold runs; each is computed once for each prompt length.

    Where a model's bits never depend on the path, the runs of the normal form are those of the
    strict form as well.
    """

    def __init__(self, loaded: LoadedModel, plan: Plan, *, has_strict: bool) -> None:
        self._loaded = loaded
        self._plan = plan
        self._has_strict = has_strict
        self._normal = Setting(loaded, deterministic=False, seed=plan.seed)
        self._strict = Setting(loaded, deterministic=True, seed=plan.seed)
        self._reference = cache(self._make_reference)
        self._cold_bits = cache(self._make_cold_bits)
        self._ordinary_cold = cache(self._make_ordinary_cold)
        self._ordinary_bits_differ = False
        self.bounds = self._find_bounds()

    def jobs(self) -> Iterator[Job]:
        for path in PATHS:
            for number, group in enumerate(self._plan.groups(path)):
                where = f"{path.name}, {', '.join(map(str, dict.fromkeys(group)))} tokens"
                run = self._run_normal if number else self._run_free
                yield Job(f"normal: {where}", partial(run, path, group))
                if self._has_strict and not self._loaded.is_reproducible:
                    yield Job(f"strict: {where}", partial(self._run_strict, path, group))
        for length in self._plan.all_lengths:
            yield Job(f"round trip, {length} tokens", partial(self._run_round_trip, length))
        yield from self._canaries()

    def _canaries(self) -> Iterator[Job]:
        for canary in CANARIES:
            yield Job(f"canary: {canary.name}", partial(self._run_canary, canary))
        if self._loaded.is_reproducible:
            for canary in (*CANARIES, ONE_ULP):
                run = partial(self._run_strict_canary, canary)
                yield Job(f"strict canary: {canary.name}", run)
        elif self._has_strict:
            yield Job("canary: ordinary shapes", self._ordinary_shapes)

    # -- forms -----------------------------------------------------------------------------------

    def _run_normal(self, path: Path, lengths: Sequence[int]) -> list[PathResult]:
        recordings = _take(path, self._normal, [self._forced(length) for length in lengths])
        if isinstance(recordings, PathNotTaken):
            return [_not_taken(Form.NORMAL, path, lengths, recordings)]
        results: list[PathResult] = []
        for length, recording in zip(lengths, recordings, strict=True):
            results.append(self._compared(Form.NORMAL, path.name, length, recording))
            results += self._same_bits(path, length, recording)
        return results

    def _run_free(self, path: Path, lengths: Sequence[int]) -> list[PathResult]:
        """Compare the path's own replies.

        A reply that is the reference's to its end also counts as one that was fed: it has the same
        ids and the same steps.
        """
        recordings = _take(path, self._normal, [self._free(length) for length in lengths])
        if isinstance(recordings, PathNotTaken):
            return [_not_taken(Form.FREE, path, lengths, recordings)]
        free = [
            self._compared(Form.FREE, path.name, length, recording)
            for length, recording in zip(lengths, recordings, strict=True)
        ]
        if any(
            recording.tokens != self._reference(length).tokens
            for length, recording in zip(lengths, recordings, strict=True)
        ):
            return free + self._run_normal(path, lengths)
        strict = [
            result
            for length, recording in zip(lengths, recordings, strict=True)
            for result in self._same_bits(path, length, recording)
        ]
        return free + [replace(result, form=Form.NORMAL) for result in free] + strict

    def _run_strict(self, path: Path, lengths: Sequence[int]) -> list[PathResult]:
        recordings = _take(path, self._strict, [self._free(length) for length in lengths])
        if isinstance(recordings, PathNotTaken):
            return [_not_taken(Form.STRICT, path, lengths, recordings)]
        return [
            _strictly(path, length, self._cold_bits(length), recording)
            for length, recording in zip(lengths, recordings, strict=True)
        ]

    def _same_bits(self, path: Path, length: int, recording: Recording) -> list[PathResult]:
        """Compare a run in ordinary shapes with the cold one: the strict form where bits never
        depend on the path, otherwise a note for the canary.
        """
        if self._loaded.is_reproducible:
            return [_strictly(path, length, self._ordinary_cold(length), recording)]
        if self._has_strict and not self._ordinary_bits_differ:
            problem = why_not_identical(self._ordinary_cold(length), recording)
            self._ordinary_bits_differ = problem is not None
        return []

    def _run_round_trip(self, length: int) -> list[PathResult]:
        problem = round_trip_problem(self._normal, self._reference(length).kv)
        return [PathResult(Form.ROUND_TRIP, "extract and reconstruct", length, problem)]

    def _run_canary(self, canary: Canary) -> list[PathResult]:
        length = self._plan.canary_length
        recording = canary.run(self._normal, self._forced(length))
        result = self._compared(Form.CANARY, canary.name, length, recording)
        problem = None if result.problem else _UNNOTICED
        return [replace(result, problem=problem)]

    def _run_strict_canary(self, canary: Canary) -> list[PathResult]:
        length = self._plan.canary_length
        recording = canary.run(self._normal, self._forced(length))
        found = why_not_identical(self._ordinary_cold(length), recording)
        problem = None if found else _UNNOTICED
        return [PathResult(Form.STRICT_CANARY, canary.name, length, problem)]

    def _ordinary_shapes(self) -> list[PathResult]:
        """Check that some path had other bits than the cold run in ordinary shapes: or the strict
        form would not notice the difference.
        """
        problem = None if self._ordinary_bits_differ else "ordinary shapes passed the strict form"
        return [
            PathResult(Form.STRICT_CANARY, "ordinary shapes", self._plan.canary_length, problem)
        ]

    # -- comparing -------------------------------------------------------------------------------

    def _compared(self, form: Form, path: str, length: int, recording: Recording) -> PathResult:
        found = self._difference(length, recording)
        within = found.is_within(self.bounds)
        return PathResult(
            form,
            path,
            length,
            problem=None if within else f"beyond the bounds; {found.num_flips} tokens flipped",
            num_steps=found.num_steps,
            max_logits=found.max_logits,
            max_kv=found.max_kv,
            num_ties=found.num_ties,
        )

    def _difference(self, length: int, recording: Recording) -> Difference:
        return difference(
            self._reference(length),
            recording,
            dtype=self._loaded.layout.dtype,
            bounds=self.bounds,
            forbidden=self._loaded.tokenizer.eos_token_ids,
        )

    def _find_bounds(self) -> Bounds:
        if self._loaded.layout.dtype == "float32":
            return FLOAT32_BOUNDS
        length = max(self._plan.all_lengths)
        if self._loaded.is_reproducible:
            return bounds_of_rounding(self._reference(length), self._run_exact(length))
        chunked = [self._run_bare(length, prefill_tokens) for prefill_tokens in (512, 256)]
        return bounds_from([self._reference(length), *chunked], self._loaded.layout.dtype)

    # -- runs to compare with --------------------------------------------------------------------

    def _make_reference(self, length: int) -> Recording:
        return self._run_bare(length, PREFILL_TOKENS)

    def _run_bare(self, length: int, prefill_tokens: int) -> Recording:
        is_first = prefill_tokens == PREFILL_TOKENS
        return run_reference(
            cast("nn.Module", self._loaded.bare()),
            self._prompt(length),
            self._plan.num_tokens(length),
            kv_dtype=self._loaded.layout.dtype,
            forbidden=self._loaded.tokenizer.eos_token_ids,
            script=None if is_first else self._reference(length).tokens,
            prefill_tokens=prefill_tokens,
        )

    def _run_exact(self, length: int) -> Recording:
        """Run bare mlx-lm over the reference's tokens without rounding its KV."""
        return run_reference(
            cast("nn.Module", self._loaded.bare()),
            self._prompt(length),
            self._plan.num_tokens(length),
            script=self._reference(length).tokens,
        )

    def _make_cold_bits(self, length: int) -> Recording:
        return cold(self._strict, self._free(length))

    def _make_ordinary_cold(self, length: int) -> Recording:
        return cold(self._normal, self._forced(length))

    def _forced(self, length: int) -> Case:
        return replace(self._free(length), script=self._reference(length).tokens)

    def _free(self, length: int) -> Case:
        return Case(self._prompt(length), self._plan.num_tokens(length))

    def _prompt(self, length: int) -> tuple[int, ...]:
        return prompt_ids(self._loaded.tokenizer, length, seed=self._plan.seed)


def _take(
    path: Path, setting: Setting, cases: Sequence[Case]
) -> Sequence[Recording] | PathNotTaken:
    try:
        return path.run(setting, cases)
    except PathNotTaken as error:
        return error


def _strictly(path: Path, length: int, expected: Recording, recording: Recording) -> PathResult:
    problem = why_not_identical(expected, recording)
    return PathResult(Form.STRICT, path.name, length, problem, len(recording.tokens))


def _not_taken(form: Form, path: Path, lengths: Sequence[int], error: PathNotTaken) -> PathResult:
    return PathResult(form, path.name, lengths[0], f"the path was not taken: {error}")
