"""What a client may send, and how long it may take, before its key is looked at."""

import gc
import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from keepwarm.core.errors import KeepwarmError
from keepwarm.server.edge import connection
from servers import FakeServer, fake_server
from sockets import RawClient
from waiting import wait_until

CHAT = "/v1/chat/completions"
LIMIT = 4096
KEYS = {"default": "first-key", "team": "other-key"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeServer]:
    """With keys, which no client of this module has unless it says so."""
    home = tmp_path_factory.mktemp("home")
    settings: dict[str, Any] = {
        "server__api_keys": KEYS,
        "server__max_head_bytes": LIMIT,
        "server__max_body_bytes": 20_000,
    }
    with fake_server(home, **settings) as running:
        yield running


@contextmanager
def hasty_server(home: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Iterator[Any]:
    """One that waits for nothing longer than a moment."""
    monkeypatch.setattr(connection, "LINGER_S", 0.2)
    times = {f"server__{name}_timeout_s": 0.3 for name in ("head", "body")}
    with fake_server(home, **times, **settings) as running:
        yield running


@pytest.fixture
def hasty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    with hasty_server(tmp_path, monkeypatch, server__max_body_bytes=100_000) as running:
        yield running


def num_connections(server: FakeServer) -> int:
    return len(server.server.server_state.connections)


def error_of(raw: RawClient) -> tuple[int, str]:
    """A refusal that came without the application: said once, and the connection ended."""
    status, headers, body = raw.read_document()
    assert headers["connection"] == "close"
    assert raw.read_until(lambda _: False) == b""
    return status, json.loads(body)["error"]["message"]


def get(path: str = "/health", *headers: str, host: str = "localhost") -> bytes:
    lines = [f"GET {path} HTTP/1.1", f"Host: {host}", *headers, "", ""]
    return "\r\n".join(lines).encode()


class TestHeads:
    @pytest.mark.parametrize(
        "head",
        [
            get("/health", "X: " + "a" * LIMIT),
            get("/health", "X" * LIMIT + ": a"),
            get("/" + "a" * LIMIT),
            get("/health", *(f"X-{n}: {'a' * 80}" for n in range(60))),
        ],
        ids=["value", "name", "path", "many"],
    )
    def test_too_large_is_refused(self, server: FakeServer, head: bytes) -> None:
        with RawClient(server.url) as raw:
            raw.socket.sendall(head)
            status, message = error_of(raw)
        assert status == 431
        assert "4,096 bytes" in message

    @pytest.mark.parametrize("begin", [b"GET /", b"GET / HTTP/1.1\r\nX: ", b"GET / HTTP/1.1\r\nX"])
    def test_one_that_never_ends_is_refused_while_it_comes(
        self, server: FakeServer, begin: bytes
    ) -> None:
        with RawClient(server.url) as raw:
            raw.socket.sendall(begin + b"a" * (2 * LIMIT))
            assert error_of(raw)[0] == 431

    def test_of_many_bytes_few_are_kept(
        self, server: FakeServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """300 MB in one header took 1 GB of memory: the parser keeps what has no end yet."""
        fed: list[int] = []
        feed = HttpToolsProtocol.data_received

        def counted(self: HttpToolsProtocol, data: bytes) -> None:
            fed.append(len(data))
            feed(self, data)

        monkeypatch.setattr(HttpToolsProtocol, "data_received", counted)
        with RawClient(server.url) as raw:
            raw.socket.sendall(b"GET / HTTP/1.1\r\nX: " + b"a" * (16 << 20))
            assert error_of(raw)[0] == 431
        assert LIMIT < sum(fed) < LIMIT + (128 << 10)

    def test_many_short_headers_are_refused(self, tmp_path: Path) -> None:
        with fake_server(tmp_path) as server, RawClient(server.url) as raw:
            raw.socket.sendall(get("/health", *("a:" for _ in range(300))))
            status, message = error_of(raw)
        assert (status, message) == (431, "there are more than 256 headers")

    def test_one_within_the_bound_is_read(self, server: FakeServer) -> None:
        with RawClient(server.url) as raw:
            for _ in range(3):
                raw.socket.sendall(get("/health", "X: " + "a" * (LIMIT - 200)))
                assert raw.read_document()[0] == 200

    def test_a_piece_at_a_time(self, server: FakeServer) -> None:
        with RawClient(server.url) as raw:
            for byte in get("/health"):
                raw.socket.sendall(bytes([byte]))
            assert raw.read_document()[0] == 200

    def test_what_is_no_http_is_refused(self, server: FakeServer) -> None:
        with RawClient(server.url) as raw:
            raw.socket.sendall(b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n")
            assert error_of(raw)[0] == 400


class TestTrailers:
    BEGIN = (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
        b"\r\n2\r\n{}\r\n0\r\n"
    )

    def test_they_are_bounded(self, server: FakeServer) -> None:
        with RawClient(server.url) as raw:
            raw.socket.sendall(self.BEGIN + b"X: " + b"a" * (3 * LIMIT))
            raw.read_until(lambda _: False)
        wait_until(lambda: not num_connections(server))

    def test_they_are_no_headers(self, server: FakeServer) -> None:
        with RawClient(server.url) as raw:
            raw.socket.sendall(self.BEGIN + b"X-Api-Key: first-key\r\nX-Request-ID: mine\r\n\r\n")
            status, headers, _ = raw.read_document()
        assert status == 401
        assert headers["x-request-id"] != "mine"


class TestHalfOpen:
    @pytest.mark.parametrize("sent", [b"G", b"GET / HTTP/1.1\r\nHost: a"])
    def test_half_a_head(self, hasty: FakeServer, sent: bytes) -> None:
        with RawClient(hasty.url) as raw:
            raw.socket.sendall(sent)
            status, message = error_of(raw)
        assert status == 408
        assert "0.3 seconds" in message

    def test_nothing_at_all(self, hasty: FakeServer) -> None:
        with RawClient(hasty.url) as raw:
            assert raw.read_until(lambda _: False) == b""

    @pytest.mark.parametrize("begin", [b"", get()])
    def test_a_byte_now_and_then(self, hasty: FakeServer, begin: bytes) -> None:
        """Also on a connection that has had its answer."""
        with RawClient(hasty.url) as raw:
            raw.socket.sendall(begin)
            with pytest.raises(OSError):
                while True:
                    raw.socket.sendall(b"\r\n")
                    time.sleep(0.02)

    def test_half_a_body(self, hasty: FakeServer) -> None:
        with RawClient(hasty.url) as raw:
            raw.socket.sendall(raw.request(CHAT, b'{"mod', {"Content-Length": "100"}))
            status, _, body = raw.read_document()
            assert status == 408
            assert "body_timeout_s" in json.loads(body)["error"]["message"]
            assert raw.read_until(lambda _: False) == b""

    def test_half_a_chunked_body(self, hasty: FakeServer) -> None:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        with RawClient(hasty.url) as raw:
            raw.socket.sendall(head.encode() + b"5\r\n{")
            assert raw.read_document()[0] == 408
            assert raw.read_until(lambda _: False) == b""

    @pytest.mark.parametrize("length", ["1000000000", "90000"])
    def test_a_body_that_no_route_reads(self, hasty: FakeServer, length: str) -> None:
        """Refused by its length, or not looked at; the client goes on sending a byte at a time."""
        with RawClient(hasty.url) as raw:
            raw.socket.sendall(raw.request("/v1/nothing", b"", {"Content-Length": length}))
            assert raw.read_document()[0] in (404, 413)
            with pytest.raises(OSError):
                while True:
                    raw.socket.sendall(b"x")
                    time.sleep(0.02)

    def test_a_body_that_goes_on_after_its_answer_may_end(self, hasty: FakeServer) -> None:
        with RawClient(hasty.url) as raw:
            raw.socket.sendall(raw.request("/v1/nothing", b"", {"Content-Length": "3"}))
            assert raw.read_document()[0] == 404
            raw.socket.sendall(b"abc" + get())
            assert raw.read_document()[0] == 200

    def test_a_slow_body_that_goes_on_is_waited_for(self, hasty: FakeServer) -> None:
        body = json.dumps({"model": "fake", "prompt": "x", "max_tokens": 1}).encode()
        body += b" " * (90_000 - len(body))
        with RawClient(hasty.url) as raw:
            raw.socket.sendall(raw.request("/v1/completions", b"", {"Content-Length": "90000"}))
            for start in range(0, len(body), 30_000):
                time.sleep(0.2)
                raw.socket.sendall(body[start : start + 30_000])
            assert raw.read_document()[0] == 200

    def test_an_idle_connection(self, tmp_path: Path) -> None:
        with (
            fake_server(tmp_path, server__keep_alive_s=1.0) as server,
            RawClient(server.url) as raw,
        ):
            raw.socket.sendall(get())
            assert raw.read_document()[0] == 200
            assert raw.read_until(lambda _: False) == b""


@pytest.mark.parametrize("extra", [(), ("Connection: close",)])
def test_an_answer_that_is_not_read(tmp_path: Path, extra: tuple[str, ...]) -> None:
    """A client that does not read is cut off on any route; documents and exports count too."""
    times = {"server__slow_reader_s": 0.3, "server__keep_alive_s": 1.0}
    with (
        fake_server(tmp_path, send_buffer=4096, **times) as server,
        RawClient(server.url, receive_buffer=4096) as raw,
    ):
        raw.socket.sendall(get("/openapi.json", *extra))
        wait_until(lambda: num_connections(server) == 1)
        wait_until(lambda: num_connections(server) == 0)


class TestNumberOfConnections:
    def test_one_too_many_is_told_so(self, tmp_path: Path) -> None:
        with fake_server(tmp_path, server__max_connections=3) as server, ExitStack() as opened:
            clients = [opened.enter_context(RawClient(server.url)) for _ in range(3)]
            wait_until(lambda: num_connections(server) == 3)
            with RawClient(server.url) as raw:
                raw.socket.sendall(get())
                status, message = error_of(raw)
                assert status == 503
                assert "max_connections" in message
            clients[0].socket.sendall(get())
            assert clients[0].read_document()[0] == 200
            clients[1].socket.close()
            wait_until(lambda: num_connections(server) == 2)
            assert httpx.get(f"{server.url}/health", trust_env=False).status_code == 200

    def test_also_one_that_says_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with (
            hasty_server(tmp_path, monkeypatch, server__max_connections=1) as server,
            RawClient(server.url) as first,
        ):
            wait_until(lambda: num_connections(server) == 1)
            with RawClient(server.url) as raw:
                assert error_of(raw)[0] == 503
            assert first.read_until(lambda _: False) == b""

    def test_of_those_there_are_not_many_either(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(connection, "MAX_REFUSED", 2)
        with fake_server(tmp_path, server__max_connections=1) as server, ExitStack() as opened:
            for number in range(3):
                opened.enter_context(RawClient(server.url))
                wait_until(lambda number=number: num_connections(server) == number + 1)
            with RawClient(server.url) as raw, pytest.raises(OSError):
                raw.socket.sendall(get())
                assert raw.read_until(lambda _: False) == b""
                raise ConnectionResetError  # or it ended without a word


class TestPipelines:
    def test_a_few_are_answered_in_order(self, server: FakeServer) -> None:
        paths = ["/health", "/v1/models", "/health/live", "/v1/stats"]
        with RawClient(server.url) as raw:
            raw.socket.sendall(b"".join(map(get, paths)))
            assert [raw.read_document()[0] for _ in paths] == [200, 401, 200, 401]

    def test_a_thousand_are_not_kept(self, server: FakeServer) -> None:
        with RawClient(server.url) as raw:
            raw.socket.sendall(get() * 1000)
            answered = raw.read_until(lambda _: False)
        assert answered.count(b"HTTP/1.1 200") <= connection.MAX_PIPELINED + 1


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("PUT", "/v1/agents/import", 413),
        ("PATCH", "/v1/agents/import", 413),
        ("GET", "/v1/agents/import", 413),
        ("POST", "/v1/agents/import/messages", 413),
        ("POST", "/v1/agents/import", 400),
    ],
)
def test_only_an_import_may_be_as_large_as_one(
    server: FakeServer, method: str, path: str, status: int
) -> None:
    with server.client(headers={"x-api-key": "first-key"}) as client:
        response = client.request(method, path, content=b"x" * 20_001)
        assert response.status_code == status


@pytest.mark.parametrize(
    "body", [b'"' + b"x" * 5000, b'{"messages": 1}', b"[" * 5000, b'{"model": "other"}']
)
def test_what_is_refused_is_not_kept(tmp_path: Path, body: bytes) -> None:
    """An error in a circle with its frames held its body until Python looked for circles."""

    def num_kept() -> int:
        errors = (RequestValidationError, HTTPException, KeepwarmError, ValueError)
        return sum(isinstance(value, errors) for value in gc.get_objects())

    with fake_server(tmp_path) as server, server.client() as client:
        assert client.post(CHAT, content=body).is_client_error
        gc.collect()
        gc.disable()
        try:
            before = num_kept()
            for _ in range(20):
                assert client.post(CHAT, content=body).is_client_error
            wait_until(lambda: num_kept() < before + 5)
        finally:
            gc.enable()
