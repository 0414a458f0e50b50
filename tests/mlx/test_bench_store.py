"""`python -m benchmarks store`, quick: all of it is measured, and what no speed changes holds."""

from dataclasses import replace

import pytest

from benchmarks.store.benchmark import QUICK, run_store
from keepwarm.bench.report import Figure
from keepwarm.core.ports import LoadedModel

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def figures(smollm2: LoadedModel) -> tuple[Figure, ...]:
    plan = replace(QUICK(), num_agents=100)
    return run_store(smollm2, plan).figures


def named(figures: tuple[Figure, ...], word: str) -> list[Figure]:
    return [figure for figure in figures if word in figure.name]


@pytest.mark.parametrize(
    ("word", "num_figures"),
    [
        ("restore of", 1),
        ("TTFT", 1),
        ("bytes written over KV made", 2),
        ("opening a home", 1),
        ("plan of 10 blocks", 1),
        ("load of an agent", 1),
        ("decode step", 1),
        ("over its budget", 1),
        ("a turn's commit", 3),
    ],
)
def test_all_figures_are_there(figures: tuple[Figure, ...], word: str, num_figures: int) -> None:
    assert len(named(figures, word)) == num_figures
    assert all(figure.measured > 0 and figure.facts for figure in named(figures, word))


def test_a_chat_writes_little_more_than_its_kv(figures: tuple[Figure, ...]) -> None:
    for figure in named(figures, "bytes written over KV made"):
        assert figure.passed
        assert figure.measured > 1, "KV was left out, or counted too high"
        assert figure.facts["catalogue_mb"] > 0


def test_the_folder_stays_within_its_budget(figures: tuple[Figure, ...]) -> None:
    (figure,) = named(figures, "over its budget")

    assert figure.passed
    assert figure.facts["evicted_mb"] > 0
    assert figure.facts["samples"] > 1
