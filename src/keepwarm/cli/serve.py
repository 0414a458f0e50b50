"""`keepwarm serve`: runs the server until it is told to stop."""

from pathlib import Path
from typing import Annotated

import typer

from keepwarm.core.errors import ConfigError


def serve(
    model: Annotated[
        str | None, typer.Option(help="smollm2, a model's folder, or a hub id.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Where to listen.")] = None,
    port: Annotated[int | None, typer.Option(help="0 takes a free one.")] = None,
    memory: Annotated[
        str | None, typer.Option(help="The most memory for agents' KV, like 4GiB.")
    ] = None,
    disk: Annotated[
        str | None, typer.Option(help="The most disk for Keepwarm, like 20GiB.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="The settings file; by default keepwarm.toml here or in the home."),
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Any other setting."),
    ] = None,
) -> None:
    """Serve a model over HTTP: OpenAI, Anthropic and agents."""
    from keepwarm.cli.server_process import run_server
    from keepwarm.config import load_settings

    flags = {
        "model.name": model,
        "server.host": host,
        "server.port": port,
        "memory.budget_bytes": memory,
        "disk.disk_budget_bytes": disk,
    }
    given = {name: value for name, value in flags.items() if value is not None}
    settings = load_settings({**dict(map(_assignment, setting or [])), **given}, config_file=config)
    if not run_server(settings):
        raise typer.Exit(1)


def _assignment(text: str) -> tuple[str, object]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError("--set", "must be SECTION.KEY=VALUE")
    return name.strip(), value
