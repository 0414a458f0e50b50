"""Agents that come and go over HTTP: beside everybody else, within bounds, and nothing is left."""

import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from engines import FakeFactory
from keepwarm.server.reply.transfers import Transfers
from keepwarm.store.disk.files import RecordFiles
from servers import FakeServer, fake_server, say
from sockets import RawClient
from waiting import PATIENCE_S, wait_until


def files_in(home: Path) -> list[Path]:
    folder = home / "transfers"
    return list(folder.iterdir()) if folder.is_dir() else []


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def server(home: Path) -> Iterator[FakeServer]:
    with fake_server(home, factory=FakeFactory(pause_s=0.001)) as running:
        yield running
        wait_until(lambda: not files_in(home))
        running.call(lambda engine: engine.check())
        assert not running.call(lambda engine: bool(engine._jobs))


@pytest.fixture
def client(server: FakeServer) -> Iterator[httpx.Client]:
    with server.client() as client:
        client.put("/v1/agents/ada", json={})
        say(client, "ada", "x" * 1500)
        yield client


@pytest.fixture
def bundle(client: httpx.Client) -> bytes:
    return client.get("/v1/agents/ada/export").content


def test_in_the_middle_of_a_reply(client: httpx.Client) -> None:
    body = {"content": "And?", "max_tokens": 2000, "stream": True}
    with client.stream("POST", "/v1/agents/ada/messages", json=body) as stream:
        lines = stream.iter_lines()
        while not next(lines).startswith("event: delta"):
            pass
        assert client.get("/v1/agents/ada").json()["running"]
        exported = client.get("/v1/agents/ada/export")
        assert exported.status_code == 200
        assert exported.headers["X-Keepwarm-Left-Out-Tokens"] == "0"
        assert client.get("/v1/agents/ada").json()["running"]
        imported = client.post("/v1/agents/import?id=eve", content=exported.content).json()
        assert imported["num_turns"] == 1
        assert imported["num_records"] >= 6
        assert "event: completed" in list(lines)
    assert client.get("/v1/agents/ada").json()["num_turns"] == 2


class Gate:
    """Holds the store's thread at the next record that it reads or writes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_there, self.may_go = threading.Event(), threading.Event()
        for name in ("read_into", "publish"):
            monkeypatch.setattr(RecordFiles, name, self._held(getattr(RecordFiles, name)))

    def _held(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def held(*arguments: Any, **more: Any) -> Any:
            self.is_there.set()
            assert self.may_go.wait(PATIENCE_S)
            return function(*arguments, **more)

        return held

    def until_there(self) -> None:
        assert self.is_there.wait(PATIENCE_S)


def get(server: FakeServer, path: str) -> RawClient:
    raw = RawClient(server.url, receive_buffer=4096)
    raw.socket.sendall(raw.request(path, b"").replace(b"POST", b"GET", 1))
    return raw


class TestBeside:
    """The store's thread stands still, and the engine and the event loop do not."""

    @pytest.mark.parametrize("way", ["export", "import"])
    def test_others_are_answered_meanwhile(
        self,
        server: FakeServer,
        client: httpx.Client,
        bundle: bytes,
        monkeypatch: pytest.MonkeyPatch,
        way: str,
    ) -> None:
        gate = Gate(monkeypatch)
        answers: list[int] = []

        def ask() -> None:
            with server.client() as other:
                if way == "export":
                    answers.append(other.get("/v1/agents/ada/export").status_code)
                else:
                    path = "/v1/agents/import?id=eve"
                    answers.append(other.post(path, content=bundle).status_code)

        thread = threading.Thread(target=ask)
        thread.start()
        try:
            gate.until_there()
            prompt = {"model": "fake", "prompt": "Hello", "max_tokens": 50}
            assert client.post("/v1/completions", json=prompt).status_code == 200
            assert client.get("/health").status_code == 200
            assert len(client.get("/v1/agents").json()["agents"]) == 1
            assert not answers
        finally:
            gate.may_go.set()
            thread.join(PATIENCE_S)
        assert answers == [200 if way == "export" else 201]

    def test_uploads_are_not_written_on_the_event_loop(
        self,
        server: FakeServer,
        client: httpx.Client,
        bundle: bytes,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        threads: list[threading.Thread] = []
        write = Transfers._write

        def noting(*arguments: Any) -> None:
            threads.append(threading.current_thread())
            write(*arguments)

        monkeypatch.setattr(Transfers, "_write", noting)
        assert client.post("/v1/agents/import?id=eve", content=bundle).status_code == 201
        assert threads
        assert not {thread.name for thread in threads} & {"fake-server", "keepwarm-engine"}


class TestHangingUp:
    """The work is called off, and its files go."""

    def test_while_an_agent_is_packed(
        self,
        server: FakeServer,
        client: httpx.Client,
        home: Path,
        bundle: bytes,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        gate = Gate(monkeypatch)
        raw = get(server, "/v1/agents/ada/export")
        gate.until_there()
        raw.reset()
        wait_until(lambda: not server.call(lambda engine: bool(engine._jobs)))
        gate.may_go.set()
        wait_until(lambda: not files_in(home))
        assert client.get("/v1/agents/ada/export").content == bundle

    def test_while_a_file_is_on_its_way(
        self, server: FakeServer, client: httpx.Client, home: Path, bundle: bytes
    ) -> None:
        raw = RawClient(server.url)
        whole = raw.request("/v1/agents/import?id=eve", bundle)
        raw.socket.sendall(whole[: len(whole) - 100])
        wait_until(lambda: len(files_in(home)) == 1)
        raw.reset()
        wait_until(lambda: not files_in(home))
        assert client.get("/v1/agents/eve").status_code == 404

    def test_while_an_agent_is_taken_in(
        self,
        server: FakeServer,
        client: httpx.Client,
        home: Path,
        bundle: bytes,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        num_records = server.call(lambda engine: engine.snapshot().store.num_records)
        gate = Gate(monkeypatch)
        raw = RawClient(server.url)
        raw.socket.sendall(raw.request("/v1/agents/import?id=eve", bundle))
        gate.until_there()
        raw.reset()
        wait_until(lambda: not server.call(lambda engine: bool(engine._jobs)))
        gate.may_go.set()
        wait_until(
            lambda: server.call(lambda engine: engine.snapshot().store.num_records) == num_records
        )
        assert client.get("/v1/agents/eve").status_code == 404
        assert client.post("/v1/agents/import?id=eve", content=bundle).status_code == 201

    def test_while_a_file_is_sent(self, home: Path) -> None:
        with fake_server(home, send_buffer=4096) as server, server.client() as client:
            large_agent(client)
            raw = get(server, "/v1/agents/ada/export")
            raw.read_until(lambda data: b"\r\n\r\n" in data)
            assert len(files_in(home)) == 1
            raw.reset()
            wait_until(lambda: not files_in(home))


def large_agent(client: httpx.Client) -> None:
    """Whose bundle no socket's buffers hold."""
    client.put("/v1/agents/ada", json={})
    for _ in range(3):
        say(client, "ada", "y" * 20_000)


def test_a_client_that_takes_nothing_is_cut_off(home: Path) -> None:
    with fake_server(home) as server, server.client() as client:
        large_agent(client)
        length = len(client.get("/v1/agents/ada/export").content)
    with (
        fake_server(home, send_buffer=4096, server__slow_reader_s=0.3) as server,
        server.client() as client,
    ):
        with get(server, "/v1/agents/ada/export") as slow:
            slow.read_until(lambda data: b"\r\n\r\n" in data)
            wait_until(lambda: not files_in(home))
            with suppress(ConnectionResetError):
                slow.read_until(lambda data: False)
            assert len(slow.received) < length
        assert client.get("/v1/agents/ada").status_code == 200


class TestFullDisks:
    @pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
    @pytest.mark.parametrize("place", ["_write", "new_path"])
    def test_an_upload_that_the_disk_refuses(
        self,
        client: httpx.Client,
        home: Path,
        bundle: bytes,
        monkeypatch: pytest.MonkeyPatch,
        code: int,
        place: str,
    ) -> None:
        def refuse(*_: Any) -> None:
            raise OSError(code, os.strerror(code), str(home))

        monkeypatch.setattr(Transfers, place, refuse)
        refused = client.post("/v1/agents/import?id=eve", content=bundle)
        assert refused.status_code == 507
        assert os.strerror(code) in refused.json()["error"]["message"]
        assert str(home) not in refused.text
        wait_until(lambda: not files_in(home))  # the fixture's export goes after its last byte
        monkeypatch.undo()
        assert client.get("/v1/agents/eve").status_code == 404
        assert client.post("/v1/agents/import?id=eve", content=bundle).status_code == 201

    @pytest.mark.parametrize("is_told", [True, False])
    def test_the_free_floor_is_left_to_others(
        self, home: Path, tmp_path: Path, is_told: bool
    ) -> None:
        """Whether the size is known from the head, or seen when it comes."""
        with fake_server(home) as server, server.client() as client:
            client.put("/v1/agents/ada", json={})
            say(client, "ada", "Hello")
            bundle = client.get("/v1/agents/ada/export").content
        floor = 1 << 60
        with (
            fake_server(tmp_path / "full", disk__free_floor_bytes=floor) as server,
            server.client() as client,
        ):
            content: Any = bundle if is_told else iter([bundle])
            refused = client.post("/v1/agents/import", content=content)
            assert refused.status_code == 507
            assert "must stay free" in refused.json()["error"]["message"]
            wait_until(lambda: not files_in(tmp_path / "full"))
            client.put("/v1/agents/eve", json={})
            exported = client.get("/v1/agents/eve/export")
            assert exported.status_code == 507
            assert str(tmp_path) not in exported.text
            wait_until(lambda: not files_in(tmp_path / "full"))


def test_only_post_is_an_import(client: httpx.Client) -> None:
    """An agent may be called `import`."""
    created = client.put("/v1/agents/import", json={"priority": 3})
    assert created.status_code == 201
    assert created.json()["id"] == "import"
    assert client.get("/v1/agents/import").json()["priority"] == 3
    assert client.delete("/v1/agents/import").status_code == 200


def test_a_file_is_its_owners_only(
    client: httpx.Client, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: list[int] = []
    write = Transfers._write

    def noting(self: Transfers, file: Any, piece: bytes) -> None:
        modes.append(os.fstat(file.fileno()).st_mode & 0o777)
        write(self, file, piece)

    monkeypatch.setattr(Transfers, "_write", noting)
    assert client.post("/v1/agents/import", content=b"none").status_code == 400
    assert modes == [0o600]
    assert (home / "transfers").stat().st_mode & 0o777 == 0o700
