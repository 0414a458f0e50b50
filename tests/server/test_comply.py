"""llm-comply's chat and Anthropic cases, against `keepwarm serve` on SmolLM2.

Left out are those that need tools, or a model that sees pictures or thinks.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from servers import ServerProcess, home_beside, server_process

pytest.importorskip("mlx.core")

pytestmark = pytest.mark.slow

CASES = ("basic-response", "system-prompt", "multi-turn", "streaming-response", "streaming-usage")
GREEDY = "server.default_temperature=0"


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, keepwarm_home: Path
) -> Iterator[ServerProcess]:
    home = home_beside(keepwarm_home, tmp_path_factory.mktemp("home"))
    with server_process(home, home / "log", "--set", GREEDY) as running:
        yield running


@pytest.mark.parametrize(("dialect", "prefix"), [("openai-chat", "chat"), ("anthropic", "anth")])
def test_the_cases_pass(server: ServerProcess, dialect: str, prefix: str) -> None:
    names = [f"{prefix}-{case}" for case in (*CASES, "error-handling")]
    command = [
        *(sys.executable, "-m", "llm_comply.cli", "--json"),
        *("--base-url", f"{server.url}/v1", "--api-key", "any", "--model", "smollm2"),
        *("--format", dialect, "--filter", ",".join(names), "--timeout", "240"),
    ]
    run = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    results = {row["id"]: row for row in json.loads(run.stdout)["results"]}
    assert sorted(results) == sorted(names)
    problems = {name: row.get("errors") for name, row in results.items() if row.get("errors")}
    assert not problems
    assert {row["status"] for row in results.values()} == {"passed"}
