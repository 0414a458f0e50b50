"""EXP-005 on the real model, short: every path computes the same, and damage is noticed."""

import pytest

from keepwarm.bench.exp005 import Exp005Result, Form, run_exp005
from keepwarm.bench.paths import PATHS
from keepwarm.bench.plan import full_plan, quick_plan
from keepwarm.bench.tables import problems
from keepwarm.core.ports import LoadedModel

pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def result(smollm2: LoadedModel) -> Exp005Result:
    return run_exp005(smollm2, quick_plan())


def test_every_path_passes(result: Exp005Result) -> None:
    assert problems(result) == []
    assert result.passed


@pytest.mark.parametrize("form", [Form.NORMAL, Form.FREE])
def test_every_path_was_compared_with_bare_mlx_lm(result: Exp005Result, form: Form) -> None:
    assert {path.name for path in PATHS} == {r.path for r in result.results if r.form is form}


def test_every_path_gave_the_cold_runs_bits(result: Exp005Result) -> None:
    if result.strict_note:
        pytest.skip(result.strict_note)

    assert {path.name for path in PATHS} == {
        r.path for r in result.results if r.form is Form.STRICT
    }


def test_canaries_were_noticed(result: Exp005Result) -> None:
    canaries = {r.path: r.passed for r in result.results if r.form is Form.CANARY}

    assert canaries == {
        "KV rounded": True,
        "one position zeroed": True,
        "one stale token in the tail": True,
        "ordinary shapes": True,
    }


def test_some_replies_have_sixty_tokens(result: Exp005Result) -> None:
    assert max(r.num_steps for r in result.results if r.form is Form.NORMAL) >= 60


def test_the_full_plan_has_every_length_on_every_path_that_can_take_it() -> None:
    plan = full_plan()

    for path in PATHS:
        taken = {length for group in plan.groups(path) for length in group}
        assert taken == {length for length in plan.all_lengths if length >= path.min_tokens}
        assert all(len(group) == path.group_size for group in plan.groups(path))
    assert {plan.num_tokens(length) for length in plan.all_lengths} == {60}
