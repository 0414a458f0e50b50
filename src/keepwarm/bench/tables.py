"""The experiments' results as tables for people."""

from collections import defaultdict

from rich.table import Table

from keepwarm.bench.exp005 import Exp005Result, Form, PathResult
from keepwarm.bench.exp006 import Exp006Result
from keepwarm.bench.figures import FiguresResult
from keepwarm.bench.report import mark


def exp005_table(result: Exp005Result) -> Table:
    """One row for each path and form: the worst over its prompt lengths."""
    caption = (
        f"{result.num_steps:,} steps compared with bare mlx-lm, {result.num_ties} ties; bounds: "
        f"logits {result.bounds.logits:.1e}, KV {result.bounds.kv:.1e}"
    )
    if result.strict_note:
        caption += f"; strict form left out: {result.strict_note}"
    table = Table(title="EXP-005: the same computation", caption=caption)
    for heading in ("form", "path", "prompt tokens", "steps"):
        table.add_column(heading)
    for heading in ("max logits", "max KV", "ties", "verdict"):
        table.add_column(heading, justify="right")
    groups: dict[tuple[Form, str], list[PathResult]] = defaultdict(list)
    for item in result.results:
        groups[item.form, item.path].append(item)
    for (form, path), items in groups.items():
        table.add_row(form.value, path, *_exp005_cells(form, items))
    return table


def problems(result: Exp005Result) -> list[str]:
    failed = [
        f"{item.form.value}, {item.path}, {item.num_prompt_tokens} tokens: {item.problem}"
        for item in result.results
        if item.problem is not None
    ]
    if not result.ties_passed:
        failed.append(f"{result.num_ties} ties in {result.num_steps:,} steps are too many")
    return failed


def exp006_table(result: Exp006Result) -> Table:
    table = Table(
        title="EXP-006: reconstruction (milliseconds)",
        caption="ratio: the median over that of a plain copy of the same bytes",
    )
    for heading in ("blocks x layers", "MB", "what"):
        table.add_column(heading)
    for heading in ("p50", "p95", "p99", "ratio", "verdict"):
        table.add_column(heading, justify="right")
    for item in result.results:
        for name, calls in item.table():
            first = name == "hot"
            table.add_row(
                item.shape if first else "",
                f"{item.nbytes / 1e6:,.0f}" if first else "",
                name,
                *(f"{1e3 * seconds:.2f}" for seconds in (calls.p50_s, calls.p95_s, calls.p99_s)),
                f"{item.gathered_ratio:.2f}" if name == "gathered" else "",
                mark(item.passed) if first else "",
                end_section=name == "plain copy",
            )
    return table


def figures_table(title: str, result: FiguresResult) -> Table:
    table = Table(title=title)
    table.add_column("figure")
    table.add_column("measured", justify="right")
    table.add_column("must be")
    table.add_column("verdict")
    table.add_column("facts", style="dim")
    for figure in result.figures:
        facts = ", ".join(f"{name} {value:,.1f}" for name, value in figure.facts.items())
        table.add_row(
            figure.name, f"{figure.measured:,.2f}", figure.bound, mark(figure.passed), facts
        )
    return table


def _exp005_cells(form: Form, items: list[PathResult]) -> list[str]:
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
