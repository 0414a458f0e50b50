"""`keepwarm bench`: tables for people, JSON for scripts, the verdict as the exit code."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from keepwarm.bench import batch, exp006, resume
from keepwarm.bench.prompts import prompt_ids
from keepwarm.bench.report import Figure, Report
from keepwarm.cli import benchmark
from keepwarm.cli.main import app
from keepwarm.core.ports import LoadedModel

FAST = Figure("fast enough", 1.0, 1.1, facts={"ours_ms": 1.0})
SLOW = Figure("too slow", 0.5, 0.95, at_least=True)


@pytest.fixture(autouse=True)
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "_loaded", lambda model: None)


def figures_are(monkeypatch: pytest.MonkeyPatch, *measured: Figure) -> None:
    monkeypatch.setattr(resume, "run_resume", lambda *_: Report(measured))


def test_figures_that_hold_exit_with_0(monkeypatch: pytest.MonkeyPatch) -> None:
    figures_are(monkeypatch, FAST)

    result = CliRunner().invoke(app, ["bench", "resume", "--quick"])

    assert result.exit_code == 0, result.output
    assert "fast enough" in result.stdout


def test_a_figure_that_fails_exits_with_1(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    figures_are(monkeypatch, FAST, SLOW)
    file = tmp_path / "figures.json"

    result = CliRunner().invoke(app, ["bench", "resume", "--quick", "--json", str(file)])

    assert result.exit_code == 1
    measured = json.loads(file.read_text())["resume"]
    assert measured["passed"] is False
    assert [figure["passed"] for figure in measured["figures"]] == [True, False]
    assert measured["figures"][0]["facts"] == {"ours_ms": 1.0}


def test_reconstruct_needs_no_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tiny = exp006.Sizes((exp006.Shape.of(1, 2, dtype="float32"),), num_warm_ups=1, num_calls=3)
    monkeypatch.setattr(exp006, "QUICK_SIZES", tiny)
    file = tmp_path / "exp006.json"

    result = CliRunner().invoke(app, ["bench", "reconstruct", "--quick", "--json", str(file)])

    assert result.exit_code == 0, result.output
    (shape,) = json.loads(file.read_text())["reconstruct"]["results"]
    assert shape["shape"] == "1x2"
    assert shape["passed"] is True


def test_a_limit_is_the_most_or_the_least() -> None:
    assert Figure("ratio", 1.1, 1.1).passed
    assert not Figure("ratio", 1.11, 1.1).passed
    assert Figure("speed", 0.95, 0.95, at_least=True).passed
    assert Report((FAST, SLOW)).passed is False


def test_agents_that_share_a_prefix_share_its_bytes(smollm2: LoadedModel) -> None:
    assert batch.shared_bytes(smollm2, batch.BatchPlan(shared_tokens=256)).passed


def test_the_seed_decides_a_prompt(smollm2: LoadedModel) -> None:
    tokenizer = smollm2.tokenizer

    assert prompt_ids(tokenizer, 300, seed=1) == prompt_ids(tokenizer, 300, seed=1)
    assert prompt_ids(tokenizer, 300, seed=1)[:40] != prompt_ids(tokenizer, 300, seed=2)[:40]
    assert len(prompt_ids(tokenizer, 6000, seed=1)) == 6000
