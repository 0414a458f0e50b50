"""What is there is listed: in memory or on disk, and after a restart as before it."""

from pathlib import Path
from typing import Any

import httpx
import pytest

from fleets import loaded
from keepwarm.testing.models import FixedSource
from servers import FakeServer, fake_server, say

LONG = "y" * 700
SESSION = "2a8f7c1e-53d4-4b6f-9a0c-1e2d3c4b5a69"


def create(client: httpx.Client, *names: str) -> None:
    for name in names:
        client.put(f"/v1/agents/{name}", json={}).raise_for_status()


def listed(client: httpx.Client) -> dict[str, Any]:
    return {agent["id"]: agent for agent in client.get("/v1/agents").json()["agents"]}


def agents_of_models(client: httpx.Client) -> dict[str, int]:
    return {model["id"]: model["agents"] for model in client.get("/v1/models").json()["data"]}


@pytest.mark.parametrize("length", [5, 255, 256, 700])
def test_after_a_restart(tmp_path: Path, length: int) -> None:
    with fake_server(tmp_path) as server, server.client() as client:
        create(client, "ada", "new")
        say(client, "ada", "y" * length)
        before = listed(client)["ada"]
    with fake_server(tmp_path) as server, server.client() as client:
        after = listed(client)
        assert set(after) == {"ada", "new"}
        assert after["ada"]["tier"] == "cold"
        assert after["ada"]["held_tokens"] == before["held_tokens"] > 0
        for field in ("context_tokens", "num_turns", "num_side_lines", "model"):
            assert after["ada"][field] == before[field]
        assert after["new"]["tier"] == "none"
        assert not server.call(lambda engine: list(engine.book))
        stats = client.get("/v1/stats").json()
        assert stats["num_agents"] == 2
        assert {agent["id"]: agent for agent in stats["agents"]} == after
        assert client.get("/v1/stats?agents=0").json()["num_agents"] == 2
        assert agents_of_models(client) == {"fake": 2}
        shown = client.get("/v1/agents/ada").json()
        assert {key: shown[key] for key in after["ada"]} == after["ada"]
        assert listed(client) == after
        client.delete("/v1/agents/ada").raise_for_status()
        assert agents_of_models(client) == {"fake": 1}
        assert set(listed(client)) == {"new"}


def test_what_the_disk_has_lost_is_not_held(tmp_path: Path) -> None:
    with fake_server(tmp_path) as server, server.client() as client:
        create(client, "ada")
        say(client, "ada", "y" * 900)
        before = listed(client)["ada"]
    blocks = sorted((tmp_path / "agents" / "blocks").rglob("*.safetensors"))
    assert len(blocks) == 4
    with fake_server(tmp_path) as server, server.client() as client:
        assert listed(client)["ada"]["held_tokens"] == before["held_tokens"]
        server.call(lambda engine: engine._store.drop(_all_but_first(engine)))
        assert listed(client)["ada"]["held_tokens"] == 256
        server.call(lambda engine: engine._store.drop(_records(engine)))
        assert listed(client)["ada"]["held_tokens"] == 0
        assert listed(client)["ada"]["tier"] == "none"


def _records(engine: Any) -> list[Any]:
    index = engine._store._index
    return [entry.record.hash for entry in sorted(index, key=lambda entry: entry.record.depth)]


def _all_but_first(engine: Any) -> list[Any]:
    return _records(engine)[1:]


def test_by_model(tmp_path: Path) -> None:
    source = FixedSource(loaded("small"), loaded("third"))
    config_file = tmp_path / "keepwarm.toml"
    config_file.write_text("[models.third]\n", "utf-8")
    options: dict[str, Any] = {"source": source, "model__name": "small", "config_file": config_file}
    with fake_server(tmp_path / "home", **options) as server, server.client() as client:
        create(client, "ada", "bob", "eve")
        for name in ("ada", "bob", "eve"):
            say(client, name, LONG)
        say(client, "bob", "And?", model="third")
        assert agents_of_models(client) == {"small": 2, "third": 1}
    with fake_server(tmp_path / "home", **options) as server, server.client() as client:
        assert agents_of_models(client) == {"small": 2, "third": 1}
        assert listed(client)["bob"]["model"] == "third"
        client.get("/v1/agents/bob").raise_for_status()
        assert agents_of_models(client) == {"small": 2, "third": 1}


def test_pages_of_many(tmp_path: Path) -> None:
    names = [f"agent-{number:03}" for number in range(120)]
    with fake_server(tmp_path) as server, server.client() as client:
        create(client, *names)
    with fake_server(tmp_path) as server, server.client() as client:
        found: list[str] = []
        while True:
            after = {"after": found[-1]} if found else {}
            page = client.get("/v1/agents", params={"limit": 50, **after}).json()
            found += [agent["id"] for agent in page["agents"]]
            if not page["has_more"]:
                break
        assert found == names


class TestClientsConversations:
    @pytest.fixture
    def server(self, tmp_path: Path) -> Any:
        with fake_server(tmp_path) as server:
            yield server

    def test_a_session_of_claude_code(self, server: FakeServer) -> None:
        user_id = f'{{"device_id": "d", "account_uuid": "", "session_id": "{SESSION}"}}'
        body = {
            "model": "fake",
            "max_tokens": 4,
            "messages": [{"role": "user", "content": "Hello"}],
            "metadata": {"user_id": user_id},
        }
        with server.client() as client:
            client.post("/v1/messages", json=body).raise_for_status()
            headers = {"X-Claude-Code-Session-Id": "by-header"}
            client.post("/v1/messages", json=body, headers=headers).raise_for_status()
            assert set(listed(client)) == {SESSION, "by-header"}

    def test_a_title_first(self, server: FakeServer) -> None:
        """opencode sends both under one session, and only the conversation goes on."""
        title = [
            {"role": "system", "content": "Give a title. " * 20},
            {"role": "user", "content": "Fix it"},
        ]
        messages: list[Any] = [
            {"role": "system", "content": "You write code. " * 20},
            {"role": "user", "content": "Fix it"},
        ]
        with server.client(headers={"x-session-id": "ses_1"}) as client:
            chat(client, title)
            for text in ("Now the tests", "And the docs"):
                answer = chat(client, messages)
                messages = [*messages, answer, {"role": "user", "content": text}]
            said = client.get("/v1/agents/ses_1/turns").json()["turns"]
            assert [m["content"] for turn in said for m in turn["messages"]] == [
                message["content"] for message in messages[:-1]
            ]
            shown = client.get("/v1/agents/ses_1").json()
            assert shown["system"] == messages[0]["content"]
            assert (shown["num_turns"], shown["num_side_lines"]) == (2, 1)


def chat(client: httpx.Client, messages: list[Any]) -> Any:
    body = {"model": "fake", "messages": messages, "max_tokens": 6}
    answer = client.post("/v1/chat/completions", json=body)
    return answer.raise_for_status().json()["choices"][0]["message"]
