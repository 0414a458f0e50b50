"""What EXP-005 found: each path's differences from bare mlx-lm, and the verdict."""

from collections import defaultdict
from dataclasses import dataclass
from enum import StrEnum

from rich.table import Table

from keepwarm.bench.compare import Bounds
from keepwarm.bench.report import mark

MAX_TIE_SHARE = 0.001


class Form(StrEnum):
    """What a path's recording is compared with."""

    NORMAL = "normal"
    FREE = "free-running"
    STRICT = "strict"
    ROUND_TRIP = "round trip"
    CANARY = "canary"
    STRICT_CANARY = "strict canary"


@dataclass(frozen=True, slots=True)
class PathResult:
    """One reply by one path. `problem` says why it failed; a canary fails by passing unnoticed."""

    form: Form
    path: str
    num_prompt_tokens: int
    problem: str | None
    num_steps: int = 0
    max_logits: float = 0.0
    max_kv: float = 0.0
    num_ties: int = 0

    @property
    def passed(self) -> bool:
        return self.problem is None


@dataclass(frozen=True, slots=True)
class Exp005Result:
    """The replies of all paths.

    `strict_note` says why the strict form was left out where equal bits cannot be promised.
    """

    bounds: Bounds
    results: tuple[PathResult, ...]
    strict_note: str

    @property
    def num_steps(self) -> int:
        return sum(r.num_steps for r in self.results if r.form is Form.NORMAL)

    @property
    def num_ties(self) -> int:
        return sum(r.num_ties for r in self.results if r.form is Form.NORMAL)

    @property
    def ties_passed(self) -> bool:
        return self.num_ties <= MAX_TIE_SHARE * self.num_steps

    @property
    def passed(self) -> bool:
        return self.ties_passed and all(result.passed for result in self.results)

    @property
    def notes(self) -> list[str]:
        failed = [
            f"{item.form.value}, {item.path}, {item.num_prompt_tokens} tokens: {item.problem}"
            for item in self.results
            if item.problem is not None
        ]
        if not self.ties_passed:
            failed.append(f"{self.num_ties} ties in {self.num_steps:,} steps are too many")
        return failed

    def table(self, title: str) -> Table:
        """Return a row for each path and form: the worst over its prompt lengths."""
        caption = (
            f"{self.num_steps:,} steps compared with bare mlx-lm, {self.num_ties} ties; bounds: "
            f"logits {self.bounds.logits:.1e}, KV {self.bounds.kv:.1e}"
        )
        if self.strict_note:
            caption += f"; strict form left out: {self.strict_note}"
        table = Table(title=title, caption=caption)
        for heading in ("form", "path", "prompt tokens", "steps"):
            table.add_column(heading)
        for heading in ("max logits", "max KV", "ties", "verdict"):
            table.add_column(heading, justify="right")
        groups: dict[tuple[Form, str], list[PathResult]] = defaultdict(list)
        for item in self.results:
            groups[item.form, item.path].append(item)
        for (form, path), items in groups.items():
            table.add_row(form.value, path, *_cells(form, items))
        return table


def _cells(form: Form, items: list[PathResult]) -> list[str]:
    has_numbers = form in (Form.NORMAL, Form.FREE, Form.CANARY)
    lengths = sorted({item.num_prompt_tokens for item in items})
    return [
        " ".join(map(str, lengths)),
        str(sum(item.num_steps for item in items)),
        f"{max(item.max_logits for item in items):.1e}" if has_numbers else "bits",
        f"{max(item.max_kv for item in items):.1e}" if has_numbers else "bits",
        str(sum(item.num_ties for item in items)) if has_numbers else "",
        mark(all(item.passed for item in items)),
    ]
