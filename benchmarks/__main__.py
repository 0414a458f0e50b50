"""`python -m benchmarks`: what maintainers measure, with a verdict on each."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.attack.benchmark import attack_plan, run_attack
from benchmarks.chaos.benchmark import chaos_plan, run_chaos
from benchmarks.server.benchmark import http_plan, run_http
from benchmarks.store.benchmark import run_store, store_plan
from benchmarks.swap.benchmark import run_swap, swap_plan
from keepwarm.bench.figures import FiguresResult
from keepwarm.bench.report import OnProgress, progress_bar, write_json
from keepwarm.bench.tables import figures_table

app = typer.Typer(
    name="python -m benchmarks",
    help="What maintainers measure. Exit code 1: a figure failed.",
    no_args_is_help=True,
)

Quick = Annotated[bool, typer.Option("--quick", help="Small sizes, to see that it works.")]
JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write the results there as JSON.")
]
Model = Annotated[str, typer.Option(help="smollm2, a model's folder, or a hub id.")]
Seed = Annotated[int, typer.Option(help="Decides prompts and where they are cut.")]


@app.command()
def store(
    model: Model = "smollm2", quick: Quick = False, seed: Seed = 0, json_file: JsonFile = None
) -> None:
    """Agents on disk: restoring, bytes written, a large home, budgets, and what saving costs."""
    _finish({"store": _store(model, quick=quick, seed=seed)}, json_file)


@app.command()
def chaos(quick: Quick = False, seed: Seed = 0, json_file: JsonFile = None) -> None:
    """SIGKILL in every phase: no committed turn lost, nothing wrong, no unreadable home."""
    _finish({"chaos": _chaos(quick=quick, seed=seed)}, json_file)


@app.command()
def attack(
    model: Model = "smollm2", quick: Quick = False, seed: Seed = 0, json_file: JsonFile = None
) -> None:
    """Requests too large in every way, crowds that hang up, SIGKILL behind acknowledgements."""
    _finish({"attack": _attack(model, quick=quick, seed=seed)}, json_file)


@app.command()
def server(
    model: Model = "smollm2", quick: Quick = False, seed: Seed = 0, json_file: JsonFile = None
) -> None:
    """What the server costs on top of the engine, and thousands of generated requests."""
    _finish({"server": _server(model, quick=quick, seed=seed)}, json_file)


@app.command()
def swap(
    model: Model = "smollm2", quick: Quick = False, seed: Seed = 0, json_file: JsonFile = None
) -> None:
    """Two models in memory for one: what a swap takes, keeps and leaves; clients on both."""
    _finish({"swap": _swap(model, quick=quick, seed=seed)}, json_file)


@app.command(name="all")
def all_of_them(
    model: Model = "smollm2", quick: Quick = False, seed: Seed = 0, json_file: JsonFile = None
) -> None:
    """All of them, one after the other."""
    reports = {
        "store": _store(model, quick=quick, seed=seed),
        "chaos": _chaos(quick=quick, seed=seed),
        "attack": _attack(model, quick=quick, seed=seed),
        "server": _server(model, quick=quick, seed=seed),
        "swap": _swap(model, quick=quick, seed=seed),
    }
    _finish(reports, json_file)


def _store(model: str, *, quick: bool, seed: int) -> FiguresResult:
    from keepwarm import load_model

    plan = store_plan(quick=quick, seed=seed)
    loaded = load_model(model)
    return _shown("Agents on disk", lambda tell: run_store(loaded, plan, tell))


def _chaos(*, quick: bool, seed: int) -> FiguresResult:
    plan = chaos_plan(quick=quick, seed=seed)
    return _shown("Killed in every phase", lambda tell: run_chaos(plan, tell))


def _attack(model: str, *, quick: bool, seed: int) -> FiguresResult:
    plan = attack_plan(quick=quick, seed=seed)
    return _shown("Attacks, crowds and crashes", lambda tell: run_attack(model, plan, tell))


def _server(model: str, *, quick: bool, seed: int) -> FiguresResult:
    plan = http_plan(quick=quick, seed=seed)
    return _shown("The server on top of the engine", lambda tell: run_http(model, plan, tell))


def _swap(model: str, *, quick: bool, seed: int) -> FiguresResult:
    plan = swap_plan(quick=quick, seed=seed)
    return _shown("Two models in turn", lambda tell: run_swap(model, plan, tell))


def _shown(title: str, run: Callable[[OnProgress], FiguresResult]) -> FiguresResult:
    """Run one of them and print its figures."""
    with progress_bar(title, Console(stderr=True)) as tell:
        result = run(tell)
    console = Console()
    console.print(figures_table(title, result))
    for note in result.notes:
        console.print(note, style="red", markup=False)
    return result


def _finish(results: dict[str, FiguresResult], json_file: Path | None) -> None:
    """Write what was asked for; the exit code is the verdict."""
    if json_file is not None:
        write_json(json_file, results)
    if not all(result.passed for result in results.values()):
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
