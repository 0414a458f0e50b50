"""More requests than places, clients that do not read, and limits of time."""

import json
import socket
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from doors import GatedFactory, check_is_empty
from engines import FakeFactory
from servers import FakeServer, fake_server
from sockets import RawClient
from sse import DONE, body_of, events_of
from waiting import PATIENCE_S, wait_until

CHAT = "/v1/chat/completions"
DIALECTS = {
    "openai": (CHAT, {"model": "fake", "messages": [{"role": "user", "content": "Hello"}]}),
    "completions": ("/v1/completions", {"model": "fake", "prompt": "Hello"}),
    "anthropic": (
        "/v1/messages",
        {"model": "fake", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 9},
    ),
    "agents": ("/v1/agents/ada/messages", {"content": "Hello"}),
}
COMMENT = b": keepwarm\n"
HEARTBEATS = {
    "openai": COMMENT,
    "completions": COMMENT,
    "anthropic": b"event: ping\n",
    "agents": COMMENT,
}


def request(dialect: str, **more: Any) -> tuple[str, dict[str, Any]]:
    path, body = DIALECTS[dialect]
    return path, {**body, "max_tokens": 50_000, "temperature": 0, **more}


def kind_of(dialect: str, document: dict[str, Any]) -> str:
    """The error's type, in its dialect's shape."""
    error = document["error"]
    if dialect == "anthropic":
        assert document["type"] == "error"
        assert document["request_id"]
    elif dialect != "agents":
        assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return str(error["type"])


def occupied(server: FakeServer, clients: ExitStack, factory: GatedFactory) -> None:
    """The only row is taken, and its generator waits."""
    with server.client() as client:
        assert client.put("/v1/agents/ada", json={}).status_code == 201
    factory.gate.close()
    client_of_row = clients.enter_context(RawClient(server.url))
    waited = factory.gate.num_waited
    client_of_row.post(*request("openai"))
    wait_until(lambda: factory.gate.num_waited > waited)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_full_queue_answers_429(tmp_path: Path, dialect: str, stream: bool) -> None:
    factory = GatedFactory()
    options = {"factory": factory, "engine__max_rows": 1, "engine__max_waiting": 1}
    with fake_server(tmp_path, **options) as server, ExitStack() as clients:
        occupied(server, clients, factory)
        others = [clients.enter_context(RawClient(server.url)) for _ in range(2)]
        for other in others:
            other.post(*request(dialect, stream=stream))
        if dialect == "agents":
            # Both stand at the turnstile's door: one is in the engine's queue, one before it.
            others.append(clients.enter_context(RawClient(server.url)))
            others[-1].post(*request(dialect, stream=stream))
        num_asked = 1 if dialect == "agents" else 2
        wait_until(lambda: server.engine._thread._mailbox._commands.qsize() >= num_asked)
        factory.gate.allow(3)
        answered: list[RawClient] = []
        wait_until(lambda: answered.extend(_readable(others)) or answered)
        status, headers, body = answered[0].read_document()
        assert status == 429
        assert int(headers["retry-after"]) >= 1
        kinds = {"agents": "queue_full"}
        assert kind_of(dialect, _json(body)) == kinds.get(dialect, "rate_limit_error")
        for other in others:
            other.socket.close()
        factory.gate.open()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_wait_that_is_too_long_answers_503(tmp_path: Path, dialect: str, stream: bool) -> None:
    factory = GatedFactory()
    options = {
        "factory": factory,
        "engine__max_rows": 1,
        "server__queue_timeout_s": 1.0,
        "server__heartbeat_s": 5.0,
    }
    with fake_server(tmp_path, **options) as server, ExitStack() as clients:
        occupied(server, clients, factory)
        waiting = clients.enter_context(RawClient(server.url))
        waiting.post(*request(dialect, stream=stream))
        wait_until(lambda: server.engine._thread._mailbox._commands.qsize() >= 1)
        factory.gate.allow(1)
        status, headers, body = waiting.read_document()
        assert status == 503
        assert int(headers["retry-after"]) >= 1
        kinds = {"anthropic": "overloaded_error", "agents": "overloaded"}
        assert kind_of(dialect, _json(body)) == kinds.get(dialect, "server_error")
        factory.gate.open()


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_reply_that_is_too_slow_answers_504(tmp_path: Path, dialect: str) -> None:
    with (
        fake_server(tmp_path, server__deadline_s=0.2) as server,
        server.client() as client,
    ):
        client.put("/v1/agents/ada", json={})
        path, body = request(dialect)
        response = client.post(path, json=body)
        assert response.status_code == 504
        kinds = {"anthropic": "timeout_error", "agents": "timeout"}
        assert kind_of(dialect, response.json()) == kinds.get(dialect, "server_error")
        server.call(check_is_empty)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_or_ends_its_stream_with_an_error(tmp_path: Path, dialect: str) -> None:
    with (
        fake_server(tmp_path, server__deadline_s=0.2) as server,
        server.client() as client,
    ):
        client.put("/v1/agents/ada", json={})
        path, body = request(dialect, stream=True)
        response = client.post(path, json=body)
        assert response.status_code == 200
        last = events_of(response.text)[-1]
        assert "was not complete within 0.2 s" in last.data["error"]["message"]
        assert last.name == ("" if dialect in ("openai", "completions") else "error")
        wait_until(lambda: not server.call(lambda e: e.has_work))
        server.call(check_is_empty)


def test_what_breaks_off_under_way_ends_with_an_error(tmp_path: Path) -> None:
    """Where one of several choices fails, the others are cancelled and one error is sent."""
    factory = FakeFactory(fail_at=[[30]])
    with fake_server(tmp_path, factory=factory) as server, server.client() as client:
        path, body = request("openai", stream=True, n=3)
        response = client.post(path, json=body)
        frames = [frame for frame in response.text.split("\n\n") if "error" in frame]
        assert len(frames) == 1
        assert response.text.rstrip().endswith(frames[0])
        wait_until(lambda: not server.call(lambda e: e.has_work))
        server.call(check_is_empty)


@pytest.mark.parametrize("stream", [False, True])
def test_further_choices_that_find_the_queue_full(tmp_path: Path, stream: bool) -> None:
    options = {"engine__max_rows": 1, "engine__max_waiting": 1}
    with fake_server(tmp_path, **options) as server, server.client() as client:
        path, body = request("openai", stream=stream, n=4)
        response = client.post(path, json=body)
        assert response.status_code == (200 if stream else 429)
        assert "waiting already" in response.text
        wait_until(lambda: not server.call(lambda e: e.has_work))
        server.call(check_is_empty)


class TestSlowReaders:
    def test_one_is_cut_off_and_the_others_go_on(self, tmp_path: Path) -> None:
        with (
            fake_server(tmp_path, send_buffer=4096, server__slow_reader_s=0.5) as server,
            server.client() as client,
            RawClient(server.url, receive_buffer=4096) as slow,
        ):
            path, body = request("openai", stream=True, max_tokens=90_000)
            slow.post(path, body)
            wait_until(lambda: server.engine.num_requests)
            for _ in range(3):
                reply = client.post(path, json={**body, "max_tokens": 50})
                assert reply.text.endswith("data: [DONE]\n\n")
            connections = server.server.server_state.connections
            wait_until(lambda: len(connections) == 1)
            wait_until(lambda: not server.call(lambda e: e.has_work))
            server.call(check_is_empty)
            assert b"[DONE]" not in slow.read_until(lambda _: False)

    def test_what_it_does_not_read_is_kept_once(self, tmp_path: Path) -> None:
        """It comes as one event, whatever its length, and is not cut off while it has time."""
        options: dict[str, Any] = {"server__slow_reader_s": 60.0, "send_buffer": 4096}
        with (
            fake_server(tmp_path, **options) as server,
            RawClient(server.url, receive_buffer=4096) as slow,
        ):
            slow.post(*request("openai", stream=True, max_tokens=20_000))
            wait_until(lambda: server.engine.num_requests)
            (stream,) = server.engine._submissions._running
            wait_until(lambda: stream.has_ended)
            assert len(stream._unread) <= 2
            text = slow.read_until(lambda data: data.endswith(b"0\r\n\r\n"))
            assert b"[DONE]" in text
            assert text.count(b"data: ") < 2_000

    def test_a_reset_ends_it_at_once(self, tmp_path: Path) -> None:
        with fake_server(tmp_path) as server:
            slow = RawClient(server.url, receive_buffer=4096)
            slow.post(*request("openai", stream=True, max_tokens=90_000))
            wait_until(lambda: server.engine.num_requests)
            slow.reset()
            wait_until(lambda: not server.engine.num_requests)


class TestHeartbeats:
    @pytest.mark.parametrize("dialect", DIALECTS)
    def test_a_long_wait_is_not_silent(self, tmp_path: Path, dialect: str) -> None:
        """In the queue, or at the turnstile; then the reply comes as ever."""
        factory = GatedFactory()
        options = {"factory": factory, "engine__max_rows": 1, "server__heartbeat_s": 0.02}
        with fake_server(tmp_path, **options) as server, ExitStack() as clients:
            occupied(server, clients, factory)
            waiting = clients.enter_context(RawClient(server.url))
            waiting.post(*request(dialect, stream=True, max_tokens=3))
            waiting.read_until(lambda data: data.count(HEARTBEATS[dialect]) >= 3)
            assert b"text/event-stream" in waiting.received
            factory.gate.open()
            row, *_ = (c for c in server.engine._submissions._running)
            server.loop.call_soon_threadsafe(row.hang_up)
            waiting.read_until(lambda data: data.endswith(b"0\r\n\r\n"))
            assert b"x-keepwarm-cache: " not in waiting.received
            facts = [e.data for e in events_of(body_of(waiting.received)) if _has_facts(e.data)]
            assert [fact.get("keepwarm", fact)["cache"]["tier"] for fact in facts] == ["none"]

    def test_an_error_after_one_is_an_event(self, tmp_path: Path) -> None:
        factory = GatedFactory()
        options = {
            "factory": factory,
            "engine__max_rows": 1,
            "server__heartbeat_s": 0.02,
            "server__queue_timeout_s": 0.2,
        }
        with fake_server(tmp_path, **options) as server, ExitStack() as clients:
            occupied(server, clients, factory)
            waiting = clients.enter_context(RawClient(server.url))
            waiting.post(*request("openai", stream=True))
            wait_until(lambda: server.engine._thread._mailbox._commands.qsize() >= 1)
            factory.gate.allow(1)
            waiting.read_until(lambda data: data.endswith(b"0\r\n\r\n"))
            assert b" 200 OK" in waiting.received
            assert b"no place became free within 0.2 s" in waiting.received
            assert "error" in events_of(body_of(waiting.received))[-1].data
            factory.gate.open()

    def test_prefill_is_not_silent(self, tmp_path: Path) -> None:
        factory = GatedFactory()
        options = {"factory": factory, "server__heartbeat_s": 0.02}
        with fake_server(tmp_path, **options) as server, RawClient(server.url) as client:
            factory.gate.close()
            messages = [{"role": "user", "content": "x" * 2000}]
            client.post(*request("openai", stream=True, messages=messages, max_tokens=2))
            client.read_until(lambda data: data.count(HEARTBEATS["openai"]) >= 2)
            factory.gate.open()
            client.read_until(lambda data: data.endswith(b"0\r\n\r\n"))
            assert events_of(body_of(client.received))[-1].data == DONE


def test_two_hundred_idle_connections(tmp_path: Path) -> None:
    """They take nothing from anybody, and each is answered when it asks."""
    with fake_server(tmp_path) as server, server.client() as client, ExitStack() as clients:
        idle = [clients.enter_context(RawClient(server.url)) for _ in range(200)]
        for one in idle:
            one.post(*request("openai", max_tokens=1))
            assert one.read_document()[0] == 200
        reply = client.post(CHAT, json=request("openai", max_tokens=20)[1])
        assert reply.status_code == 200
        answers: list[int] = []
        for one in idle[::20]:
            one.post(*request("openai", max_tokens=1))
            answers.append(one.read_document()[0])
        assert answers == [200] * 10


def test_requests_in_the_hundreds_are_all_answered(tmp_path: Path) -> None:
    options = {"engine__max_rows": 4}
    with fake_server(tmp_path, **options) as server, ExitStack() as clients:
        many = [clients.enter_context(RawClient(server.url)) for _ in range(150)]
        for number, one in enumerate(many):
            one.post(*request("openai", max_tokens=5, stream=number % 2 == 0))
        for number, one in enumerate(many):
            if number % 2:
                assert one.read_document()[0] == 200
            else:
                assert b"[DONE]" in one.read_until(lambda data: data.endswith(b"0\r\n\r\n"))
        server.call(check_is_empty)


def test_a_stop_tells_streams_that_they_broke_off(tmp_path: Path) -> None:
    """After the grace, with an error instead of an end that looks like the model's own."""
    factory = GatedFactory()
    received: list[bytes] = []
    with fake_server(tmp_path, factory=factory, server__shutdown_grace_s=1.0) as server:
        streamed = RawClient(server.url)
        streamed.post(*request("openai", stream=True))
        whole = RawClient(server.url)
        whole.post(*request("openai"))
        streamed.read_until(lambda data: data.count(b"data: ") > 3)
        wait_until(lambda: server.engine.num_requests == 2)
        factory.gate.close()
        server.server.should_exit = True

        def read() -> None:
            received.append(streamed.read_until(lambda _: False))
            received.append(whole.read_until(lambda _: False))

        reader = threading.Thread(target=read)
        reader.start()
        reader.join(PATIENCE_S)
        factory.gate.open()
    assert b"the server is stopping" in received[0]
    assert b" 503 " in received[1]
    for one in (streamed, whole):
        one.socket.close()


def _readable(clients: list[RawClient]) -> list[RawClient]:
    """Those that have been answered."""
    found = []
    for client in clients:
        client.socket.settimeout(0.001)
        try:
            if client.socket.recv(1, socket.MSG_PEEK):
                found.append(client)
        except TimeoutError:
            continue
        finally:
            client.socket.settimeout(PATIENCE_S)
    return found


def _has_facts(data: Any) -> bool:
    """Whether this is a stream's last chunk, or an agent's whole reply."""
    return isinstance(data, dict) and ("keepwarm" in data or "finish_reason" in data)


def _json(body: bytes) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(body)
    return document
