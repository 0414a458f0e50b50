"""A seeded tenth of the campaign of hang-ups, against a server in a process of its own."""

import pytest

from benchmarks.attack.hangups import MANY_TOKENS, HangUpPlan, run
from benchmarks.server.process import STEP_S

pytestmark = pytest.mark.slow

PATIENCE_S = 100.0


@pytest.mark.parametrize("seed", [1, 2])
def test_nothing_is_left(seed: int) -> None:
    """Waits for conditions; what is still there in the end would have run on for longer."""
    assert PATIENCE_S < MANY_TOKENS * STEP_S
    result = run(plan=HangUpPlan(num_rounds=1, bound_s=PATIENCE_S, seed=seed))
    left, _ = result.figures
    assert left.facts["hung_up"] == 650
    assert left.measured == 0, result.notes
