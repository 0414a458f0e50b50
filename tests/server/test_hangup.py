"""Clients that go away, in every phase: nothing of them stays, and the engine stops at once."""

import asyncio
import random
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from doors import GatedFactory, check_is_empty
from keepwarm.fleet.fleet import Fleet
from keepwarm.service.event_stream import EventStream
from servers import FakeServer, fake_server
from sockets import RawClient
from stores import HeldAnswers
from waiting import wait_until

CHAT = "/v1/chat/completions"
NUM_HANG_UPS = 500
AT_ONCE = 10
AGENTS = ("ada", "eve", "bob")

Request = tuple[str, dict[str, Any]]


def chat(content: str = "Hello", *, stream: bool = True, **more: Any) -> Request:
    messages = [{"role": "user", "content": content}]
    body = {"model": "fake", "messages": messages, "max_tokens": 50_000, "stream": stream}
    return CHAT, {**body, **more}


def to_agent(name: str, content: str = "Hello", *, stream: bool = True, **more: Any) -> Request:
    body = {"content": content, "max_tokens": 50_000, "stream": stream, **more}
    return f"/v1/agents/{name}/messages", body


class Watch:
    """What has to be as it was before; and after how many steps a hang-up took effect."""

    def __init__(self, server: FakeServer) -> None:
        self.server = server
        self.num_tasks = len(asyncio.all_tasks(server.loop))
        self.steps: list[int] = []
        engine = server.call(lambda engine: engine)
        thread, cancel = server.engine._thread, server.engine._submissions._cancel
        ask = thread.ask

        def watched(stream: EventStream) -> None:
            done: list[int] = []

            def timed(call: Any) -> Any:
                return ask(lambda fleet: (call(fleet), done.append(engine.batch.counters.steps)))

            thread.ask = timed  # type: ignore[method-assign]
            cancel(stream)
            thread.ask = ask  # type: ignore[method-assign]
            before = engine.batch.counters.steps  # it has been told, and may be in a step
            ask(lambda _: self.steps.append(done[0] - before))

        server.engine._submissions._cancel = watched  # type: ignore[method-assign]

    def check(self) -> None:
        door = self.server.engine
        wait_until(lambda: not door.num_requests)
        wait_until(lambda: len(asyncio.all_tasks(self.server.loop)) <= self.num_tasks)
        wait_until(lambda: not self.server.call(lambda e: e.has_work))
        self.server.call(check_is_empty)
        assert door.is_idle
        assert not self.server.server.server_state.tasks
        assert max(self.steps, default=0) <= 1


@contextmanager
def watched(home: Path, **options: Any) -> Iterator[tuple[FakeServer, Watch]]:
    with fake_server(home, **options) as server:
        with server.client() as client:
            for name in AGENTS:
                assert client.put(f"/v1/agents/{name}", json={}).status_code == 201
        wait_until(lambda: not server.server.server_state.connections)
        watch = Watch(server)
        yield server, watch
        watch.check()


def test_five_hundred_hang_ups(tmp_path: Path) -> None:
    """Ten clients at once on two rows; each goes away somewhere else in its request."""
    options = {"engine__max_rows": 2, "memory__budget_bytes": 1 << 20}
    with watched(tmp_path, **options) as (server, watch):
        for round_number in range(NUM_HANG_UPS // AT_ONCE):
            rng = random.Random(round_number)  # noqa: S311 - to be the same each time
            with ExitStack() as clients:
                opened = [clients.enter_context(RawClient(server.url)) for _ in range(AT_ONCE)]
                rng.shuffle(opened)
                for client in opened:
                    begin(client, rng)
                for client in opened:
                    leave(client, rng)
            if round_number % 10 == 9:
                watch.check()
                with server.client() as other:
                    other.post(f"/v1/agents/{rng.choice(AGENTS)}/park")
    assert len(watch.steps) > NUM_HANG_UPS / 4


def begin(client: RawClient, rng: random.Random) -> None:
    """Sends a request, or a part of one."""
    length = rng.choice([1, 30, 3_000])
    limit = rng.choice([1, 3, 200, 20_000])
    content, stream = "x" * length, rng.random() < 0.6
    path, body = rng.choice(
        [
            chat(content, stream=stream, max_tokens=limit),
            chat(content, stream=stream, max_tokens=limit, n=3),
            chat(content, stream=stream, max_tokens=limit, user=rng.choice(AGENTS)),
            to_agent(rng.choice(AGENTS), content, stream=stream, max_tokens=limit),
        ]
    )
    if rng.random() < 0.1:
        data = client.request(path, b'{"model": "fake", "messages": ' + b" " * 5_000)
        client.socket.sendall(data[: -rng.randrange(1, 5_000)])
    else:
        client.post(path, body)


def leave(client: RawClient, rng: random.Random) -> None:
    """At once, after a while, in the middle of a reply, or while its end is sent."""
    how = rng.randrange(5)
    if how == 1:
        time.sleep(rng.random() * 0.01)
    elif how >= 2:
        client.socket.settimeout(rng.choice([0.002, 0.02]))
        enough = rng.choice([1, 400, 3_000])
        with suppress(TimeoutError):
            client.read_until(lambda data: len(data) >= enough or b"[DONE]" in data)
    if rng.random() < 0.3:
        client.reset()
    else:
        client.socket.close()


class _HeldDisk:
    """What was read from the disk does not arrive while it is held."""

    def __init__(self, server: FakeServer) -> None:
        self.held = HeldAnswers(are_held=True)
        server.call_fleet(self._take)

    def _take(self, fleet: Fleet) -> None:
        fetch, poll = fleet.store.fetch, fleet.store.poll

        def held_fetch(family: Any, record: Any, buffer: Any, answer: Any) -> None:
            fetch(family, record, buffer, self.held.through(answer))

        def held_poll() -> None:
            poll()
            self.held.deliver()

        fleet.store.fetch = held_fetch  # type: ignore[method-assign]
        fleet.store.poll = held_poll  # type: ignore[method-assign]


class TestWithinOneStep:
    """The generator is let through call by call, so steps can be counted."""

    @pytest.mark.parametrize("stream", [True, False])
    @pytest.mark.parametrize("calls", [0, 1, 2, 5])
    @pytest.mark.parametrize("reset", [True, False])
    def test_a_row_takes_no_further_step(
        self, tmp_path: Path, calls: int, stream: bool, reset: bool
    ) -> None:
        """In prefill, which takes three calls, and in decode."""
        factory = GatedFactory()
        options = {"factory": factory, "engine__idle_prefill_tokens": 256}
        with watched(tmp_path, **options) as (server, _), RawClient(server.url) as client:
            factory.gate.close()
            path, body = chat("y" * 700, stream=stream)
            client.post(path, body)
            wait_until(lambda: factory.gate.num_waited == 1)
            factory.gate.allow(calls)
            wait_until(lambda: factory.gate.num_waited == 1 + calls)
            self._go(server, client, reset=reset)
            factory.gate.allow(1)
            wait_until(lambda: not server.engine.num_requests)
            assert factory.gate.num_waited == 1 + calls
            factory.gate.open()

    @pytest.mark.parametrize("stream", [True, False])
    def test_choices_side_by_side(self, tmp_path: Path, stream: bool) -> None:
        factory = GatedFactory()
        with watched(tmp_path, factory=factory) as (server, _), RawClient(server.url) as client:
            path, body = chat(stream=stream, n=4)
            client.post(path, body)
            wait_until(lambda: server.engine.num_requests == 4)
            wait_until(lambda: factory.made[-1].batch_sizes[-1:] == [4])
            num_before = factory.gate.close()
            wait_until(lambda: factory.gate.num_waited == num_before + 1)
            self._go(server, client, num_cancels=4)
            factory.gate.allow(1)
            wait_until(lambda: not server.engine.num_requests)
            assert factory.gate.num_waited == num_before + 1
            factory.gate.open()

    @pytest.mark.parametrize("stream", [True, False])
    @pytest.mark.parametrize("where", ["queue", "turnstile"])
    def test_one_that_waits_is_forgotten(self, tmp_path: Path, where: str, stream: bool) -> None:
        factory = GatedFactory()
        options = {"factory": factory, "engine__max_rows": 1}
        with (
            watched(tmp_path, **options) as (server, _),
            RawClient(server.url) as first,
            RawClient(server.url) as second,
        ):
            factory.gate.close()
            first.post(*to_agent("ada"))
            wait_until(lambda: factory.gate.num_waited == 1)
            if where == "queue":
                second.post(*chat(stream=stream))
                wait_until(lambda: server.engine._thread._mailbox._commands.qsize() == 1)
            else:
                second.post(*to_agent("ada", stream=stream))
                wait_until(lambda: server.engine.num_waiting == 1)
            second.socket.close()
            if where == "queue":
                wait_until(lambda: server.engine._thread._mailbox._commands.qsize() >= 2)
            wait_until(lambda: not server.engine.num_waiting)
            self._let_step(factory)
            wait_until(lambda: server.engine.num_requests == 1)
            assert not factory.made[-1].batch_sizes or max(factory.made[-1].batch_sizes) == 1
            factory.gate.open()
            first.socket.close()

    @pytest.mark.parametrize("stream", [True, False])
    def test_while_its_kv_is_read(self, tmp_path: Path, stream: bool) -> None:
        with watched(tmp_path) as (server, _), server.client() as client:
            path, body = to_agent("ada", "y" * 2_000, stream=False, max_tokens=3)
            client.post(path, json=body).raise_for_status()
            client.post("/v1/agents/ada/park").raise_for_status()
            wait_until(lambda: client.get("/v1/agents/ada").json()["tier"] == "cold")
            disk = _HeldDisk(server)
            with RawClient(server.url) as raw:
                raw.post(*to_agent("ada", stream=stream))
                wait_until(lambda: len(disk.held))
            wait_until(lambda: not server.engine.num_requests)
            disk.held.are_held = False
            body = {"content": "Again", "max_tokens": 3}
            answer = client.post("/v1/agents/ada/messages", json=body).json()
            assert answer["turn"] == 2
            assert answer["cache"]["cached_tokens"] > 2_000

    def _go(
        self, server: FakeServer, client: RawClient, *, reset: bool = False, num_cancels: int = 1
    ) -> None:
        """Away, until the engine's thread has been told and has not looked yet."""
        if reset:
            client.reset()
        else:
            client.socket.close()
        commands = server.engine._thread._mailbox._commands
        wait_until(lambda: commands.qsize() >= num_cancels)

    def _let_step(self, factory: GatedFactory) -> None:
        waited = factory.gate.num_waited
        factory.gate.allow(2)
        wait_until(lambda: factory.gate.num_waited == waited + 2)


def test_a_request_that_runs_once_runs_on(tmp_path: Path) -> None:
    with watched(tmp_path) as (server, _):
        key = {"Idempotency-Key": "k"}
        path, body = to_agent("ada", max_tokens=300)
        for read in (0, 1, 500):
            with RawClient(server.url) as raw:
                raw.post(path, body, key)
                raw.read_until(lambda data, enough=read: len(data) >= enough)  # type: ignore[misc]
        with server.client() as client:
            again = client.post(path, json={**body, "stream": False}, headers=key)
            assert again.json()["usage"]["completion_tokens"] == 300
            assert len(client.get("/v1/agents/ada/turns").json()["turns"]) == 1


def test_what_was_said_before_the_hang_up_is_kept(tmp_path: Path) -> None:
    with watched(tmp_path) as (server, _), server.client() as client:
        with RawClient(server.url) as raw:
            raw.post(*to_agent("ada"))
            raw.read_until(lambda data: data.count(b"event: delta") > 5)
        wait_until(lambda: not server.engine.num_requests)
        (turn,) = client.get("/v1/agents/ada/turns").json()["turns"]
        assert turn["messages"][-1]["content"]
