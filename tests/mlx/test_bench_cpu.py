"""`python -m benchmarks cpu` on a tiny model: all cases are computed, and llama.cpp is optional."""

from pathlib import Path

import pytest

from benchmarks.cpu import benchmark
from benchmarks.cpu.benchmark import Case, CpuPlan, run_cpu
from keepwarm.bench.report import Report
from keepwarm.native.library import Missing, library
from native_steps import report_missing
from tiny_models import write_tiny_model

PLAN = CpuPlan(
    num_rounds=1,
    num_steps=2,
    cases=(
        Case((8,), 1.5, 7.0),
        Case((8, 8, 20), None, 4.5),
        Case((30,), 1.5, 2.8, is_prefill=True),
        Case((16,), 1.5),
    ),
)


@pytest.fixture(scope="module")
def result(keepwarm_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Report:
    if isinstance(found := library(), Missing):
        report_missing(f"benchmarks cpu is NOT run: {found.reason}")
    model = write_tiny_model(tmp_path_factory.mktemp("models") / "tiny", seed=1)
    return run_cpu(str(model), PLAN)


def test_cases_with_an_aim_are_measured_beside_mlx(result: Report) -> None:
    assert [figure.name for figure in result.figures] == [
        "decode, 1 at 8 tokens: as fast as MLX, times",
        "decode, 3 at 8 to 20 tokens: as fast as MLX, times",
        "prefill of 30 tokens: as fast as MLX, times",
    ]
    for figure in result.figures:
        times = [figure.facts["native step ms"], figure.facts["MLX ms"]]
        assert min(times) > 0.0
        assert figure.measured == pytest.approx(times[1] / times[0])


def test_llama_is_left_out_of_other_models(result: Report) -> None:
    assert "only smollm2 is there as GGUF" in result.notes[1]


def test_what_llama_needs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "find_spec", lambda name: None)
    (note,) = benchmark._why_no_llama("smollm2")
    assert "pip install xllamacpp gguf" in note
