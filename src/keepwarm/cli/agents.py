"""`keepwarm agents`: the agents of a running server, from the command line."""

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from keepwarm.cli.agent_files import download, upload
from keepwarm.cli.client import (
    DEFAULT_URL,
    AgentName,
    AsJson,
    Client,
    Refused,
    Url,
    agent_path,
    valid_name,
)
from keepwarm.cli.terminal import console, counted, for_terminal, say, waiting, warn, write_json
from keepwarm.core.errors import ConfigError
from keepwarm.core.stored import Overflow

agents = typer.Typer(
    name="agents",
    help="The agents of a running server. Exit codes: 1: refused or failed; 2: wrong usage.",
    no_args_is_help=True,
)

PAGE = 1000
MAX_BLOCKS = 8


@agents.command()
def ls(url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """List all agents: where their memory is, and how long it is."""
    with Client(url) as client:
        rows = list(_all(client))
    if as_json:
        write_json(rows)
    elif rows:
        console().print(_table(rows))
    else:
        Console(stderr=True).print("No agents yet; `keepwarm chat NAME` makes one.", style="dim")


@agents.command()
def show(name: AgentName, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Show one agent and its settings."""
    with Client(url) as client:
        agent = client.get(agent_path(name))
    if as_json:
        write_json(agent)
        return
    grid = Table(box=None, show_header=False, pad_edge=False)
    for key, value in agent.items():
        grid.add_row(key.removeprefix("num_").replace("_", " "), _shown(key, value))
    console().print(grid, markup=False)


@agents.command()
def turns(name: AgentName, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Show what was said."""
    with Client(url) as client:
        document = client.get(agent_path(name, "turns"))
    if as_json:
        write_json(document)
        return
    out = console()
    for turn in document["turns"]:
        head = f"turn {turn['turn']}, {turn['context_tokens']:,} tokens"
        out.print(head, style="dim", markup=False)
        for message in turn["messages"] or [{"role": "", "content": "(only token ids are known)"}]:
            out.print(f"{message['role']}:", style="bold", markup=False)
            content = message.get("content")
            text = content if isinstance(content, str) else repr(content)
            out.print(for_terminal(text), markup=False, soft_wrap=True)


@agents.command()
def fork(
    name: AgentName,
    new_name: Annotated[str, typer.Argument(callback=valid_name, help="The new agent's name.")],
    at_turn: Annotated[
        int | None, typer.Option(min=0, help="How many turns it knows; all by default.")
    ] = None,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Make a new agent that knows what this one knew. Nothing is copied."""
    body: dict[str, object] = {"new_id": new_name}
    if at_turn is not None:
        body["at_turn"] = at_turn
    _post(url, name, "fork", body, as_json=as_json)


@agents.command()
def rollback(
    name: AgentName,
    turn: Annotated[int, typer.Argument(min=0, help="How many turns to keep.")],
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Forget everything after the given number of turns."""
    _post(url, name, "rollback", {"turn": turn}, as_json=as_json)


@agents.command()
def park(name: AgentName, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Save an agent and free its memory."""
    _post(url, name, "park", as_json=as_json)


@agents.command()
def prefetch(name: AgentName, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Bring an agent's memory back, so that its next turn begins at once."""
    _post(url, name, "prefetch", as_json=as_json)


@agents.command()
def pin(name: AgentName, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Keep an agent's memory, whatever other agents need."""
    _set(url, name, {"pinned": True}, as_json=as_json)


@agents.command()
def unpin(name: AgentName, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Let an agent's memory make room for others again."""
    _set(url, name, {"pinned": False}, as_json=as_json)


@agents.command(name="set")
def set_settings(
    name: AgentName,
    priority: Annotated[
        int | None, typer.Option(min=-100, max=100, help="Higher goes first; 0 is usual.")
    ] = None,
    quota: Annotated[
        str | None, typer.Option(metavar="SIZE", help="The most of its own KV on disk, like 2GiB.")
    ] = None,
    overflow: Annotated[
        Overflow | None, typer.Option(help="What happens when its context is full.")
    ] = None,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Change an agent's settings; those that are not given stay."""
    given = {
        "priority": priority,
        "quota_bytes": None if quota is None else _size(quota),
        "overflow": None if overflow is None else overflow.value,
    }
    body = {key: value for key, value in given.items() if value is not None}
    if not body:
        raise typer.BadParameter("give --priority, --quota or --overflow")
    _set(url, name, body, as_json=as_json)


@agents.command()
def verify(name: AgentName, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Compute an agent's memory anew and compare. Takes a prefill; exit code 1 if it differs."""
    with Client(url) as client, waiting(f"computes {name} anew"):
        report = client.post(agent_path(name, "verify"), patient=True)
    if as_json:
        write_json(report)
    elif report["passed"]:
        compared, tokens = report["compared_tokens"], report["context_tokens"]
        say(f"{name} equals a cold run: {compared:,} of {tokens:,} tokens compared")
    _warn_unless(report["durable"])
    if not report["passed"]:
        blocks = _listed(report["differing_blocks"])
        raise Refused(
            f"{name} differs from a cold run in blocks {blocks}, which were dropped; its next turn "
            "computes them anew, and `keepwarm doctor --selftest` examines this machine"
        )


@agents.command()
def export(
    name: AgentName,
    file: Annotated[
        Path | None, typer.Argument(help="The file to write; NAME.keepwarm by default.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that exists.")] = False,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Write an agent with its memory into a file, for another machine."""
    path = file or Path(f"{name}.keepwarm")
    with Client(url) as client:
        left_out = download(client, name, path, force=force)
    num_bytes = path.stat().st_size
    if as_json:
        written = {"id": name, "file": str(path), "file_bytes": num_bytes}
        write_json({**written, "left_out_tokens": left_out})
        return
    say(f"{name} is in {path}, {num_bytes:,} bytes")
    if left_out:
        missing = counted(left_out, "token")
        say(f"without the memory of {missing} that was not on disk; it is computed anew")


@agents.command(name="import")
def import_agent(
    file: Annotated[
        Path,
        typer.Argument(exists=True, dir_okay=False, readable=True, help="A file from `export`."),
    ],
    new_name: Annotated[
        str | None,
        typer.Option("--as", metavar="NAME", help="Its name here; the exported one by default."),
    ] = None,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Import an agent from a file. Its memory is private to it until `verify` has passed."""
    query = {} if new_name is None else {"id": valid_name(new_name)}
    with Client(url) as client:
        result = upload(client, file, **query)
    if as_json:
        write_json(result)
        return
    turns, tokens = counted(result["num_turns"], "turn"), counted(result["num_tokens"], "token")
    say(f"{result['agent_id']} is here, with {turns}, {tokens}")
    if result["num_dropped"]:
        say("its memory is another model's and is computed anew with its next turn")
    elif result["num_left_out"]:
        say("a part of its memory did not fit on the disk and is computed anew")
    _warn_unless(result["is_durable"])


@agents.command()
def rm(
    name: AgentName,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Delete an agent and what only it owned, from the disk as well."""
    with Client(url) as client:
        if not yes:
            _confirm(name, client)
        result = client.delete(agent_path(name))
    if as_json:
        write_json(result)
    else:
        say(f"{name} is deleted")


# -- asking ----------------------------------------------------------------------------------------


def _all(client: Client) -> Iterator[dict[str, Any]]:
    query: dict[str, str | int] = {"limit": PAGE}
    while True:
        page = client.get("/v1/agents", **query)
        yield from page["agents"]
        if not page["has_more"]:
            return
        query["after"] = page["agents"][-1]["id"]


def _post(
    url: str, name: str, action: str, body: Mapping[str, object] | None = None, *, as_json: bool
) -> None:
    with Client(url) as client:
        _tell(client.post(agent_path(name, action), body), as_json=as_json)


def _set(url: str, name: str, body: Mapping[str, object], *, as_json: bool) -> None:
    with Client(url) as client:
        client.get(agent_path(name))  # a PUT would create an agent that does not exist
        _tell(client.put(agent_path(name), body), as_json=as_json)


def _size(text: str) -> int:
    from keepwarm.config import parse_size

    try:
        return parse_size("--quota", text)
    except ConfigError as error:
        raise typer.BadParameter(error.problem, param_hint="--quota") from error


def _confirm(name: str, client: Client) -> None:
    try:
        length = _length(client.get(agent_path(name)))
    except Refused as error:
        if error.kind != "agent_damaged":
            raise
        length = "damaged conversation"
    if not sys.stdin.isatty():
        raise typer.BadParameter("nothing can be asked here; add --yes to delete it")
    typer.confirm(f"Delete {name} with its {length}?", abort=True, err=True)


# -- showing ---------------------------------------------------------------------------------------


def _tell(agent: dict[str, Any], *, as_json: bool) -> None:
    """Print an agent after a change, in a line."""
    if as_json:
        write_json(agent)
        return
    flags = "".join(f", {flag}" for flag in ("pinned", "private") if agent[flag])
    say(f"{agent['id']}: {agent['tier']}, {_length(agent)}{flags}")
    _warn_unless(agent["durable"])


def _warn_unless(durable: bool) -> None:
    if not durable:
        warn("durable: false: the disk refused, so this is in memory only and is tried again")


def _table(rows: list[dict[str, Any]]) -> Table:
    grid = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("agent", "tier"):
        grid.add_column(column, no_wrap=column == "tier", overflow="fold")
    for column in ("turns", "tokens", "held"):
        grid.add_column(column, justify="right")
    grid.add_column("")
    for row in rows:
        flags = [flag for flag in ("running", "pinned", "private") if row[flag]]
        flags += ["damaged"] if row["damage"] else []
        grid.add_row(
            for_terminal(row["id"]),
            row["tier"],
            f"{row['num_turns']:,}",
            f"{row['context_tokens']:,}",
            f"{row['held_tokens']:,}",
            ", ".join(flags),
        )
    return grid


def _length(agent: dict[str, Any]) -> str:
    turns = counted(agent["num_turns"], "turn")
    return f"{turns}, {counted(agent['context_tokens'], 'token')}"


def _shown(key: str, value: object) -> str:
    if value is None:
        return "any" if key == "quota_bytes" else "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else for_terminal(str(value))


def _listed(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:MAX_BLOCKS]))
    left_out = len(numbers) - MAX_BLOCKS
    return f"{shown} and {left_out} more" if left_out > 0 else shown
