"""The `keepwarm` command."""

import os
import sys
import threading

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
    monkeypatch.setattr(main, "_leave", sys.exit)  # another test's thread may still run
    with pytest.raises(SystemExit) as caught:
        main.main()

    assert caught.value.code == 1
    assert capsys.readouterr().err == "keepwarm: model: it is gone. Fetch it again\n"


@pytest.mark.parametrize(("is_given_up", "ends"), [(True, ["at once 3"]), (False, ["exit 3"])])
def test_a_thread_that_was_given_up_is_not_finalised(
    monkeypatch: pytest.MonkeyPatch, *, is_given_up: bool, ends: list[str]
) -> None:
    """It may be inside a library that aborts when it comes back to an interpreter that ends."""
    may_end = threading.Event()
    name = "keepwarm-load" if is_given_up else "of another library"
    thread = threading.Thread(target=may_end.wait, name=name, daemon=True)
    seen: list[str] = []

    def stopped() -> None:
        raise SystemExit(3)

    def leave_at_once(code: int) -> None:
        seen.append(f"at once {code}")

    monkeypatch.setattr(main, "app", stopped)
    monkeypatch.setattr(os, "_exit", leave_at_once)
    # Other tests in this process may have left threads of ours.
    monkeypatch.setattr(threading, "enumerate", lambda: [threading.main_thread(), thread])
    thread.start()
    with pytest.raises(SystemExit) as caught:
        main.main()
    may_end.set()
    thread.join()
    assert (seen or [f"exit {caught.value.code}"]) == ends
