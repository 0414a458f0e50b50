"""docs/configuration.md says of every setting what the code says, and of nothing else."""

import re
import tomllib
from pathlib import Path

import pytest

from keepwarm.config import (
    OTHER_VARIABLES,
    SECTIONS,
    all_settings,
    default_of,
    load_settings,
    variable_of,
)

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"
ROW = re.compile(r"\| `([a-z_]+)` \| `(KEEPWARM_[A-Z_]+)` \| `([^`]*)` \| (.+) \|")


def documented() -> dict[str, tuple[str, str, str]]:
    """By `section.key`: variable, default and meaning."""
    rows: dict[str, tuple[str, str, str]] = {}
    section = ""
    for line in PAGE.read_text("utf-8").splitlines():
        if line.startswith("## "):
            section = line.removeprefix("## ")
        elif found := ROW.fullmatch(line):
            key, *rest = found.groups()
            assert f"{section}.{key}" not in rows
            rows[f"{section}.{key}"] = (rest[0], rest[1], rest[2])
    return rows


def test_every_setting_is_documented_and_nothing_else_in_the_same_order() -> None:
    assert list(documented()) == [name for name, _ in all_settings()]


@pytest.mark.parametrize("name", [name for name, _ in all_settings()])
def test_variable_default_and_meaning(name: str) -> None:
    variable, default, meaning = documented()[name]
    assert variable == variable_of(name)
    assert len(meaning) > 10
    value = tomllib.loads(f"x = {default}")["x"]
    settings = load_settings({name: value}, environment={})
    section, _, key = name.partition(".")
    assert getattr(getattr(settings, section), key) == default_of(dict(all_settings())[name])


def test_flags_that_are_named_exist() -> None:
    from typer.testing import CliRunner

    from keepwarm.cli.main import app

    text = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "200"}).output
    named = set(re.findall(r"Flag: `(--[a-z]+)`", PAGE.read_text("utf-8")))
    assert len(named) == 5
    assert all(flag in text for flag in named)


def test_the_other_variables() -> None:
    named = set(re.findall(r"^\| `(KEEPWARM_[A-Z_]+)` \| ", PAGE.read_text("utf-8"), re.MULTILINE))
    assert named == OTHER_VARIABLES


def test_the_example_loads(tmp_path: Path) -> None:
    (example,) = re.findall(r"```toml\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    path = tmp_path / "keepwarm.toml"
    path.write_text(example, "utf-8")
    settings = load_settings(config_file=path, environment={})
    assert settings.memory.budget_bytes == 24 << 30
    assert settings.server.api_keys["ada"] == "and another one here"
    assert tomllib.loads(example).keys() <= SECTIONS.keys()
