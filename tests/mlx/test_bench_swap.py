"""`python -m benchmarks swap`, quick: all of it is measured, and what no speed changes holds."""

from pathlib import Path

import mlx.core as mx
import pytest

from benchmarks.swap.benchmark import QUICK, run_swap
from benchmarks.swap.house import ModelPair
from keepwarm.bench.report import Figure, Report
from tiny_models import write_tiny_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def result(keepwarm_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Report:
    model = write_tiny_model(tmp_path_factory.mktemp("models") / "tiny", seed=1)
    return run_swap(str(model), QUICK())


def named(result: Report, word: str) -> Figure:
    (figure,) = (figure for figure in result.figures if word in figure.name)
    return figure


def test_times_are_measured(result: Report) -> None:
    swap = named(result, "over a bare load")
    assert swap.facts["swap_ms"] > swap.facts["load_ms"] > 0
    assert swap.facts["bare_ms"] > 0
    assert named(result, "TTFT").measured > 0


def test_nothing_is_left_of_a_model(result: Report) -> None:
    figure = named(result, "active memory")
    assert figure.passed, figure
    assert figure.facts["weights_mb"] > 0


def test_every_client_gets_its_own_models_answers(result: Report) -> None:
    figure = named(result, "lost or answered wrongly")
    assert figure.passed, result.notes
    assert figure.facts["requests"] >= 8
    assert figure.facts["swaps"] > 1


def test_the_other_model_has_other_weights_of_the_same_shapes(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "tiny", dtype=mx.float16, quantise_bits=4)
    pair = ModelPair.beside(str(model), tmp_path / "other", seed=3)
    again = ModelPair.beside(str(model), tmp_path / "again", seed=3)

    before, after, same = (
        mx.load(str(folder / "model.safetensors")) for folder in (model, pair.other, again.other)
    )
    assert {name: (a.dtype, a.shape) for name, a in before.items()} == {
        name: (a.dtype, a.shape) for name, a in after.items()
    }
    changed = {name for name, a in before.items() if not mx.array_equal(a, after[name])}
    assert changed == {name for name, a in before.items() if a.dtype == mx.float16}
    assert all(mx.array_equal(after[name], same[name]) for name in after)
