"""Files of agents on the client's side: `keepwarm agents export` and `import`."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from keepwarm.cli.client import Client, Refused, agent_path
from keepwarm.cli.terminal import for_terminal, waiting, warn
from keepwarm.core.errors import KeepwarmError

PIECE_BYTES = 1 << 20
LEFT_OUT = "X-Keepwarm-Left-Out-Tokens"
DAMAGE = "X-Keepwarm-Damage"


class FileTrouble(KeepwarmError):
    """A file cannot be written or read; the message says what to do."""


def download(client: Client, name: str, path: Path, *, force: bool) -> int:
    """Write the agent into the file, and return for how many tokens it has no KV.

    An existing file is replaced only with `force`. Raises FileTrouble, Refused and NoServer.
    """
    _check_target(path, force=force)
    with waiting(f"packs {name}") as spinner, client.download(agent_path(name, "export")) as answer:
        if spinner is not None:
            spinner.stop()
        total = int(answer.headers.get("Content-Length", 0))
        with _new_file(path, force=force) as target, _bar(name, total) as advance:
            for piece in answer.iter_bytes(PIECE_BYTES):
                target.write(piece)
                advance(len(piece))
        if damage := answer.headers.get(DAMAGE):
            warn(f"{name} is damaged ({damage}): the file has what could be read")
        return int(answer.headers.get(LEFT_OUT, 0))


def upload(client: Client, path: Path, **query: str) -> dict[str, Any]:
    """Send the file to the server, and return what it imported.

    Raises FileTrouble, Refused and NoServer.
    """
    with _opened(path) as source:
        total = os.fstat(source.fileno()).st_size
        with _bar(path.name, total) as advance:
            body = _pieces(source, total, advance)
            try:
                return client.upload("/v1/agents/import", body, total, **query)
            except Refused as error:
                raise Refused(f"{path}: {error}", error.kind) from error


def _check_target(path: Path, *, force: bool) -> None:
    if path.is_dir():
        raise FileTrouble(f"{path} is a folder; name a file in it")
    if not path.parent.is_dir():
        raise FileTrouble(f"{path.parent} is not a folder; make it first")
    if path.exists() and not force:
        raise FileTrouble(f"{path} exists already; name another file, or replace it with --force")


@contextmanager
def _new_file(path: Path, *, force: bool) -> Iterator[IO[bytes]]:
    """Open a file that appears whole or not at all, and that only its owner can read."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("xb") as file:
            temporary.chmod(0o600)
            yield file
            file.flush()
            os.fsync(file.fileno())
        _check_target(path, force=force)
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            problem = error.strerror or error
            raise FileTrouble(
                f"{path} cannot be written: {problem}; choose another place"
            ) from error
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


def _pieces(source: IO[bytes], total: int, advance: Callable[[int], None]) -> Iterator[bytes]:
    """Read exactly `total` bytes, piece by piece. Raises FileTrouble where the file is shorter."""
    num_left = total
    while num_left:
        piece = source.read(min(PIECE_BYTES, num_left))
        if not piece:
            raise FileTrouble(f"{source.name} became shorter while it was read; try again")
        num_left -= len(piece)
        yield piece
        advance(len(piece))


@contextmanager
def _bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on a terminal; call what it yields with each number of further bytes."""
    columns = (
        TextColumn("{task.description}", style="bold", markup=False),
        BarColumn(bar_width=30),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    err = Console(stderr=True)
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task(for_terminal(title), total=total or None)
        yield lambda num_bytes: bar.advance(task, num_bytes)
