"""Manners on the wire: heads of streams, clients of HTTP/1.0, connections that are closed."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from keepwarm import BlockPoolBatchEngine
from keepwarm.engine.turn.intake import Wanted
from servers import FakeServer, fake_server
from sockets import RawClient
from sse import DONE, events_of

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello"}]
STREAMS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": (CHAT, {"model": "fake", "messages": HELLO, "max_tokens": 4}),
    "text": ("/v1/completions", {"model": "fake", "prompt": "Hello", "max_tokens": 4}),
    "anthropic": ("/v1/messages", {"model": "fake", "messages": HELLO, "max_tokens": 4}),
    "agents": ("/v1/agents/ada/messages", {"content": "Hello", "max_tokens": 4}),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeServer]:
    with fake_server(tmp_path_factory.mktemp("home")) as running:
        with running.client() as client:
            client.put("/v1/agents/ada", json={})
        yield running


@pytest.mark.parametrize("name", STREAMS)
def test_no_proxy_collects_or_keeps_a_stream(client: httpx.Client, name: str) -> None:
    path, body = STREAMS[name]
    response = client.post(path, json={**body, "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-store"
    assert response.headers["x-accel-buffering"] == "no"
    assert events_of(response.text)
    whole = client.post(path, json=body)
    assert whole.headers["cache-control"] == "no-store"
    assert "x-accel-buffering" not in whole.headers


def test_nor_that_of_a_model_on_its_way(client: httpx.Client) -> None:
    response = client.post("/v1/models/fake/load", headers={"Accept": "text/event-stream"})
    assert response.headers["x-accel-buffering"] == "no"
    assert events_of(response.text)[-1].name == "done"


class TestOldProtocol:
    """HTTP/1.0 has no chunks, and nginx speaks it to those behind it unless told otherwise."""

    @staticmethod
    def ask(server: FakeServer, body: dict[str, Any], path: str = CHAT) -> tuple[str, str]:
        """The head and all that comes until the server closes."""
        with RawClient(server.url) as raw:
            raw.post(path, body, version="1.0")
            head, _, rest = raw.read_until(lambda data: False).partition(b"\r\n\r\n")
        return head.decode().lower(), rest.decode()

    @pytest.mark.parametrize("name", STREAMS)
    def test_a_stream_ends_where_the_connection_does(self, server: FakeServer, name: str) -> None:
        path, body = STREAMS[name]
        head, text = self.ask(server, {**body, "stream": True}, path)
        assert " 200 ok" in head
        assert "transfer-encoding" not in head
        assert "connection: close" in head
        last = events_of(text)[-1]
        assert last.data == DONE or last.name in ("message_stop", "completed")

    def test_a_document_has_its_length(self, server: FakeServer) -> None:
        head, text = self.ask(server, STREAMS["chat"][1])
        assert f"content-length: {len(text.encode())}" in head
        assert "transfer-encoding" not in head

    def test_an_error_as_well(self, server: FakeServer) -> None:
        head, text = self.ask(server, {})
        assert " 400 bad" in head
        assert f"content-length: {len(text.encode())}" in head


@pytest.mark.parametrize("stream", [False, True])
def test_a_bug_closes_the_connection_and_says_so(tmp_path: Path, stream: bool) -> None:
    with fake_server(tmp_path) as server, RawClient(server.url) as raw:

        def submit(**arguments: Any) -> str:
            raise RuntimeError("a bug")

        server.call(lambda engine: setattr(engine, "submit", submit))
        raw.post(CHAT, {**STREAMS["chat"][1], "stream": stream})
        status, headers, _ = raw.read_document()
        assert status == 500
        assert headers["connection"] == "close"
        assert raw.read_until(lambda data: False) == b""


def test_an_error_of_the_request_keeps_it(client: httpx.Client) -> None:
    response = client.post(CHAT, json={})
    assert response.status_code == 400
    assert "connection" not in response.headers


def test_ignored_fields_are_in_every_reply(client: httpx.Client) -> None:
    many = {f"field_{number:03}": 1 for number in range(100)}
    for name in ("chat", "text", "anthropic"):
        path, body = STREAMS[name]
        whole = client.post(path, json={**body, "new": 1})
        assert whole.headers["x-keepwarm-ignored"] == "new"
        assert whole.json()["keepwarm"]["ignored"] == ["new"]
        streamed = client.post(path, json={**body, "new": 1, "stream": True})
        facts = [e.data["keepwarm"] for e in events_of(streamed.text) if "keepwarm" in e.data]
        assert [fact["ignored"] for fact in facts] == [["new"]]
        ignored = client.post(path, json={**body, **many}).json()["keepwarm"]["ignored"]
        assert ignored == [*sorted(many)[:32], "68 more"]


def test_what_was_adapted_is_in_the_head_and_in_the_reply(tmp_path: Path) -> None:
    notes = ("messages.2: said as the user's, by \u00e4\r\nX-Evil: 1", "tools: as text")
    shown = ["messages.2: said as the user's, by X-Evil: 1", "tools: as text"]
    with fake_server(tmp_path) as server, server.client() as client:

        def adapt(engine: BlockPoolBatchEngine) -> None:
            choose = engine.intake.choose

            def adapting(*arguments: Any, **more: Any) -> Wanted:
                return replace(choose(*arguments, **more), adapted=notes)

            engine.intake.choose = adapting  # type: ignore[method-assign]

        server.call(adapt)
        client.put("/v1/agents/ada", json={})
        for path, body in STREAMS.values():
            whole = client.post(path, json=body)
            assert whole.headers["x-keepwarm-adapted"] == "; ".join(shown)
            document = whole.json()
            assert document.get("keepwarm", document)["adapted"] == shown
            streamed = client.post(path, json={**body, "stream": True})
            assert streamed.headers["x-keepwarm-adapted"] == "; ".join(shown)
            ends = [event.data for event in events_of(streamed.text) if event.data != DONE]
            facts = [end.get("keepwarm", end) for end in ends]
            assert [fact["adapted"] for fact in facts if "adapted" in fact] == [shown]
