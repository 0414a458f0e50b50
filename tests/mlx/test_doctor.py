"""`keepwarm doctor` names each finding with its remedy."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from keepwarm.cli import doctor
from keepwarm.cli.doctor import Status, examine
from keepwarm.cli.main import app
from keepwarm.native.library import Missing
from native_steps import require_native
from tiny_models import write_tiny_model


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


def findings_of(home: Path) -> dict[str, doctor.Finding]:
    return {finding.name: finding for finding in examine(home)}


def test_without_a_native_step_it_says_what_to_install(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = Missing("it was not compiled", "Install g++")
    monkeypatch.setattr("keepwarm.native.library.library", lambda: gone)
    monkeypatch.setattr("keepwarm.mlx_backend.loading.native.library", lambda: gone)
    monkeypatch.setenv("KEEPWARM_MODEL_NAME", str(write_tiny_model(home / "tiny")))

    findings = findings_of(home)

    step = findings["native step"]
    assert (step.status, step.remedy) == (Status.WARNING, "Install g++")
    assert step.detail == "none: it was not compiled"
    computes = findings[f"computes {home / 'tiny'}"]
    assert computes.detail == "MLX; no native step: it was not compiled. Install g++"


def test_it_says_how_the_models_of_the_settings_are_computed(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    native = require_native()
    llama, gemma = write_tiny_model(home / "llama"), write_tiny_model(home / "gemma", "gemma")
    (home / "keepwarm.toml").write_text(
        f'[model]\nname = "{llama}"\n[models.odd]\nsource = "{gemma}"\n'
        f'[models.left]\nsource = "{llama}"\nnative = false\n[models.absent]\nsource = "/no"\n'
    )
    monkeypatch.chdir(home)

    said = {
        name.removeprefix("computes "): finding.detail
        for name, finding in findings_of(home).items()
        if name.startswith("computes ")
    }

    assert said[str(llama)] == f"the native step ({native.target}), KV in float16"
    assert said["odd"].startswith("MLX; no native step: it has a norm")
    assert said["left"] == "MLX; no native step: it is switched off by the setting `native`"
    assert "absent" not in said


def test_wrong_settings_are_a_finding(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEEPWARM_MODEL_KV_DTYPE", "int3")

    finding = findings_of(home)["settings"]

    assert finding.status is Status.ERROR
    assert "model.kv_dtype: must be empty or one of float16, float32" in finding.detail
