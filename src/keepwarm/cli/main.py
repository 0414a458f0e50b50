"""The `keepwarm` command and its subcommands."""

import sys
from typing import Annotated

import typer

from keepwarm import __version__
from keepwarm.cli.agents import agents
from keepwarm.cli.bench import bench
from keepwarm.cli.chat import chat
from keepwarm.cli.demo import demo
from keepwarm.cli.doctor import doctor
from keepwarm.cli.models import models
from keepwarm.cli.serve import serve
from keepwarm.core.errors import KeepwarmError

app = typer.Typer(name="keepwarm", no_args_is_help=True, pretty_exceptions_enable=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"keepwarm {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """A local LLM server on MLX in which every agent keeps its memory warm."""


app.command()(serve)
app.command()(chat)
app.add_typer(agents)
app.add_typer(models)
app.command()(demo)
app.command()(doctor)
app.add_typer(bench)


def main() -> None:
    """Run the command; an error that Keepwarm raises on purpose is one line, not a traceback."""
    try:
        app()
    except KeepwarmError as error:
        sys.stderr.write(f"keepwarm: {error}\n")
        sys.exit(1)


if __name__ == "__main__":
    main()
