"""Where state lives."""

from pathlib import Path

import platformdirs
import pytest

from keepwarm.home import keepwarm_home


def test_the_environment_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEEPWARM_HOME", "~/elsewhere")

    assert keepwarm_home() == Path.home() / "elsewhere"


@pytest.mark.parametrize("value", ["", None])
def test_else_the_platforms_folder(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if value is None:
        monkeypatch.delenv("KEEPWARM_HOME", raising=False)
    else:
        monkeypatch.setenv("KEEPWARM_HOME", value)

    assert keepwarm_home() == platformdirs.user_data_path("keepwarm", appauthor=False)
