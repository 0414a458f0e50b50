"""A benchmark's report: measured figures, each beside its aim, as a table and as JSON."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

from rich.table import Table


class Result(Protocol):
    """What every benchmark and experiment returns."""

    @property
    def passed(self) -> bool:
        """Whether every aim was reached."""

    @property
    def notes(self) -> Sequence[str]:
        """What went wrong, or belongs to a figure, in a sentence each."""

    def table(self, title: str) -> Table:
        """Return the figures for people."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured ratio. `limit` is the most it may be (`at_least`: the least)."""

    name: str
    measured: float
    limit: float
    unit: str = "x"
    at_least: bool = False
    facts: dict[str, float] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        if self.at_least:
            return self.measured >= self.limit
        return self.measured <= self.limit

    @property
    def bound(self) -> str:
        return f"at {'least' if self.at_least else 'most'} {self.limit:g}"


@dataclass(frozen=True, slots=True)
class Report:
    """Figures that are compared with an aim each. `notes` are printed below the table."""

    figures: tuple[Figure, ...]
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return all(figure.passed for figure in self.figures)

    def table(self, title: str) -> Table:
        table = Table(title=title)
        table.add_column("figure")
        table.add_column("measured", justify="right")
        table.add_column("must be")
        table.add_column("verdict")
        table.add_column("facts", style="dim")
        for figure in self.figures:
            facts = ", ".join(f"{name} {value:,.1f}" for name, value in figure.facts.items())
            table.add_row(
                figure.name, f"{figure.measured:,.2f}", figure.bound, mark(figure.passed), facts
            )
        return table


def mark(passed: bool) -> str:
    """Return the verdict in rich's markup."""
    return "[green]pass[/]" if passed else "[bold red]FAIL[/]"


def as_json(value: object) -> Any:
    """Turn a result into plain values, its verdicts included."""
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
    """Write a result, or a dictionary of results, to a file."""
    path.write_text(json.dumps(as_json(value), indent=2) + "\n", "utf-8")
