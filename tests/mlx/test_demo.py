"""`keepwarm demo`: every agent speaks four times, the last time after its process was killed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mlx_lm")

pytestmark = pytest.mark.slow


def test_agents_go_on_after_their_process_was_killed(keepwarm_home: Path) -> None:
    command = [sys.executable, "-m", "keepwarm.cli.main", "demo"]

    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)

    assert done.returncode == 0, done.stderr
    assert "killed with SIGKILL" in done.stdout
    row = re.compile(r"^ *(\w+) +(\d) +(none|warm|hot|cold) +(\d+) +(\d+)", re.MULTILINE)
    rows = row.findall(done.stdout)
    tiers = {(agent, int(turn)): tier for agent, turn, tier, _, _ in rows}
    assert len(rows) == 12
    for agent in ("archivist", "keeper", "writer"):
        assert [tiers[agent, turn] for turn in (2, 3, 4)] == ["hot", "warm", "cold"]
    assert all(int(cached) >= 512 for _, turn, _, _, cached in rows if turn == "4")
