"""What Prometheus and `/v1/stats` are told."""

import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from servers import FakeServer, fake_server
from sockets import RawClient
from waiting import wait_until

BODY = {"model": "fake", "messages": [{"role": "user", "content": "x" * 600}], "max_tokens": 8}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FakeServer]:
    with fake_server(tmp_path) as running:
        yield running


def samples(client: httpx.Client) -> dict[str, float]:
    """By name, with the labels' values behind it."""
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    families = text_string_to_metric_families(response.text)
    return {
        " ".join([sample.name, *sample.labels.values()]): sample.value
        for family in families
        for sample in family.samples
    }


def ask(client: httpx.Client, agent: str) -> httpx.Response:
    return client.post("/v1/chat/completions", json=BODY, headers={"X-Agent-ID": agent})


def test_requests_are_counted_as_they_end(client: httpx.Client) -> None:
    usage = ask(client, "ada").json()["usage"]
    second = ask(client, "eve").json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert client.post("/v1/chat/completions", json={}).status_code == 400
    told = samples(client)
    assert told["keepwarm_requests_total length"] == 2
    assert told["keepwarm_tokens_total prompt"] == 2 * usage["prompt_tokens"]
    assert told["keepwarm_tokens_total cached"] == second > 0
    assert told["keepwarm_tokens_total completion"] == 16
    for name in ("ttft", "tpot", "queue", "restore"):
        assert told[f"keepwarm_{name}_seconds_count"] == 2
    assert told["keepwarm_divergences_total new_line"] == 2
    assert told["keepwarm_http_requests_total /v1/chat/completions 200"] == 2
    assert told["keepwarm_http_requests_total /v1/chat/completions 400"] == 1


def test_the_engine_and_the_disk_are_shown(server: FakeServer, client: httpx.Client) -> None:
    ask(client, "ada")
    while server.call(lambda engine: engine.has_chores):  # bytes on their way to the disk count
        time.sleep(0.01)
    snapshot = server.call(lambda engine: engine.snapshot())
    told = samples(client)
    assert told["keepwarm_decoded_tokens_total"] == 8
    assert told["keepwarm_memory_budget_bytes"] == snapshot.pool.budget_bytes
    assert told["keepwarm_memory_used_bytes"] == snapshot.pool.used_bytes > 0
    assert told["keepwarm_memory_bytes slab"] > 0
    assert told["keepwarm_disk_budget_bytes"] == snapshot.store.budget_bytes
    for name in (
        "preemptions",
        "generator_failures",
        "mended_spans",
        "damaged_records",
        "store_faults",
    ):
        assert told[f"keepwarm_{name}_total"] == 0
    for name in ("waiting_requests", "running_requests", "store_fault"):
        assert told[f"keepwarm_{name}"] == 0


def test_open_connections_and_tasks_are_counted(server: FakeServer, client: httpx.Client) -> None:
    alone = samples(client)
    assert alone["keepwarm_connections"] == 1
    with RawClient(server.url) as other:
        other.post("/v1/agents/nobody/messages", {"content": "Hello"})
        other.read_document()
        assert samples(client)["keepwarm_connections"] == 2
    wait_until(lambda: samples(client)["keepwarm_connections"] == 1)
    assert alone["keepwarm_tasks"] >= 1


def test_no_path_of_a_client_becomes_a_label(client: httpx.Client) -> None:
    """Or whoever scans the server would fill its memory."""
    for number in range(20):
        client.get(f"/nowhere/{number}")
        client.get(f"/v1/agents/nobody-{number}")
    routes = {name for name in samples(client) if name.startswith("keepwarm_http_requests_total")}
    assert len(routes) <= 3


def test_stats_are_the_callers_own(tmp_path: Path) -> None:
    keys = {"default": "first-key", "team": "other-key"}
    with fake_server(tmp_path, server__api_keys=keys) as server:
        with server.client(headers={"x-api-key": "first-key"}) as client:
            ask(client, "ada")
            stats = client.get("/v1/stats").json()
            assert [agent["id"] for agent in stats["agents"]] == ["ada"]
            assert stats["models"][0]["id"] == "fake"
            assert stats["pool"]["used_bytes"] > 0
        with server.client(headers={"x-api-key": "other-key"}) as client:
            assert client.get("/v1/stats").json()["agents"] == []
            assert client.get("/metrics").status_code == 403
        with server.client() as client:
            assert client.get("/metrics").status_code == 401
