"""The `keepwarm` command and its subcommands."""

import os
import sys
import threading
from typing import Annotated, NoReturn

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
        _leave(1)
    except SystemExit as end:
        _leave(end.code)


def _leave(code: int | str | None) -> NoReturn:
    """End the process, without finalising Python while a thread of Keepwarm still runs.

    A load or a long prompt that was given up runs on. When such a thread comes back from MLX or a
    tokenizer to an interpreter that is being finalised, the process aborts.
    """
    if isinstance(code, int | None) and any(map(_is_ours, threading.enumerate())):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)
    sys.exit(code)


def _is_ours(thread: threading.Thread) -> bool:
    return thread.daemon and thread.name.startswith("keepwarm-")


if __name__ == "__main__":
    main()
