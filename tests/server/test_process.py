"""`keepwarm serve` as a user runs it, on SmolLM2: killed, stopped, started again."""

import json
import threading
from pathlib import Path

import pytest

from servers import ServerProcess, home_beside, say, server_process
from waiting import PATIENCE_S

pytest.importorskip("mlx.core")

pytestmark = pytest.mark.slow

STORY = "Tell me about rivers. " * 30


@pytest.fixture
def home(keepwarm_home: Path, tmp_path: Path) -> Path:
    return home_beside(keepwarm_home, tmp_path / "home")


def test_an_agent_outlives_its_server(home: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with server_process(home, log) as server, server.client() as client:
        client.put("/v1/agents/ada", json={"system": "Be brief."})
        first = say(client, "ada", STORY, temperature=0)
        assert first["durable"]
        num_first = first["usage"]["prompt_tokens"] + first["usage"]["completion_tokens"]
        server.kill()
    with server_process(home, log) as server, server.client() as client:
        second = say(client, "ada", "Go on.", temperature=0)
        assert second["turn"] == 2
        assert second["usage"]["cached_tokens"] > num_first - 256 - 1
        num_second = second["usage"]["prompt_tokens"] + second["usage"]["completion_tokens"]
        server.stop()
    with server_process(home, log) as server, server.client() as client:
        third = say(client, "ada", "Go on.", temperature=0)
        assert third["turn"] == 3
        assert third["cache"]["tier"] == "cold"
        assert third["usage"]["cached_tokens"] == num_second - 1
    assert STORY not in log.read_text()


def test_a_stop_lets_replies_end(home: Path, tmp_path: Path) -> None:
    with server_process(home, tmp_path / "log") as server, server.client() as client:
        client.put("/v1/agents/ada", json={})
        lines: list[str] = []
        has_begun = threading.Event()

        def read() -> None:
            body = {"content": "Count.", "max_tokens": 40, "temperature": 0, "stream": True}
            with client.stream("POST", "/v1/agents/ada/messages", json=body) as response:
                for line in response.iter_lines():
                    lines.append(line)
                    if line == "event: delta":
                        has_begun.set()

        reader = threading.Thread(target=read)
        reader.start()
        assert has_begun.wait(PATIENCE_S)
        server.stop()
        reader.join(PATIENCE_S)
        end = lines[lines.index("event: completed") + 1]
        assert json.loads(end.removeprefix("data: "))["durable"]


def test_a_port_in_use_is_said_at_once(home: Path, tmp_path: Path) -> None:
    with server_process(home, tmp_path / "log") as server:
        port = server.url.rpartition(":")[2]
        with pytest.raises(AssertionError, match=r"cannot listen on .*choose another with --port"):
            _start_at(home, tmp_path / "second.log", port)


def test_a_home_in_use_is_said(home: Path, tmp_path: Path) -> None:
    with (
        server_process(home, tmp_path / "log"),
        pytest.raises(AssertionError, match="keepwarm: "),
        server_process(home, tmp_path / "second.log"),
    ):
        pass


def test_a_home_that_is_a_file_is_said(home: Path, tmp_path: Path) -> None:
    (home / "agents").touch()
    with pytest.raises(AssertionError, match="cannot be used: File exists") as caught:
        _start_at(home, tmp_path / "log", "0")
    assert "Traceback" not in str(caught.value)


def _start_at(home: Path, log: Path, port: str) -> ServerProcess:
    with server_process(home, log, "--port", port) as server:
        return server
