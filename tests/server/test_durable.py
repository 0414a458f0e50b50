"""Over HTTP: an answer waits for the disk, or says that the disk refused."""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import httpx
import pytest

from commands import keepwarm
from keepwarm.bench.child_process import ChildProcess
from keepwarm.store.catalog.catalog import Catalog
from keepwarm.store.catalog.errors import CatalogUnavailable
from servers import FakeServer, fake_server, say
from waiting import wait_until

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


def turns(client: httpx.Client, name: str = "ada") -> list[Any]:
    rows: list[Any] = client.get(f"/v1/agents/{name}/turns").json()["turns"]
    return rows


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
    wait_until(lambda: all(client.get(f"/v1/agents/{n}").json()["durable"] for n in names))
    assert client.put("/v1/agents/new", json={"priority": 3}).json()["durable"]


def test_a_deletion_that_the_disk_refuses_is_a_507_and_leaves_the_agent(
    server: FakeServer, client: httpx.Client, disk: Disk
) -> None:
    say(client, "ada", "a long story " * 60)
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
    reply = say(client, "ada", "Go on.")
    assert reply["cache"]["tier"] == "hot"
    disk.free()
    wait_until(lambda: client.get("/v1/agents/ada").json()["durable"])
    assert client.delete("/v1/agents/ada").json() == {"id": "ada", "deleted": True}
    assert client.get("/v1/agents/ada").status_code == 404


def test_a_reply_that_is_repeated_is_durable_when_the_disk_has_it(
    server: FakeServer, client: httpx.Client, disk: Disk
) -> None:
    disk.fill()
    key = {"Idempotency-Key": "once"}
    first = say(client, headers=key)
    again = say(client, headers=key)
    assert (first["durable"], again["durable"]) == (False, False)
    assert first["message"] == again["message"]
    disk.free()
    wait_until(lambda: say(client, headers=key)["durable"])
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


def test_the_command_line_says_so(server: FakeServer, client: httpx.Client, disk: Disk) -> None:
    done = keepwarm("agents", "pin", "ada", url=server.url)
    assert (done.code, done.err) == (0, "")
    disk.fill()
    done = keepwarm("agents", "unpin", "ada", url=server.url)
    assert done.code == 0
    assert "durable: false" in done.err
    refused = keepwarm("agents", "rm", "ada", "--yes", url=server.url)
    assert refused.code == 1
    assert "was not deleted" in refused.err
    disk.free()


class TestHealth:
    def test_degraded_with_the_cause_while_the_disk_refuses(
        self, server: FakeServer, client: httpx.Client, disk: Disk
    ) -> None:
        assert health(client) == {"status": "ok", "model": "fake", "causes": []}
        disk.fill()
        assert not client.put("/v1/agents/ada", json={"priority": 2}).json()["durable"]
        wait_until(lambda: health(client)["status"] == "degraded")
        (cause,) = health(client)["causes"]
        assert REFUSAL in cause
        assert client.get("/health/ready").status_code == 200
        disk.free()
        wait_until(lambda: health(client)["status"] == "ok")
        assert client.get("/v1/agents/ada").json()["durable"]

    def test_well_again_where_nothing_waits_to_be_written(
        self, server: FakeServer, client: httpx.Client, disk: Disk
    ) -> None:
        disk.fill()
        assert client.delete("/v1/agents/ada").status_code == 507
        wait_until(lambda: health(client)["status"] == "degraded")
        disk.free()
        wait_until(lambda: health(client)["status"] == "ok")


def health(client: httpx.Client) -> dict[str, Any]:
    document: dict[str, Any] = client.get("/health").json()
    return document


SERVE = """
import sys
from pathlib import Path
from benchmarks.server.process import FAKE, bench_settings, serve
settings = bench_settings(FAKE, max_rows=8, more={"disk.free_floor_bytes": 1 << 60})
serve(settings, Path(sys.argv[1]), announce=lambda port: print(port, flush=True))
"""


def test_told_to_stop_while_the_disk_refuses_it_ends_and_says_what_is_lost(tmp_path: Path) -> None:
    with ChildProcess("-c", SERVE, str(tmp_path / "home")) as process:
        url = f"http://127.0.0.1:{int(process.read_line())}"
        with httpx.Client(base_url=url, timeout=60.0, trust_env=False) as client:
            client.put("/v1/agents/ada", json={}).raise_for_status()
            client.put("/v1/agents/idle", json={}).raise_for_status()
            usage = [say(client, "ada", "a long story " * 40)["usage"] for _ in range(2)][-1]
            assert health(client)["status"] == "degraded"
        process.send_signal(signal.SIGTERM)
        process.wait(55.0)  # it does not wait for the disk, which has 60 seconds in other places
        said = process.complaints()
    num_tokens = usage["prompt_tokens"] + usage["completion_tokens"]
    assert f"agent 'ada': all of it, 2 turns and {num_tokens:,} tokens" in said
    assert "agent 'idle': all of it, 0 turns and 0 tokens" in said
    assert "must stay free" in said
    assert f"KV of {num_tokens - 1:,} tokens of agent 'ada'" in said
