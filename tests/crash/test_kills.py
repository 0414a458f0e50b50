"""Twenty kills behind acknowledgements; `benchmarks.attack.kills` has the long campaign."""

import pytest

from benchmarks.attack.kills import KillPlan, run

pytestmark = pytest.mark.slow


def test_what_was_acknowledged_is_there_after_a_kill() -> None:
    result = run(KillPlan(num_kills=20, seed=11))
    assert result.passed, "\n".join(
        [*(f"{figure.name}: {figure.measured:g}" for figure in result.figures), *result.notes]
    )
    acknowledged = result.figures[1].facts
    assert set(acknowledged) >= {"create", "delete", "fork", "rollback", "settings", "turn"}
