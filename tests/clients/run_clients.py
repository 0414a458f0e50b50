"""Real clients against `keepwarm serve` on SmolLM2; `make clients` runs them.

Not collected by `make test`, which runs the fast ones on the fake generator.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from clients import install, run_node, run_pi, run_python
from servers import ServerProcess, home_beside, server_process

pytest.importorskip("mlx.core")

NAMES = ("openai", "anthropic", "openai-agents", "ai-sdk", "pi")
MODEL = "smollm2"
KEY = "sk-clients"
HEARTBEAT_S = 0.02
"""Shorter than a token takes: every stream has heartbeats between its events."""

PI_S = 90.0


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, keepwarm_home: Path
) -> Iterator[ServerProcess]:
    """One for all of them, with a key, and a home of its own but for the converted model.

    Greedy where a client does not say otherwise: sampled, so small a model now and then talks on
    until its context ends.
    """
    install(NAMES)
    home = home_beside(keepwarm_home, tmp_path_factory.mktemp("home"))
    settings = (
        f"server.api_keys=clients={KEY}",
        "server.default_temperature=0",
        f"server.heartbeat_s={HEARTBEAT_S}",
    )
    flags = [flag for setting in settings for flag in ("--set", setting)]
    with server_process(home, home / "log", *flags) as server:
        yield server
        assert "Traceback" not in server.log.read_text()


@pytest.mark.parametrize(
    ("name", "script"),
    [
        ("openai", "openai_client.py"),
        ("anthropic", "anthropic_client.py"),
        ("openai-agents", "openai_agents_client.py"),
    ],
)
def test_python(server: ServerProcess, name: str, script: str) -> None:
    run_python(name, script, server.url, KEY, MODEL)


def test_ai_sdk(server: ServerProcess) -> None:
    run_node("ai-sdk", "ai_sdk_client.mjs", server.url, KEY, MODEL)


@pytest.mark.parametrize(
    ("api", "path"), [("openai-completions", "/v1"), ("anthropic-messages", "")]
)
def test_pi(server: ServerProcess, tmp_path: Path, api: str, path: str) -> None:
    """Two turns of the coding agent, which sends a long prompt and all of its tools."""
    arguments = _pi(tmp_path, api, f"{server.url}{path}", MODEL)
    for more in (["Say hello."], ["--continue", "Say goodbye."]):
        done = run_pi(tmp_path, *arguments, *more, timeout_s=PI_S)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()
        sys.stdout.write(f"  {api}: {done.stdout.strip()!r}\n")
    first, second = _usages(tmp_path / "pi" / "sessions")
    assert first["totalTokens"] > 512
    assert second["cacheRead"] >= first["totalTokens"] - 1


def test_pi_is_told_of_an_unknown_model(server: ServerProcess, tmp_path: Path) -> None:
    """It says so and ends."""
    arguments = _pi(tmp_path, "openai-completions", f"{server.url}/v1", "no-such-model")
    done = run_pi(tmp_path, *arguments, "Say hello.", timeout_s=PI_S)
    assert done.returncode == 1
    assert "'no-such-model' is not served here" in done.stderr


def _pi(folder: Path, api: str, url: str, model: str) -> list[str]:
    """Write its configuration; returns the arguments that choose it."""
    provider = {"baseUrl": url, "api": api, "apiKey": KEY, "models": [{"id": model}]}
    (folder / "pi").mkdir()
    text = json.dumps({"providers": {"keepwarm": provider}})
    (folder / "pi" / "models.json").write_text(text, "utf-8")
    return ["--print", "--provider", "keepwarm", "--model", model]


def _usages(sessions: Path) -> list[dict[str, int]]:
    """Return the tokens of each reply in the agent's latest session."""
    session = max(sessions.rglob("*.jsonl"), key=lambda path: path.stat().st_mtime_ns)
    rows = [json.loads(line) for line in session.read_text("utf-8").splitlines()]
    messages = [row["message"] for row in rows if row["type"] == "message"]
    return [message["usage"] for message in messages if message["role"] == "assistant"]
