"""`keepwarm agents`: the agents of a running server, from the command line."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from keepwarm.cli.client import (
    DEFAULT_URL,
    AgentName,
    AsJson,
    Client,
    Refused,
    Url,
    agent_path,
    counted,
    for_terminal,
    valid_name,
    waiting,
    write_json,
)
from keepwarm.core.errors import ConfigError, KeepwarmError
from keepwarm.core.stored import Overflow

agents = typer.Typer(
    name="agents",
    help="The agents of a running server. Exit code 1: refused or failed; 2: used wrongly.",
    no_args_is_help=True,
)

PAGE = 1000
MAX_COLUMNS = 10_000
PIECE_BYTES = 1 << 20
LEFT_OUT = "X-Keepwarm-Left-Out-Tokens"
DAMAGE = "X-Keepwarm-Damage"


class FileTrouble(KeepwarmError):
    """The file of an export or import stands in the way; says what to do."""


@agents.command()
def ls(url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """All agents, where their memory is, and how long it is."""
    with Client(url) as client:
        rows = list(_all(client))
    if as_json:
        write_json(rows)
    elif rows:
        _console().print(_table(rows))
    else:
        Console(stderr=True).print("No agents yet; `keepwarm chat NAME` makes one.", style="dim")


@agents.command()
def show(name: AgentName, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """One agent and its settings."""
    with Client(url) as client:
        agent = client.get(agent_path(name))
    if as_json:
        write_json(agent)
        return
    grid = Table(box=None, show_header=False, pad_edge=False)
    for key, value in agent.items():
        grid.add_row(_words(key), _shown(key, value))
    _console().print(grid, markup=False)


@agents.command()
def turns(name: AgentName, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """What was said."""
    with Client(url) as client:
        document = client.get(agent_path(name, "turns"))
    if as_json:
        write_json(document)
        return
    console = _console()
    for turn in document["turns"]:
        head = f"turn {turn['turn']}, {turn['context_tokens']:,} tokens"
        console.print(head, style="dim", markup=False)
        for message in turn["messages"] or [{"role": "", "content": "(only token ids are known)"}]:
            console.print(f"{message['role']}:", style="bold", markup=False)
            console.print(_text(message.get("content")), markup=False, soft_wrap=True)


@agents.command()
def fork(
    name: AgentName,
    new_name: Annotated[str, typer.Argument(callback=valid_name, help="Of the new agent.")],
    at_turn: Annotated[
        int | None, typer.Option(min=0, help="After so many turns; all of them otherwise.")
    ] = None,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """A new agent that knows what this one knew. Nothing is copied."""
    body: dict[str, object] = {"new_id": new_name}
    if at_turn is not None:
        body["at_turn"] = at_turn
    with Client(url) as client:
        _tell(client.post(agent_path(name, "fork"), body), as_json=as_json)


@agents.command()
def rollback(
    name: AgentName,
    turn: Annotated[int, typer.Argument(min=0, help="How many turns to keep.")],
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Forget everything after so many turns."""
    with Client(url) as client:
        _tell(client.post(agent_path(name, "rollback"), {"turn": turn}), as_json=as_json)


@agents.command()
def park(name: AgentName, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Save an agent and free its memory."""
    with Client(url) as client:
        _tell(client.post(agent_path(name, "park")), as_json=as_json)


@agents.command()
def prefetch(name: AgentName, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Bring an agent's memory back, so that its next turn begins at once."""
    with Client(url) as client:
        _tell(client.post(agent_path(name, "prefetch")), as_json=as_json)


@agents.command()
def pin(name: AgentName, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Never give up an agent's memory for another's."""
    _set(url, name, {"pinned": True}, as_json=as_json)


@agents.command()
def unpin(name: AgentName, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Let an agent's memory be given up again."""
    _set(url, name, {"pinned": False}, as_json=as_json)


@agents.command(name="set")
def set_settings(
    name: AgentName,
    priority: Annotated[
        int | None, typer.Option(min=-100, max=100, help="Higher goes first; 0 is usual.")
    ] = None,
    quota: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Of its own KV on disk, like 2GiB.")
    ] = None,
    overflow: Annotated[
        Overflow | None, typer.Option(help="What happens when its context is full.")
    ] = None,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Change an agent's settings; what is left out stays."""
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
    """Compute an agent's memory anew and compare. Takes a prefill; exit code 1: it differs."""
    with Client(url) as client, waiting(f"computes {name} anew"):
        report = client.post(agent_path(name, "verify"), patient=True)
    if as_json:
        write_json(report)
    elif report["passed"]:
        compared, tokens = report["compared_tokens"], report["context_tokens"]
        _say(f"{name} is what it was computed to be: {compared:,} of {tokens:,} tokens compared")
    _warn_unless(report["durable"])
    if not report["passed"]:
        blocks = _list(report["differing_blocks"])
        raise Refused(
            f"{name} is not what it was computed to be in blocks {blocks}, which were dropped; its "
            "next turn computes them anew, and `keepwarm doctor --selftest` examines this machine"
        )


@agents.command()
def export(
    name: AgentName,
    file: Annotated[
        Path | None, typer.Argument(help="NAME.keepwarm, here, where it is left out.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that exists.")] = False,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Write an agent with its memory into a file, for another machine."""
    path = file or Path(f"{name}.keepwarm")
    _check_target(path, force=force)
    with Client(url) as client:
        left_out = _download(client, name, path, force=force)
    result = {
        "id": name,
        "file": str(path),
        "file_bytes": path.stat().st_size,
        "left_out_tokens": left_out,
    }
    if as_json:
        write_json(result)
        return
    _say(f"{name} is in {path}, {result['file_bytes']:,} bytes")
    if left_out:
        missing = counted(left_out, "token")
        _say(f"without the memory of {missing} that was not on disk; it is computed anew")


@agents.command(name="import")
def import_agent(
    file: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, readable=True, help="From `export`.")
    ],
    new_name: Annotated[
        str | None,
        typer.Option("--as", metavar="NAME", help="Another name than the one it had."),
    ] = None,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Take in an agent out of a file. Its memory is its own until `verify` has passed."""
    query = {} if new_name is None else {"id": valid_name(new_name)}
    with Client(url) as client, _opened(file) as source:
        total = os.fstat(source.fileno()).st_size
        with _bar(file.name, total) as advance:
            body = _pieces(source, total, advance)
            try:
                result = client.upload("/v1/agents/import", body, total, **query)
            except Refused as error:
                raise Refused(f"{file}: {error}", error.kind) from error
    if as_json:
        write_json(result)
        return
    name = result["agent_id"]
    _say(
        f"{name} is here, with {counted(result['num_turns'], 'turn')}, "
        f"{counted(result['num_tokens'], 'token')}"
    )
    if result["num_dropped"]:
        _say("its memory is of another model and is computed anew with its next turn")
    elif result["num_left_out"]:
        _say("a part of its memory did not fit on the disk and is computed anew")
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
        _say(f"{name} is gone")


# -- asking ----------------------------------------------------------------------------------------


def _all(client: Client) -> Iterator[dict[str, Any]]:
    query: dict[str, str | int] = {"limit": PAGE}
    while True:
        page = client.get("/v1/agents", **query)
        yield from page["agents"]
        if not page["has_more"]:
            return
        query["after"] = page["agents"][-1]["id"]


def _set(url: str, name: str, body: dict[str, Any], *, as_json: bool) -> None:
    with Client(url) as client:
        client.get(agent_path(name))  # a PUT would create an agent that is not there
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
        raise typer.BadParameter("nobody can be asked here; add --yes to delete it")
    typer.confirm(f"Delete {name} with its {length}?", abort=True, err=True)


# -- files -----------------------------------------------------------------------------------------


def _download(client: Client, name: str, path: Path, *, force: bool) -> int:
    """Returns for how many tokens the file has no KV."""
    with waiting(f"packs {name}") as spinner, client.download(agent_path(name, "export")) as answer:
        if spinner is not None:
            spinner.stop()
        total = int(answer.headers.get("Content-Length", 0))
        with _new_file(path, force=force) as target, _bar(name, total) as advance:
            for piece in answer.iter_bytes(PIECE_BYTES):
                target.write(piece)
                advance(len(piece))
        if damage := answer.headers.get(DAMAGE):
            text = f"{name} is damaged ({damage}): the file has what could be read"
            Console(stderr=True).print(for_terminal(text), style="yellow", markup=False)
        return int(answer.headers.get(LEFT_OUT, 0))


def _check_target(path: Path, *, force: bool) -> None:
    if path.is_dir():
        raise FileTrouble(f"{path} is a folder; name a file in it")
    if not path.parent.is_dir():
        raise FileTrouble(f"{path.parent} is no folder; make it first")
    if path.exists() and not force:
        raise FileTrouble(f"{path} exists already; name another file, or replace it with --force")


@contextmanager
def _new_file(path: Path, *, force: bool) -> Iterator[IO[bytes]]:
    """Appears whole or not at all, readable by its owner only: it holds a conversation."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("xb") as file:
            temporary.chmod(0o600)
            yield file
            file.flush()
            os.fsync(file.fileno())
        _check_target(path, force=force)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        problem = error.strerror or error
        raise FileTrouble(f"{path} cannot be written: {problem}; choose another place") from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    try:
        file = path.open("rb")
    except OSError as error:
        problem = error.strerror or error
        raise FileTrouble(f"{path} cannot be read: {problem}; choose another") from error
    with file:
        yield file


def _pieces(source: IO[bytes], total: int, advance: "Advance") -> Iterator[bytes]:
    """Exactly so many bytes. Raises FileTrouble where the file has become shorter."""
    num_left = total
    while num_left:
        piece = source.read(min(PIECE_BYTES, num_left))
        if not piece:
            raise FileTrouble(f"{source.name} became shorter while it was read; try again")
        num_left -= len(piece)
        yield piece
        advance(len(piece))


# -- showing ---------------------------------------------------------------------------------------


class Advance:
    """So many bytes more."""

    def __init__(self, bar: Progress, title: str, total: int) -> None:
        self._bar = bar
        self._task = bar.add_task(title, total=total or None)

    def __call__(self, num_bytes: int) -> None:
        self._bar.update(self._task, advance=num_bytes)


@contextmanager
def _bar(title: str, total: int) -> Iterator[Advance]:
    columns = (
        TextColumn("{task.description}", style="bold", markup=False),
        BarColumn(bar_width=30),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        yield Advance(bar, for_terminal(title), total)


def _console() -> Console:
    """For standard output; where nobody looks on, a line is a line however long it is."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = MAX_COLUMNS
    return console


def _tell(agent: dict[str, Any], *, as_json: bool) -> None:
    """What has become of an agent, in a line."""
    if as_json:
        write_json(agent)
        return
    flags = "".join(f", {flag}" for flag in ("pinned", "private") if agent[flag])
    _say(f"{agent['id']}: {agent['tier']}, {_length(agent)}{flags}")
    _warn_unless(agent["durable"])


def _warn_unless(durable: bool) -> None:
    if not durable:
        text = "durable: false: the disk refused, so this is in memory only and is tried again"
        Console(stderr=True).print(text, style="yellow", markup=False, soft_wrap=True)


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


def _words(key: str) -> str:
    return key.removeprefix("num_").replace("_", " ")


def _shown(key: str, value: object) -> str:
    if value is None:
        return "any" if key == "quota_bytes" else "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else for_terminal(str(value))


def _text(content: object) -> str:
    return for_terminal(content) if isinstance(content, str) else for_terminal(repr(content))


def _list(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:8]))
    return f"{shown} and {len(numbers) - 8} more" if len(numbers) > 8 else shown


def _say(text: str) -> None:
    _console().print(for_terminal(text), markup=False, soft_wrap=True)
