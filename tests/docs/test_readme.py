"""What the documentation names exists, and the README's example runs."""

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import typer

from keepwarm.cli.main import app

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def _leads_somewhere(link: str, page: Path) -> bool:
    path, _, anchor = link.partition("#")
    target = page.parent / path if path else page
    return target.exists() and (not anchor or anchor in _anchors(target))


def _anchors(page: Path) -> set[str]:
    """Headings as hosting sites turn them into anchors: lower case, hyphens for spaces."""
    headings = re.findall(r"^#+ (.*)", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text())
    assert not [link for link in links if not _leads_somewhere(link, page)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_that_is_named_exists(page: Path) -> None:
    group: Any = typer.main.get_command(app)
    named = set(re.findall(r"`keepwarm ([a-z]+)", page.read_text()))
    assert named <= set(group.commands)


@pytest.mark.parametrize("page", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_every_file_that_is_named_exists(page: str) -> None:
    package = ROOT / "src" / "keepwarm"
    of_package = {str(path.relative_to(package)) for path in package.rglob("*.py")}
    named = set(re.findall(r"\b([a-z0-9_/]+\.py)\b", (ROOT / page).read_text()))
    assert len(named) > 10
    names = {path.rpartition("/")[2] for path in of_package}
    assert {name for name in named if "/" not in name} <= names
    paths = {name for name in named if "/" in name} - of_package
    assert not [path for path in paths if not (ROOT / path).exists()]


def test_the_page_of_files_names_every_file_of_the_package() -> None:
    """`make file-map` writes it."""
    script = runpy.run_path(str(ROOT / "tools" / "file_map.py"))
    assert script["page"]() == (ROOT / "docs" / "files.md").read_text()


@pytest.mark.slow
@pytest.mark.usefixtures("keepwarm_home")
def test_the_readme_example_runs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlx.core")
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    scope: dict[str, Any] = {}
    exec(compile(example, "README.md", "exec"), scope)  # noqa: S102 - it is our own page
    assert "Completed(request_id='req-1', agent_id='ada'" in capsys.readouterr().out
    engine = scope["engine"]
    while engine.has_work:
        events = engine.step()
    assert events[-1].cache.tier == "hot"
    assert events[-1].durable
    scope["store"].close()
