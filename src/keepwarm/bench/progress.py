"""How far a benchmark is, on the terminal."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

OnProgress = Callable[[str, int, int], None]
"""Is given what is done now, how many parts are done, and how many there are."""


def no_progress(_label: str, _num_done: int, _num_total: int) -> None:
    """Show nothing: for tests."""


@contextmanager
def progress_bar(title: str, console: Console) -> Iterator[OnProgress]:
    """Show a bar, which is gone when the block ends."""
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
