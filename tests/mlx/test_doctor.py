"""`keepwarm doctor` names each finding with its remedy."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from keepwarm.cli import doctor
from keepwarm.cli.doctor import Status, examine
from keepwarm.cli.main import app


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KEEPWARM_HOME", str(tmp_path))
    return tmp_path


def test_json_names_every_finding(home: Path) -> None:
    result = CliRunner().invoke(app, ["doctor", "--json"])

    findings = {finding["name"]: finding for finding in json.loads(result.stdout)}
    assert {"versions", "device", "memory", "home", "model"} <= findings.keys()
    assert str(home) in findings["home"]["detail"]


def test_people_get_a_table(home: Path) -> None:
    result = CliRunner().invoke(app, ["doctor"])

    assert result.exit_code == 0
    assert "smollm2" in result.stdout


def test_whatever_is_wrong_has_a_remedy(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda dist: None)
    monkeypatch.setattr(doctor, "_available_bytes", lambda: 1)
    monkeypatch.setattr(doctor, "_ENOUGH_DISK_BYTES", 1 << 60)
    dist = "keepwarm.mlx_backend.loading.embedded_model.EMBEDDED_DIST"
    monkeypatch.setattr(dist, "no-such-package-here")

    wrong = [finding for finding in examine(home) if finding.status is not Status.OK]

    assert {"versions", "memory", "home", "model"} <= {finding.name for finding in wrong}
    assert all(finding.remedy for finding in wrong)


def test_an_error_shows_in_the_exit_code(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda dist: None)

    assert CliRunner().invoke(app, ["doctor"]).exit_code == 1


def test_brackets_in_a_remedy_are_printed(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda dist: None)

    assert "keepwarm[cpu]" in CliRunner().invoke(app, ["doctor"]).stdout
