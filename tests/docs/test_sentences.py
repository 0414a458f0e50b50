"""Docstrings and pages avoid the forms that cost a reader a second reading."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(
    path
    for folder in ("src", "benchmarks", "tools", "tests/helpers")
    for path in (ROOT / folder).rglob("*.py")
)
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])

STARTS = re.compile(r"(Of|The same)\b")
"""Openings that leave out what the sentence is about."""
VAGUE = re.compile(r"\b(somebody|nobody|whoever|so many)\b", re.IGNORECASE)
"""Words that stand where a noun should: the client, the agent, the caller, how many."""
NO_VERB = re.compile(
    r"(A|All|An|As|By|Each|Every|For|How|In|It|Its|No|None|Of|One|Raises|The|They|This|Those|What|When"
    r"|Where|Which|Who|Why|With)\b"
)
"""What a function's docstring does not begin with: it says what the function does."""
HELP = frozenset({"A local LLM server on MLX in which every agent keeps its memory warm."})
"""Docstrings that typer shows to people."""
AT_LEAST = 2000
"""The number of docstrings below which this test would not be looking at the code any more."""


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """Yield each docstring's line and text; those under constants and fields count as well."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            yield node.lineno, node.value.value


def complaints(place: str, text: str) -> list[str]:
    """Say what is wrong with one text; empty where nothing is."""
    found = [f"{place}: begins with {start[0]!r}" for start in [STARTS.match(text)] if start]
    return found + [f"{place}: says {word!r}" for word in VAGUE.findall(text)]


def functions(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the line and the docstring of each function and method, but for properties."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
            text = ast.get_docstring(node)
            if text and text not in HELP and not decorators & {"property", "cached_property"}:
                yield node.lineno, text


def test_a_functions_docstring_begins_with_a_verb() -> None:
    source = [path for path in FILES if "tests" not in path.relative_to(ROOT).parts]
    texts = [(f"{path.relative_to(ROOT)}:{n}", t) for path in source for n, t in functions(path)]
    assert len(texts) > AT_LEAST // 2
    assert not [f"{place}: {text}" for place, text in texts if NO_VERB.match(text)]


def test_docstrings() -> None:
    texts = [(f"{path.relative_to(ROOT)}:{n}", t) for path in FILES for n, t in docstrings(path)]
    assert len(texts) > AT_LEAST
    assert not [problem for place, text in texts for problem in complaints(place, text)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages(page: Path) -> None:
    paragraphs = page.read_text("utf-8").split("\n\n")
    assert not [problem for text in paragraphs for problem in complaints(page.name, text.lstrip())]


@pytest.mark.parametrize(
    ("text", "num_complaints"),
    [
        ("Of lines that run, what they had.", 1),
        ("The same for models.", 1),
        ("Offer the blocks to the store.", 0),
        ("Return the same line. Often it is hot.", 0),
        ("Whoever asks, and nobody else", 2),
        ("Wait for so many bytes.", 1),
    ],
)
def test_what_counts(text: str, num_complaints: int) -> None:
    assert len(complaints("here", text)) == num_complaints
