"""One process with SmolLM2 is killed while it decodes; its agents go on as if nothing had been."""

from pathlib import Path

import pytest

from benchmarks.chaos.benchmark import run_chaos
from benchmarks.chaos.plan import ChaosPlan

pytestmark = pytest.mark.slow


def test_a_kill_on_smollm2_loses_nothing(keepwarm_home: Path) -> None:
    result = run_chaos(ChaosPlan(num_kills=1, num_model_kills=1, seed=0))
    shown = "\n".join([*(f"{f.name}: {f.measured}" for f in result.figures), *result.notes])
    assert result.passed, shown
