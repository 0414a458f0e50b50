"""EXP-005, short: every path on a small random model, and some of them on the real one.

What a path does with KV does not depend on the weights, so a model of a few kilobytes takes every
path at every block edge, in both forms. SmolLM2 takes those that leave the memory, the process or
the row. `keepwarm doctor --selftest` has SmolLM2 take every path once, and `make bench` at every
length with 60 tokens each.
"""

from dataclasses import replace
from pathlib import Path

import pytest

from keepwarm import load_model
from keepwarm.bench.exp005 import run_exp005
from keepwarm.bench.exp005_result import Exp005Result, Form
from keepwarm.bench.paths import PATHS
from keepwarm.bench.plan import Plan, full_plan
from keepwarm.core.ports import LoadedModel
from tiny_models import write_tiny_model

pytestmark = pytest.mark.slow

EDGES = (50, 255, 256, 257, 513)
EVERY_PATH = replace(full_plan(lengths=EDGES), long_replies=frozenset({50}))
SOME_PATHS = Plan(
    lengths={"warm": (50,), "after SIGKILL": (321,), "batch of 2": (50, 257)},
    long_replies=frozenset(),
    canary_length=50,
)


@pytest.fixture(scope="module")
def tiny(keepwarm_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Exp005Result:
    folder = write_tiny_model(tmp_path_factory.mktemp("tiny"))
    return run_exp005(load_model(str(folder), home=keepwarm_home), EVERY_PATH)


@pytest.fixture(scope="module")
def tiny_on_mlx(keepwarm_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Exp005Result:
    folder = write_tiny_model(tmp_path_factory.mktemp("tiny"))
    return run_exp005(load_model(str(folder), native=False, home=keepwarm_home), EVERY_PATH)


@pytest.fixture(scope="module")
def real(smollm2: LoadedModel) -> Exp005Result:
    return run_exp005(smollm2, SOME_PATHS)


@pytest.fixture(params=["tiny", "tiny_on_mlx", "real"])
def result(request: pytest.FixtureRequest) -> Exp005Result:
    found: Exp005Result = request.getfixturevalue(request.param)
    return found


@pytest.fixture(params=["tiny", "tiny_on_mlx"])
def every_path(request: pytest.FixtureRequest) -> Exp005Result:
    found: Exp005Result = request.getfixturevalue(request.param)
    return found


def paths_of(result: Exp005Result, form: Form) -> set[str]:
    return {r.path for r in result.results if r.form is form}


def test_every_path_passes(result: Exp005Result) -> None:
    assert result.notes == []
    assert result.passed


@pytest.mark.parametrize("form", [Form.NORMAL, Form.FREE])
def test_every_path_was_compared_with_bare_mlx_lm(every_path: Exp005Result, form: Form) -> None:
    assert paths_of(every_path, form) == {path.name for path in PATHS}


def test_every_path_gave_the_cold_runs_bits(every_path: Exp005Result) -> None:
    if every_path.strict_note:
        pytest.skip(every_path.strict_note)

    assert paths_of(every_path, Form.STRICT) == {path.name for path in PATHS}


def test_the_real_model_took_the_paths_of_its_plan(real: Exp005Result) -> None:
    forms = [Form.NORMAL, Form.FREE, *([] if real.strict_note else [Form.STRICT])]

    assert all(paths_of(real, form) == SOME_PATHS.lengths.keys() for form in forms)


def test_canaries_were_noticed(result: Exp005Result) -> None:
    assert paths_of(result, Form.CANARY) == {
        "KV rounded",
        "one position zeroed",
        "one stale token in the tail",
    }
    canaries = [r for r in result.results if r.form in (Form.CANARY, Form.STRICT_CANARY)]
    assert all(canary.passed for canary in canaries)


def test_the_strict_form_has_canaries_of_its_own(
    tiny: Exp005Result, tiny_on_mlx: Exp005Result
) -> None:
    assert "one value moved by one ulp" in paths_of(tiny, Form.STRICT_CANARY)
    if not tiny_on_mlx.strict_note:
        assert paths_of(tiny_on_mlx, Form.STRICT_CANARY) == {"ordinary shapes"}


def test_some_replies_have_sixty_tokens(tiny: Exp005Result) -> None:
    assert max(r.num_steps for r in tiny.results if r.form is Form.NORMAL) >= 60


def test_the_full_plan_has_every_length_on_every_path_that_can_take_it() -> None:
    plan = full_plan()

    for path in PATHS:
        taken = {length for group in plan.groups(path) for length in group}
        assert taken == {length for length in plan.all_lengths if length >= path.min_tokens}
        assert all(len(group) == path.group_size for group in plan.groups(path))
    assert {plan.num_tokens(length) for length in plan.all_lengths} == {60}
