"""The `keepwarm` command."""

import pytest
from typer.testing import CliRunner

import keepwarm
from keepwarm.cli import main
from keepwarm.core.errors import ModelLoadError


def test_help_names_the_commands() -> None:
    result = CliRunner().invoke(main.app, ["--help"])

    assert result.exit_code == 0
    assert "doctor" in result.stdout


def test_the_version() -> None:
    result = CliRunner().invoke(main.app, ["--version"])

    assert (result.exit_code, result.stdout) == (0, f"keepwarm {keepwarm.__version__}\n")


def test_an_error_that_is_raised_on_purpose_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing() -> None:
        raise ModelLoadError("model", "it is gone", "Fetch it again")

    monkeypatch.setattr(main, "app", failing)
    with pytest.raises(SystemExit) as caught:
        main.main()

    assert caught.value.code == 1
    assert capsys.readouterr().err == "keepwarm: model: it is gone. Fetch it again\n"
