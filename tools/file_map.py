"""Write docs/files.md: every module beside the first line of its docstring."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "keepwarm"
BENCHMARKS = ROOT / "benchmarks"
PAGE = ROOT / "docs" / "files.md"

INTRODUCTION = """\
# Every file, and what is in it

Each module's first sentence, as `make file-map` copies it; a test compares.
[architecture.md](architecture.md) tells how a request travels through them.

```
"""

BESIDE = """
`benchmarks/`, beside `src` and not in the wheel:

```
"""


def page() -> str:
    shipped, beside = ("\n".join(_lines(root, depth=0)) for root in (PACKAGE, BENCHMARKS))
    return f"{INTRODUCTION}{shipped}\n```\n{BESIDE}{beside}\n```\n"


def _lines(folder: Path, depth: int) -> Iterator[str]:
    indent = "  " * depth
    for path in sorted(folder.glob("*.py")):
        if path.name != "__init__.py":
            yield f"{indent}{path.name:<22} {_summary(path)}"
    for path in sorted(folder.iterdir()):
        if (path / "__init__.py").exists():
            yield f"{indent}{path.name + '/':<22} {_summary(path / '__init__.py')}".rstrip()
            yield from _lines(path, depth + 1)


def _summary(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    return docstring.partition("\n")[0]


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
