"""docs/benchmarks.md lists every benchmark, with the question that its command answers."""

import re
from collections.abc import Sequence
from pathlib import Path

import pytest

pytest.importorskip("mlx.core")

from benchmarks.table import BENCHMARKS as OF_MAINTAINERS
from keepwarm.bench.paths import PATHS
from keepwarm.cli.bench import BENCHMARKS as OF_USERS
from keepwarm.cli.benchmark import Benchmark

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks.md"


@pytest.mark.parametrize(
    ("command", "benchmarks"),
    [("keepwarm bench", OF_USERS), ("python -m benchmarks", OF_MAINTAINERS)],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_benchmark_is_listed_with_its_question(
    command: str, benchmarks: Sequence[Benchmark]
) -> None:
    rows = re.findall(
        rf"^\| `{command} ([a-z]+)` \| ([^|]+) \|", PAGE.read_text("utf-8"), re.MULTILINE
    )
    assert rows[:-1] == [(benchmark.name, benchmark.question) for benchmark in benchmarks]
    assert rows[-1][0] == "all"


def test_every_benchmark_has_a_section() -> None:
    text = PAGE.read_text("utf-8")
    headings = set(re.findall(r"^## `(?:keepwarm bench|benchmarks) ([a-z]+)`", text, re.MULTILINE))
    assert headings == {benchmark.name for benchmark in (*OF_USERS, *OF_MAINTAINERS)}


def test_every_path_of_exp005_is_explained() -> None:
    section = PAGE.read_text("utf-8").partition("| path | what happened")[2].partition("\n\n")[0]
    words = set(
        re.findall(r"\w+", " ".join(line.split("|")[1] for line in section.splitlines()[1:]))
    )
    missing = [path.name for path in PATHS if not set(re.findall(r"\w+", path.name)) <= words]
    assert not missing
