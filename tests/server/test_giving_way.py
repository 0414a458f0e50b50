"""Over HTTP: a message is answered while its agent is prefetched or verified, and so are others."""

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from doors import (
    GatedFactory,
    Opener,
    cancel,
    check_is_empty,
    engine_of,
    message,
    reply,
    run,
    until,
)
from keepwarm.core.errors import EngineBroke, VerifyInterrupted
from servers import FakeServer, fake_server, say, send
from sockets import RawClient
from waiting import PATIENCE_S, wait_until

NUM_PREFETCHES = 6


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FakeServer]:
    """Where ada has a long conversation."""
    with fake_server(tmp_path, factory=GatedFactory(), engine__always_restore=True) as server:
        with server.client() as client:
            client.put("/v1/agents/ada", json={}).raise_for_status()
            say(client, "ada", "y" * 9_000, max_tokens=3)
        yield server


def gate_of(server: FakeServer) -> GatedFactory:
    assert isinstance(server.factory, GatedFactory)
    return server.factory


def test_a_message_right_after_a_prefetch(server: FakeServer) -> None:
    with server.client() as client:
        for number in range(NUM_PREFETCHES):
            client.post("/v1/agents/ada/park").raise_for_status()
            wait_until(lambda: client.get("/v1/agents/ada").json()["tier"] == "cold")
            client.post("/v1/agents/ada/prefetch").raise_for_status()
            answer = send(client, "ada", "And?")
            assert answer.status_code == 200
            assert answer.json()["turn"] == number + 2
            assert answer.json()["cache"]["cached_tokens"] > 9_000


class TestVerify:
    def test_a_message_calls_it_off(self, server: FakeServer) -> None:
        gate = gate_of(server).gate
        with server.client() as client, ThreadPoolExecutor(1) as pool:
            gate.close()
            verifying = pool.submit(client.post, "/v1/agents/ada/verify")
            gate.allow(3)
            wait_until(lambda: server.engine.num_answers)
            with server.client() as other:
                gate.open()
                assert send(other, "ada", "And?").status_code == 200
            answer = verifying.result(PATIENCE_S)
        assert answer.status_code == 409
        assert "interrupted" in answer.json()["error"]["message"]
        assert answer.headers["retry-after"]

    def test_others_are_answered_meanwhile(self, server: FakeServer) -> None:
        """The verification is held at its next unit again and again, and a reply goes on."""
        gate = gate_of(server).gate
        with server.client() as client, ThreadPoolExecutor(1) as pool:
            with RawClient(server.url) as raw:
                body = {"model": "fake", "prompt": "Hello", "max_tokens": 50_000, "stream": True}
                raw.post("/v1/completions", body)
                raw.read_until(lambda data: data.count(b"data: ") > 5)
                num_said = raw.received.count(b"data: ")
                verifying = pool.submit(client.post, "/v1/agents/ada/verify")
                wait_until(lambda: server.engine.num_answers)
                raw.read_until(lambda data: data.count(b"data: ") > num_said + 20)
                assert not verifying.done()
                report = verifying.result(PATIENCE_S).json()
            assert report["passed"]
            assert report["compared_tokens"] > 9_000
            assert gate.num_waited

    def test_a_client_that_hangs_up_ends_it(self, server: FakeServer) -> None:
        gate = gate_of(server).gate
        gate.close()
        with RawClient(server.url) as raw:
            raw.socket.sendall(raw.request("/v1/agents/ada/verify", b""))
            gate.allow(2)
            wait_until(lambda: server.engine.num_answers)
        wait_until(lambda: not server.engine.num_answers)
        num_waited = gate.num_waited
        gate.open()
        wait_until(lambda: not server.call(lambda engine: engine.has_work))
        assert gate.num_waited <= num_waited + 1
        server.call(check_is_empty)

    @pytest.mark.parametrize("turns", range(0, 40, 3))
    def test_cancelled_at_any_moment(self, turns: int) -> None:
        async def test() -> None:
            async with engine_of(Opener()) as engine:
                await engine.call_at("ada", lambda e: e.create("ada"))
                await reply(engine, message("y" * 3_000))
                verifying = asyncio.ensure_future(engine.verify("ada"))
                for number in range(turns):
                    await asyncio.sleep(0 if number % 3 else 0.0005)
                await cancel(verifying)
                assert not engine.num_answers
                await reply(engine, message("And?"))
                await engine.call_at("ada", check_is_empty)
                assert not await engine.call_at("ada", lambda e: bool(e._verifies))

        run(test())

    def test_an_engine_that_breaks_says_so(self) -> None:
        async def test() -> None:
            async with engine_of(Opener()) as engine:
                await engine.call_at("ada", lambda e: e.create("ada"))
                await reply(engine, message("y" * 3_000))
                broken = threading.Event()

                def break_soon(e: object) -> None:
                    def step(*_: object, **__: object) -> None:
                        broken.set()
                        raise ZeroDivisionError

                    e.step = step  # type: ignore[attr-defined]

                verifying = asyncio.ensure_future(engine.verify("ada"))
                await until(lambda: engine.num_answers)
                await engine.call_at("ada", break_soon)
                with pytest.raises((EngineBroke, VerifyInterrupted)):
                    await verifying
                assert broken.is_set()

        run(test())
