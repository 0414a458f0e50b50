"""`keepwarm bench`: the experiments and two benchmarks, with a verdict on each."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from keepwarm.bench.report import OnProgress
    from keepwarm.core.ports import LoadedModel

T = TypeVar("T")

bench = typer.Typer(
    name="bench",
    help="Whether resumed agents compute the same, and how fast. Exit code 1: a figure failed.",
    no_args_is_help=True,
)

Quick = Annotated[bool, typer.Option("--quick", help="Small sizes, to see that it works.")]
JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write the results there as JSON.")
]
Model = Annotated[str, typer.Option(help="smollm2, a model's folder, or a hub id.")]
Seed = Annotated[int, typer.Option(help="Decides prompts and where they are cut.")]


@bench.command()
def output(
    model: Model = "smollm2", quick: Quick = False, seed: Seed = 0, json_file: JsonFile = None
) -> None:
    """EXP-005: every path computes what bare mlx-lm computes, and notices when it does not."""
    _finish({"output": _output(_load(model), quick=quick, seed=seed)}, json_file)


@bench.command()
def reconstruct(quick: Quick = False, json_file: JsonFile = None) -> None:
    """EXP-006: how long it takes to make an agent's KV current. Needs no model."""
    _finish({"reconstruct": _reconstruct(quick=quick)}, json_file)


@bench.command()
def resume(
    model: Model = "smollm2", quick: Quick = False, seed: Seed = 0, json_file: JsonFile = None
) -> None:
    """Time to the first token of a resting agent, beside bare mlx-lm and its own cold prefill."""
    _finish({"resume": _resume(_load(model), quick=quick, seed=seed)}, json_file)


@bench.command()
def batch(
    model: Model = "smollm2", quick: Quick = False, seed: Seed = 0, json_file: JsonFile = None
) -> None:
    """Agents beside agents: decoding, joining, prefill beside decode, shared bytes."""
    _finish({"batch": _batch(_load(model), quick=quick, seed=seed)}, json_file)


@bench.command(name="all")
def all_of_them(
    model: Model = "smollm2", quick: Quick = False, seed: Seed = 0, json_file: JsonFile = None
) -> None:
    """All of them, one after the other."""
    loaded = _load(model)
    reports = {
        "output": _output(loaded, quick=quick, seed=seed),
        "reconstruct": _reconstruct(quick=quick),
        "resume": _resume(loaded, quick=quick, seed=seed),
        "batch": _batch(loaded, quick=quick, seed=seed),
    }
    _finish(reports, json_file)


@dataclass(frozen=True, slots=True)
class _Report:
    """A result that has been shown already."""

    value: object
    passed: bool


def _load(model: str) -> "LoadedModel":
    from keepwarm import load_model

    return load_model(model)


def _output(loaded: "LoadedModel", *, quick: bool, seed: int) -> _Report:
    from keepwarm.bench.exp005 import run_exp005
    from keepwarm.bench.plan import full_plan, quick_plan
    from keepwarm.bench.tables import exp005_table, problems

    plan = quick_plan(seed=seed) if quick else full_plan(seed=seed)
    result = _with_progress("output", lambda tell: run_exp005(loaded, plan, tell))
    _show(exp005_table(result), *problems(result))
    return _Report(result, result.passed)


def _reconstruct(*, quick: bool) -> _Report:
    from keepwarm.bench.exp006 import FULL_SIZES, QUICK_SIZES, run_exp006
    from keepwarm.bench.tables import exp006_table

    sizes = QUICK_SIZES if quick else FULL_SIZES
    result = _with_progress("reconstruct", lambda tell: run_exp006(sizes, tell))
    _show(exp006_table(result))
    return _Report(result, result.passed)


def _resume(loaded: "LoadedModel", *, quick: bool, seed: int) -> _Report:
    from keepwarm.bench.resume import resume_plan, run_resume
    from keepwarm.bench.tables import figures_table

    plan = resume_plan(quick=quick, seed=seed)
    result = _with_progress("resume", lambda tell: run_resume(loaded, plan, tell))
    _show(figures_table("Resuming an agent", result))
    return _Report(result, result.passed)


def _batch(loaded: "LoadedModel", *, quick: bool, seed: int) -> _Report:
    from keepwarm.bench.batch import batch_plan, run_batch
    from keepwarm.bench.tables import figures_table

    plan = batch_plan(quick=quick, seed=seed)
    result = _with_progress("batch", lambda tell: run_batch(loaded, plan, tell))
    _show(figures_table("Agents beside agents", result))
    return _Report(result, result.passed)


def _with_progress(title: str, run: "Callable[[OnProgress], T]") -> T:
    from keepwarm.bench.report import progress_bar

    with progress_bar(title, Console(stderr=True)) as tell:
        return run(tell)


def _show(table: Table, *problems: str) -> None:
    console = Console()
    console.print(table)
    for problem in problems:
        console.print(problem, style="red", markup=False)


def _finish(reports: dict[str, _Report], json_file: Path | None) -> None:
    """Write what was asked for; the exit code is the verdict."""
    from keepwarm.bench.report import write_json

    if json_file is not None:
        write_json(json_file, {name: report.value for name, report in reports.items()})
    if not all(report.passed for report in reports.values()):
        raise typer.Exit(1)
