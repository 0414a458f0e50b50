"""Over HTTP: an answer waits for the disk, or says that the disk refused."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import httpx
import pytest

from keepwarm.store.catalog import Catalog
from keepwarm.store.catalog_errors import CatalogUnavailable
from servers import FakeServer, fake_server

WAIT_S = 30.0
REFUSAL = "database or disk is full"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FakeServer]:
    with fake_server(tmp_path) as server:
        yield server


@pytest.fixture
def client(server: FakeServer) -> Iterator[httpx.Client]:
    with server.client() as client:
        assert client.put("/v1/agents/ada", json={"system": "Be brief."}).json()["durable"]
        yield client


class Disk:
    """Takes no change of an agent while it is full."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch

    def fill(self) -> None:
        def refuse(self: Catalog, *_: object, **__: object) -> NoReturn:
            raise CatalogUnavailable(
                self.path, operation="commit", message=REFUSAL, errorname="SQLITE_FULL"
            )

        for name in ("commit", "delete_agent", "probe"):
            self._monkeypatch.setattr(Catalog, name, refuse)

    def free(self) -> None:
        self._monkeypatch.undo()


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def say(client: httpx.Client, content: str = "Hello", **headers: str) -> dict[str, Any]:
    body = {"content": content, "max_tokens": 4}
    response = client.post("/v1/agents/ada/messages", json=body, headers=headers)
    assert response.status_code == 200, response.text
    document: dict[str, Any] = response.json()
    return document


def turns(client: httpx.Client, name: str = "ada") -> list[Any]:
    rows: list[Any] = client.get(f"/v1/agents/{name}/turns").json()["turns"]
    return rows


def wait_for(condition: Callable[[], object]) -> None:
    until = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_changes_on_a_full_disk_say_so_and_are_written_when_it_is_not_full(
    server: FakeServer, client: httpx.Client, disk: Disk
) -> None:
    assert say(client)["durable"]
    disk.fill()
    put = client.put("/v1/agents/new", json={"priority": 3})
    fork = client.post("/v1/agents/ada/fork", json={"new_id": "bob"})
    settings = client.put("/v1/agents/ada", json={"pinned": True})
    rollback = client.post("/v1/agents/ada/rollback", json={"turn": 0})
    park = client.post("/v1/agents/ada/park")
    answers = [put, fork, settings, rollback, park]
    assert [answer.status_code for answer in answers] == [201, 201, 200, 200, 200]
    assert [answer.json()["durable"] for answer in answers] == [False] * 5
    assert settings.json()["pinned"]
    assert not say(client)["durable"]
    disk.free()
    names = ("new", "bob", "ada")
    wait_for(lambda: all(client.get(f"/v1/agents/{n}").json()["durable"] for n in names))
    assert client.put("/v1/agents/new", json={"priority": 3}).json()["durable"]


def test_a_deletion_that_the_disk_refuses_is_a_507_and_leaves_the_agent(
    server: FakeServer, client: httpx.Client, disk: Disk
) -> None:
    say(client, "a long story " * 60)
    before, said = client.get("/v1/agents/ada").json(), turns(client)
    disk.fill()
    refused = client.delete("/v1/agents/ada")
    assert refused.status_code == 507
    error = refused.json()["error"]
    assert error["type"] == "storage_refused"
    assert REFUSAL in error["message"]
    assert "'ada' was not deleted" in error["message"]
    assert client.get("/v1/agents/ada").json() == before
    assert turns(client) == said
    reply = say(client, "Go on.")
    assert reply["cache"]["tier"] == "hot"
    disk.free()
    wait_for(lambda: client.get("/v1/agents/ada").json()["durable"])
    assert client.delete("/v1/agents/ada").json() == {"id": "ada", "deleted": True}
    assert client.get("/v1/agents/ada").status_code == 404


def test_a_reply_that_is_repeated_is_durable_when_the_disk_has_it(
    server: FakeServer, client: httpx.Client, disk: Disk
) -> None:
    disk.fill()
    key = {"Idempotency-Key": "once"}
    first = say(client, **key)
    again = say(client, **key)
    assert (first["durable"], again["durable"]) == (False, False)
    assert first["message"] == again["message"]
    disk.free()
    wait_for(lambda: say(client, **key)["durable"])
    assert len(turns(client)) == 1


def test_a_refused_deletion_names_the_callers_agent_not_the_servers(
    tmp_path: Path, disk: Disk
) -> None:
    keys = {"server.api_keys": {"team": "secret"}}
    with (
        fake_server(tmp_path, **{name.replace(".", "__"): v for name, v in keys.items()}) as server,
        server.client(headers={"Authorization": "Bearer secret"}) as client,
    ):
        client.put("/v1/agents/ada", json={})
        disk.fill()
        error = client.delete("/v1/agents/ada").json()["error"]
        disk.free()
    assert "'ada' was not deleted" in error["message"]
    assert "team" not in error["message"]
    assert str(tmp_path) not in error["message"]
