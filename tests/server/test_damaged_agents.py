"""Over HTTP: a damaged agent is set aside with an error of its own, and the others are served."""

import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from commands import Done, keepwarm
from keepwarm.store.disk.disk_store import CATALOG_NAME
from keepwarm.wiring import STORE_FOLDER
from servers import FakeServer, fake_server, say, send

STORY = "A story of one's own. "


def run(server: FakeServer, *arguments: str) -> Done:
    return keepwarm("agents", *arguments, url=server.url)


def harm(home: Path, statement: str) -> None:
    db = sqlite3.connect(home / STORE_FOLDER / CATALOG_NAME)
    with db:
        db.execute("PRAGMA foreign_keys=OFF")
        db.execute(statement)
    db.close()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    with fake_server(tmp_path) as server, server.client() as client:
        for name in ("ada", "bob"):
            client.put(f"/v1/agents/{name}", json={"pinned": name == "bob"})
            assert say(client, name, STORY * 9)["durable"]
            assert say(client, name)["durable"]
    return tmp_path


BOB = "line = (SELECT line FROM lines JOIN agents USING (agent) WHERE name = 'bob')"
DAMAGES = (
    f"UPDATE spans SET text = x'ff' WHERE position = 0 AND {BOB}",
    f"UPDATE messages SET json = x'7b' WHERE node = 2 AND {BOB}",
    "UPDATE agents SET overflow = 'explode' WHERE name = 'bob'",
    f"UPDATE lines SET tokenizer = 'none' WHERE {BOB}",
)


@pytest.fixture(params=DAMAGES)
def server(home: Path, request: pytest.FixtureRequest) -> Iterator[FakeServer]:
    harm(home, request.param)
    with fake_server(home) as server:
        yield server


def test_every_call_says_what_is_wrong_and_what_can_be_done(client: httpx.Client) -> None:
    answers = [
        client.get("/v1/agents/bob"),
        client.get("/v1/agents/bob/turns"),
        client.put("/v1/agents/bob", json={}),
        client.post("/v1/agents/bob/fork", json={"new_id": "eve"}),
        client.post("/v1/agents/bob/rollback", json={"turn": 0}),
        client.post("/v1/agents/bob/park"),
        client.post("/v1/agents/bob/prefetch"),
        client.post("/v1/agents/bob/verify"),
        send(client, "bob"),
    ]
    for answer in answers:
        assert answer.status_code == 410, answer.text
        error = answer.json()["error"]
        assert error["type"] == "agent_damaged"
        assert "'bob' is damaged" in error["message"]
        assert "delete it" in error["message"]
    chat = {"model": "fake", "messages": [{"role": "user", "content": "Hello"}], "user": "bob"}
    answer = client.post("/v1/chat/completions", json=chat)
    assert answer.status_code == 410


def test_it_is_listed_and_deleted_and_the_others_are_served(client: httpx.Client) -> None:
    client.get("/v1/agents/bob")
    listed = {agent["id"]: agent for agent in client.get("/v1/agents").json()["agents"]}
    assert listed["bob"]["damage"]
    assert listed["ada"]["damage"] is None
    assert say(client, "ada")["turn"] == 3
    health = client.get("/health").json()
    assert health["status"] == "degraded"
    assert "1 agent is damaged" in health["causes"][0]
    assert "bob" not in health["causes"][0]
    assert client.delete("/v1/agents/bob").json() == {"id": "bob", "deleted": True}
    assert client.get("/v1/agents/bob").status_code == 404
    assert client.put("/v1/agents/bob", json={}).status_code == 201
    assert say(client, "bob")["turn"] == 1


def test_the_command_line_shows_and_deletes_it(server: FakeServer, client: httpx.Client) -> None:
    client.get("/v1/agents/bob")
    rows: list[dict[str, Any]] = run(server, "ls", "--json").json
    assert [bool(row["damage"]) for row in rows] == [False, True]
    assert "damaged" in run(server, "ls").out
    assert run(server, "rm", "bob", "--yes").code == 0
    assert [row["id"] for row in run(server, "ls", "--json").json] == ["ada"]


def test_what_can_be_read_is_exported_and_imported_under_another_name(
    server: FakeServer, client: httpx.Client, tmp_path: Path
) -> None:
    exported = client.get("/v1/agents/bob/export")
    assert exported.status_code == 200, exported.text
    assert exported.headers["X-Keepwarm-Damage"]
    assert exported.headers["X-Keepwarm-Left-Out-Tokens"] == "0"
    made = client.post(
        "/v1/agents/import",
        params={"id": "rest"},
        content=exported.content,
        headers={"Content-Type": "application/x-tar"},
    )
    assert made.status_code == 201, made.text
    num_turns = made.json()["num_turns"]
    rows = client.get("/v1/agents/rest/turns").json()["turns"]
    assert [row["messages"][0]["content"] for row in rows] == [STORY * 9, "Hello"][:num_turns]
    assert say(client, "rest")["turn"] == num_turns + 1
    done = run(server, "export", "bob", str(tmp_path / "bob.keepwarm"))
    assert done.code == 0
    assert "is damaged" in done.err


def test_an_agent_whose_name_was_damaged_can_be_deleted(home: Path) -> None:
    harm(home, "UPDATE agents SET name = 'b\u00f6b !' WHERE name = 'bob'")
    with fake_server(home) as server, server.client() as client:
        names = [agent["id"] for agent in client.get("/v1/agents").json()["agents"]]
        assert names == ["ada", "b\u00f6b !"]
        assert client.delete("/v1/agents/no name").status_code == 400
        assert client.delete("/v1/agents/b\u00f6b !").status_code == 200
        assert len(client.get("/v1/agents").json()["agents"]) == 1


@pytest.mark.parametrize("harmed", ["empty", "cut"])
def test_a_catalogue_that_is_lost_is_said(home: Path, harmed: str) -> None:
    path = home / STORE_FOLDER / CATALOG_NAME
    data = path.read_bytes()
    path.write_bytes(b"" if harmed == "empty" else data[: 3 * 4096])
    with fake_server(home) as server, server.client() as client:
        health = client.get("/health").json()
        assert health["status"] == "degraded"
        assert "begun anew" in health["causes"][0]
        assert send(client, "ada").status_code == 404
        assert client.put("/v1/agents/ada", json={}).status_code == 201
