"""docs/cli.md names every command of `keepwarm agents` and `keepwarm models`, and no other."""

import re
from pathlib import Path
from typing import Any

import typer

from keepwarm.cli.agents import agents
from keepwarm.cli.models import models

PAGE = Path(__file__).parents[2] / "docs" / "cli.md"


def commands_of(app: typer.Typer) -> dict[str, Any]:
    group: Any = typer.main.get_command(app)
    commands: dict[str, Any] = group.commands
    return commands


def test_every_command_is_documented() -> None:
    rows = "\n".join(line for line in PAGE.read_text("utf-8").splitlines() if line[:3] == "| `")
    named = {*re.findall(r"`keepwarm agents ([a-z]+)", rows), *re.findall(r"`(unpin) NAME`", rows)}
    assert named == set(commands_of(agents))
    of_models = set(re.findall(r"`keepwarm models ([a-z]+)", rows))
    assert of_models == set(commands_of(models))


def test_every_option_exists() -> None:
    commands = commands_of(agents).values()
    options = {name for command in commands for part in command.params for name in part.opts}
    named = set(re.findall(r"`(--[a-z-]+)", PAGE.read_text("utf-8")))
    assert named <= options
