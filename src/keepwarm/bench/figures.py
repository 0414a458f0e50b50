"""Measured figures, each beside what it must reach."""

from dataclasses import dataclass, field


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
class FiguresResult:
    figures: tuple[Figure, ...]
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return all(figure.passed for figure in self.figures)
