"""Progress bars, tables and JSON of the experiments."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

OnProgress = Callable[[str, int, int], None]
"""What is done now, how many parts are done, and how many there are."""


def no_progress(_label: str, _num_done: int, _num_total: int) -> None:
    """For tests."""


@contextmanager
def progress_bar(title: str, console: Console) -> Iterator[OnProgress]:
    columns = (
        TextColumn(f"[bold]{title}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("")

        def on_progress(label: str, num_done: int, num_total: int) -> None:
            bar.update(task, description=label, completed=num_done, total=num_total)

        yield on_progress


def mark(passed: bool | None) -> str:
    if passed is None:
        return "[dim]-[/]"
    return "[green]pass[/]" if passed else "[bold red]FAIL[/]"


def as_json(value: object) -> Any:
    """Results as plain values, their verdicts included."""
    if is_dataclass(value) and not isinstance(value, type):
        plain = {field.name: as_json(getattr(value, field.name)) for field in fields(value)}
        if hasattr(value, "passed"):
            plain["passed"] = value.passed
        return plain
    if isinstance(value, dict):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [as_json(item) for item in value]
    return value.value if isinstance(value, Enum) else value


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(as_json(value), indent=2) + "\n", "utf-8")
