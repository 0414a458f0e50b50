"""Prints for commands: text that is safe for a terminal, JSON, spinners."""

import json
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.status import Status

MAX_COLUMNS = 10_000


def console() -> "Console":
    """Make a console for standard output; in a pipe it never wraps a line."""
    from rich.console import Console

    made = Console(highlight=False)
    if not made.is_terminal:
        made.width = MAX_COLUMNS
    return made


def say(text: str) -> None:
    """Print a sentence to standard output."""
    console().print(for_terminal(text), markup=False, soft_wrap=True)


def warn(text: str) -> None:
    """Print a warning to standard error."""
    from rich.console import Console

    err = Console(stderr=True)
    err.print(for_terminal(text), style="yellow", markup=False, soft_wrap=True)


def write_json(value: object, *, indent: int | None = 2) -> None:
    """Print the value as JSON to standard output."""
    sys.stdout.write(json.dumps(value, indent=indent) + "\n")
    sys.stdout.flush()


@contextmanager
def waiting(doing: str) -> "Iterator[Status | None]":
    """Show a spinner, if standard error is a terminal."""
    from rich.console import Console

    err = Console(stderr=True)
    if not err.is_terminal:
        yield None
        return
    with err.status(f"[dim]{doing}[/]") as status:
        yield status


def counted(number: int, noun: str) -> str:
    """Write `1 turn` or `2 turns`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def for_terminal(text: str) -> str:
    """Remove control characters: text from a model or a client may try to control the terminal."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")
