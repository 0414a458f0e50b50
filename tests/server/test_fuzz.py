"""Requests made of the server's own description: a few hundred of the long run of `bench http`."""

from pathlib import Path

import pytest

from benchmarks.server.fuzz import AGENTS, run_fuzz
from doors import check_is_empty
from servers import fake_server

pytest.importorskip("mlx.core")

pytestmark = pytest.mark.slow

NUM_REQUESTS = 250


@pytest.mark.parametrize("seed", [1, 2])
def test_whatever_comes_is_answered(tmp_path: Path, seed: int) -> None:
    with fake_server(tmp_path, server__deadline_s=5.0) as server, server.client() as client:
        for agent in AGENTS:
            client.put(f"/v1/agents/{agent}", json={})
        report = run_fuzz(int(server.url.rpartition(":")[2]), NUM_REQUESTS, seed=seed)
        assert report.problems == []
        assert report.statuses[200] > NUM_REQUESTS / 10
        server.call(check_is_empty)
