"""The checks before a release, as far as they need neither network nor a build."""

import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "tools" / "release_check.py"))


def test_every_file_names_the_same_version(script: dict[str, Any]) -> None:
    found = script["versions"](ROOT)
    assert len(found) == 3
    assert len(set(found.values())) == 1, found


def test_another_version_is_noticed(script: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "src/keepwarm").mkdir(parents=True)
    (tmp_path / "pyproject.toml").write_text('[project]\nversion = "1.2.0"\n')
    (tmp_path / "src/keepwarm/__init__.py").write_text('__version__ = "1.1.0"\n')
    (tmp_path / "CHANGELOG.md").write_text("## [Unreleased]\n\n## [1.2.1] - 2027-01-01\n")
    found = script["versions"](tmp_path)
    assert list(found.values()) == ["1.2.0", "1.1.0", "1.2.1"]


def test_what_an_archive_lacks_or_should_not_hold_is_named(script: dict[str, Any]) -> None:
    names = ["LICENSE", "src/keepwarm/home.py", "tests/conftest.py", "benchmarks/a.py", "src/b.pyc"]
    assert script["missing"](names, {"LICENSE", "README.md"}) == ["README.md is missing"]
    assert [problem.split()[0] for problem in script["foreign"](names)] == [
        "tests/conftest.py",
        "benchmarks/a.py",
        "src/b.pyc",
    ]


def test_the_package_has_its_page_and_its_marker(script: dict[str, Any]) -> None:
    files = script["package_files"]()
    assert {"keepwarm/web/index.html", "keepwarm/py.typed", "keepwarm/home.py"} <= files
