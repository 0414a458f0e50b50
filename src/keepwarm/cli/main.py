"""The `keepwarm` command: a list of its subcommands."""

import sys

import typer

from keepwarm.cli.agents import agents
from keepwarm.cli.bench import bench
from keepwarm.cli.chat import chat
from keepwarm.cli.demo import demo
from keepwarm.cli.doctor import doctor
from keepwarm.cli.models import models
from keepwarm.cli.serve import serve
from keepwarm.core.errors import KeepwarmError

app = typer.Typer(
    name="keepwarm",
    help="A local LLM server on MLX in which every agent keeps its memory warm.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


app.command()(serve)
app.command()(chat)
app.add_typer(agents)
app.add_typer(models)
app.command()(demo)
app.command()(doctor)
app.add_typer(bench)


def main() -> None:
    """Errors that Keepwarm raises on purpose are one line, not a traceback."""
    try:
        app()
    except KeepwarmError as error:
        sys.stderr.write(f"keepwarm: {error}\n")
        sys.exit(1)


if __name__ == "__main__":
    main()
