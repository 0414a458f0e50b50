"""`keepwarm doctor --selftest`: the experiments as findings."""

from dataclasses import replace

import pytest

import keepwarm
from keepwarm.bench import selftest
from keepwarm.bench.compare import FLOAT32_BOUNDS
from keepwarm.bench.exp005_result import Exp005Result, Form, PathResult
from keepwarm.bench.exp006 import Shape, Sizes, run_exp006
from keepwarm.bench.selftest import SelftestResult
from keepwarm.cli.doctor import Status, self_tested

GOOD = PathResult(Form.NORMAL, "hot", 50, None, num_steps=60, max_logits=1e-4, max_kv=2e-5)


def a_result(*results: PathResult) -> SelftestResult:
    tiny = Sizes((Shape.of(1, 2, dtype="float32"),), num_warm_ups=1, num_calls=2)
    return SelftestResult(Exp005Result(FLOAT32_BOUNDS, results, ""), run_exp006(tiny))


def findings_of(monkeypatch: pytest.MonkeyPatch, result: SelftestResult) -> dict[str, Status]:
    monkeypatch.setattr(selftest, "run_selftest", lambda *_: result)
    monkeypatch.setattr(keepwarm, "load_model", lambda _: None)
    return {finding.name: finding.status for finding in self_tested("smollm2")}


def test_what_passes_is_ok(monkeypatch: pytest.MonkeyPatch) -> None:
    assert findings_of(monkeypatch, a_result(GOOD)) == {
        "same computation": Status.OK,
        "reconstruction": Status.OK,
    }


def test_a_path_that_fails_is_an_error_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    result = a_result(GOOD, replace(GOOD, path="warm", problem="KV differs"))

    assert findings_of(monkeypatch, result)["same computation"] is Status.ERROR
    assert "warm" in result.computation_detail


def test_too_many_ties_fail() -> None:
    assert not a_result(replace(GOOD, num_ties=1)).computation_passed
