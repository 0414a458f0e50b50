"""Benchmarks as commands: one table gives the names, options, reports and exit codes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from rich.console import Console

if TYPE_CHECKING:
    from keepwarm.bench.progress import OnProgress
    from keepwarm.bench.report import Result
    from keepwarm.core.ports import LoadedModel

P = TypeVar("P")

Quick = Annotated[bool, typer.Option("--quick", help="Small sizes, to see that it works.")]
JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write the results there as JSON.")
]
Model = Annotated[str, typer.Option(help="smollm2, a model's folder, or a hub id.")]
Seed = Annotated[int, typer.Option(help="Decides prompts and where they are cut.")]


@dataclass(frozen=True, slots=True)
class Order:
    """What the command line asked for, and where progress is shown."""

    model: str
    quick: bool
    seed: int
    tell: "OnProgress"

    def load(self) -> "LoadedModel":
        """Load the model, once for all benchmarks of this process. Raises ModelLoadError."""
        return _loaded(self.model)

    def plan(self, full: Callable[..., P], quick: Callable[..., P]) -> P:
        """Return the plan in the size that was asked for, with the seed."""
        return (quick if self.quick else full)(seed=self.seed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """One row of a table of benchmarks.

    `question` is what it answers, as docs/benchmarks.md says too; `aims` what its figures must
    reach. `run` imports what it needs: the table itself is read for every `--help`.
    """

    name: str
    title: str
    question: str
    aims: str
    run: "Callable[[Order], Result]"
    needs_model: bool = True


def command_line(name: str, about: str, benchmarks: Sequence[Benchmark]) -> typer.Typer:
    """Return a command for each of the benchmarks, and `all` for one after the other."""
    app = typer.Typer(
        name=name,
        help=f"{about} Exit code 1: an aim was missed.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    for benchmark in benchmarks:
        text = f"{benchmark.question}\n\nAims: {benchmark.aims}."
        app.command(benchmark.name, short_help=benchmark.question, help=text)(_command(benchmark))
    app.command("all", help="All of them, one after the other.")(_command(*benchmarks))
    return app


def _command(*benchmarks: Benchmark) -> Callable[..., None]:
    """Return a function whose parameters are the options that these benchmarks have."""

    def run(
        model: Model = "smollm2", quick: Quick = False, seed: Seed = 0, json_file: JsonFile = None
    ) -> None:
        _run(benchmarks, json_file, model=model, quick=quick, seed=seed)

    def run_without_model(quick: Quick = False, json_file: JsonFile = None) -> None:
        run(quick=quick, json_file=json_file)

    return run if any(benchmark.needs_model for benchmark in benchmarks) else run_without_model


def _run(
    benchmarks: Sequence[Benchmark], json_file: Path | None, *, model: str, quick: bool, seed: int
) -> None:
    """Run them and show what they found; the exit code is the verdict."""
    from keepwarm.bench.progress import progress_bar
    from keepwarm.bench.report import write_json

    results: dict[str, Result] = {}
    for benchmark in benchmarks:
        with progress_bar(benchmark.name, Console(stderr=True)) as tell:
            result = benchmark.run(Order(model, quick, seed, tell))
        results[benchmark.name] = result
        _show(result, benchmark.title)
    if json_file is not None:
        write_json(json_file, results)
    if not all(result.passed for result in results.values()):
        raise typer.Exit(1)


def _show(result: "Result", title: str) -> None:
    console = Console()
    console.print(result.table(title))
    for note in result.notes:
        console.print(note, style="red", markup=False)


@cache
def _loaded(model: str) -> "LoadedModel":
    from keepwarm import load_model

    return load_model(model)
