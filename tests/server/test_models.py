"""Models by name: loaded when they are asked for, swapped, unloaded, and refused."""

import asyncio
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from commands import keepwarm
from engines import DEVICE_S, FakeFactory, fake_loaded
from keepwarm.core.errors import EngineStopped, ModelLoadError
from keepwarm.core.ports import LoadedModel
from keepwarm.engine.requests import GenerateRequest
from keepwarm.fleet.fleet import Fleet
from keepwarm.service.event_stream import EventStream
from keepwarm.service.model_registry import ModelState
from keepwarm.testing.models import FixedSource
from servers import FakeServer, fake_server
from sockets import RawClient
from waiting import wait_until

TOML = """
[models.other]
aliases = ["gpt-*"]

[models.third]
temperature = 0.5
context_tokens = 500
"""
SCRIPTS = {"fake": b"f", "other": b"o", "third": b"t"}
CHAT = "/v1/chat/completions"


def fake_model(name: str, factory: FakeFactory | None = None) -> LoadedModel:
    factory = factory or FakeFactory(script=list(SCRIPTS[name]), pause_s=DEVICE_S)
    return replace(fake_loaded(factory=factory, fingerprint=name), name=name)


class Source(FixedSource):
    """Its loads fail as one says, once each, and may be held up."""

    def __init__(self, *models: LoadedModel, **options: Any) -> None:
        super().__init__(*models, **options)
        self.errors: list[Exception] = []
        self.open = threading.Event()
        self.open.set()
        self.loads: list[str] = []

    def load(self, model: Any) -> LoadedModel:
        self.open.wait(30.0)
        self.loads.append(model.name)
        if self.errors and model.name != "fake":
            raise self.errors.pop(0)
        return super().load(model)


@contextmanager
def served(
    home: Path,
    *,
    room: int = 1000,
    toml: str = TOML,
    factory: FakeFactory | None = None,
    **flags: object,
) -> Iterator[tuple[FakeServer, Source]]:
    """Each model has 100 bytes, of the `room` for all."""
    path = home / "keepwarm.toml"
    path.write_text(toml)
    models = [fake_model("fake", factory), fake_model("other"), fake_model("third")]
    source = Source(*models, sizes=dict.fromkeys(SCRIPTS, 100))
    options = {"model__memory_bytes": room, "model__patience_s": 5.0, **flags}
    with fake_server(home / "home", source=source, config_file=path, **options) as server:
        yield server, source


def ask(client: httpx.Client, model: str, content: str = "Hello", **more: Any) -> httpx.Response:
    body = {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": 4}
    return client.post(CHAT, json={**body, **more})


def text_of(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


def states(client: httpx.Client) -> dict[str, str]:
    return {card["id"]: card["state"] for card in client.get("/v1/models").json()["data"]}


class TestByName:
    def test_side_by_side_where_there_is_room(self, tmp_path: Path) -> None:
        with served(tmp_path) as (server, source), server.client() as c:
            assert states(c) == {"fake": "ready", "other": "known", "third": "known"}
            for model, reply in (("fake", "ffff"), ("other", "oooo"), ("gpt-4o", "oooo")):
                assert text_of(ask(c, model)) == reply
            assert states(c) == {"fake": "ready", "other": "ready", "third": "known"}
            assert source.loads == ["fake", "other"]

    def test_what_is_too_long_does_not_wait_for_its_model(self, tmp_path: Path) -> None:
        options = {"server__heartbeat_s": 1.0}
        with served(tmp_path, **options) as (server, source), server.client() as c:
            assert text_of(ask(c, "third")) == "tttt"
            c.post("/v1/models/third/unload").raise_for_status()
            source.open.clear()
            answer = ask(c, "third", "x" * 2000, stream=True)
            source.open.set()
            assert answer.status_code == 400
            assert "prompt is too long: " in answer.text
            assert source.loads == ["fake", "third"]

    def test_swapped_where_there_is_not(self, tmp_path: Path) -> None:
        options = {"room": 100}
        with served(tmp_path, **options) as (server, source), server.client() as c:
            headers = {"X-Agent-ID": "ada"}
            long = "x" * 700
            for model in ("fake", "other", "fake", "other"):
                body = {"model": model, "max_tokens": 4}
                messages = [{"role": "user", "content": long}]
                answer = c.post(CHAT, json={**body, "messages": messages}, headers=headers)
                assert text_of(answer) == model[0] * 4
            assert "tier=cold" in answer.headers["X-Keepwarm-Cache"]
            assert source.loads == ["fake", "other", "fake", "other"]
            assert list(states(c).values()).count("ready") == 1

    def test_what_runs_waits_when_patience_ends_and_goes_on(self, tmp_path: Path) -> None:
        options = {"room": 100, "model__patience_s": 0.05}
        factory = FakeFactory(script=list(b"f"), pause_s=0.001)
        with (
            served(tmp_path, factory=factory, **options) as (server, _),
            server.client() as client,
            ThreadPoolExecutor(4) as pool,
        ):
            running = [pool.submit(ask, client, "fake", max_tokens=3000) for _ in range(3)]
            wait_until(lambda: server.engine.num_requests == 3)
            wait_until(lambda: server.call(lambda engine: len(engine.batch.running)) == 3)
            assert text_of(ask(client, "other")) == "oooo"
            for future in running:
                assert text_of(future.result(60.0)) == "f" * 3000
            snapshot = server.call_fleet(lambda fleet: fleet.snapshot())
            assert snapshot.batch.preemptions >= 3

    def test_many_at_once_on_two_models(self, tmp_path: Path) -> None:
        """No request is lost, none is answered by the wrong model, and agents keep their turns."""
        options = {"room": 100, "model__patience_s": 0.2}
        with (
            served(tmp_path, **options) as (server, source),
            server.client() as client,
            ThreadPoolExecutor(8) as pool,
        ):
            names = [f"agent-{number}" for number in range(8)]
            for name in names:
                assert client.put(f"/v1/agents/{name}", json={}).status_code == 201

            def talk(name: str) -> None:
                for turn in range(1, 7):
                    model = ("fake", "other")[(turn + hash(name)) % 2]
                    body = {"content": f"turn {turn}", "model": model, "max_tokens": 5}
                    answer = client.post(f"/v1/agents/{name}/messages", json=body)
                    assert answer.status_code == 200, answer.text
                    assert answer.json()["turn"] == turn
                    assert answer.json()["message"]["content"] == model[0] * 5

            for future in [pool.submit(talk, name) for name in names]:
                future.result(120.0)
            assert len(source.loads) > 3
            server.call_fleet(lambda fleet: fleet.check())
            for model in server.engine.models.registry:  # type: ignore[union-attr]
                assert model.num_requests == 0

    def test_an_agents_own_model(self, tmp_path: Path) -> None:
        with served(tmp_path) as (server, _), server.client() as c:
            path = "/v1/agents/ada/messages"
            assert c.put("/v1/agents/ada", json={}).json()["model"] == "fake"
            body = {"content": "Hello", "max_tokens": 3}
            assert c.post(path, json=body).json()["message"]["content"] == "fff"
            answer = c.post(path, json={**body, "model": "other"})
            assert answer.json()["message"]["content"] == "ooo"
            assert c.get("/v1/agents/ada").json()["model"] == "other"
            assert c.post(path, json=body).json()["message"]["content"] == "ooo"
            cards = {card["id"]: card for card in c.get("/v1/models").json()["data"]}
            assert (cards["fake"]["agents"], cards["other"]["agents"]) == (0, 1)
            c.post("/v1/models/other/unload")
            assert c.post("/v1/agents/ada/verify").json()["passed"]
            assert states(c)["other"] == "ready"

    def test_an_agents_own_model_after_a_restart(self, tmp_path: Path) -> None:
        """The one that is not served any more is answered for by the default one."""
        path = "/v1/agents/ada/messages"
        body = {"content": "Hello", "max_tokens": 3}
        with served(tmp_path) as (server, _), server.client() as c:
            c.put("/v1/agents/ada", json={})
            assert c.post(path, json={**body, "model": "other"}).status_code == 200
        with served(tmp_path) as (server, _), server.client() as c:
            assert states(c)["other"] == "known"
            assert c.get("/v1/agents/ada").json()["model"] == "other"
            assert [agent["model"] for agent in c.get("/v1/agents").json()["agents"]] == ["other"]
            answer = c.post(path, json=body).json()
            assert answer["message"]["content"] == "ooo"
            assert answer["turn"] == 2
        with (
            served(tmp_path, toml="", model__auto_load="known") as (server, _),
            server.client() as c,
        ):
            answer = c.post(path, json=body).json()
            assert answer["message"]["content"] == "fff"
            assert answer["turn"] == 3
            assert c.get("/v1/agents/ada").json()["model"] == "fake"

    def test_one_that_may_not_be_loaded_is_answered_for(self, tmp_path: Path) -> None:
        path = "/v1/agents/ada/messages"
        body = {"content": "Hello", "max_tokens": 3}
        with served(tmp_path) as (server, _), server.client() as c:
            c.put("/v1/agents/ada", json={})
            assert c.post(path, json={**body, "model": "other"}).status_code == 200
        with served(tmp_path, model__auto_load="never") as (server, _), server.client() as c:
            assert c.post(path, json=body).json()["message"]["content"] == "fff"

    def test_a_temperature_of_its_own(self, tmp_path: Path) -> None:
        with served(tmp_path) as (server, _), server.client() as client:
            seen: list[float] = []
            submit = server.engine.submit

            async def watched(request: GenerateRequest) -> EventStream:
                seen.append(request.temperature)
                return await submit(request)

            server.engine.submit = watched  # type: ignore[method-assign]
            client.put("/v1/agents/ada", json={})
            for more in ({"model": "third"}, {}, {"model": "fake"}, {}):
                body = {"content": "Hello", "max_tokens": 2, **more}
                assert client.post("/v1/agents/ada/messages", json=body).status_code == 200
            assert seen == [0.5, 0.5, 0.0, 0.0]

    def test_settings_of_its_own(self, tmp_path: Path) -> None:
        with served(tmp_path) as (server, _), server.client() as client:
            assert ask(client, "fake", "x" * 800).status_code == 200
            refused = ask(client, "third", "x" * 800)
            assert refused.status_code == 400
            assert "500" in refused.text
            assert client.get("/v1/models/third").json()["context_length"] == 500

    def test_unknown(self, tmp_path: Path) -> None:
        with served(tmp_path) as (server, _), server.client() as client:
            for answer in (ask(client, "nobody"), client.get("/v1/models/nobody")):
                assert answer.status_code == 404
                assert "'other'" in answer.text


class TestLoadAndUnload:
    def test_over_http(self, tmp_path: Path) -> None:
        with served(tmp_path) as (server, _), server.client() as client:
            card = client.post("/v1/models/other/load").json()
            assert (card["state"], card["fingerprint"], card["memory_bytes"]) == (
                "ready",
                "other",
                100,
            )
            assert client.post("/v1/models/other/load").json()["loads"] == 1
            assert client.post("/v1/models/gpt-4/unload").json()["state"] == "known"
            assert client.post("/v1/models/nobody/load").status_code == 404

    def test_as_events(self, tmp_path: Path) -> None:
        with served(tmp_path) as (server, source), server.client() as c:
            source.open.clear()
            headers = {"Accept": "text/event-stream"}
            with c.stream("POST", "/v1/models/other/load", headers=headers) as answer:
                lines: list[str] = []
                for line in filter(None, answer.iter_lines()):
                    lines.append(line)
                    if '"state":"loading"' in line:
                        source.open.set()
            assert source.open.is_set()
            assert lines[-2] == "event: done"
            assert json.loads(lines[-1].removeprefix("data: "))["state"] == "ready"
            source.errors = [ModelLoadError("x.safetensors", "it is truncated", "Fetch it again")]
            with c.stream("POST", "/v1/models/third/load", headers=headers) as answer:
                last = answer.read().decode().strip().split("\n\n")[-1]
            assert last.startswith("event: error")
            assert "truncated" in last

    def test_from_the_command_line(self, tmp_path: Path) -> None:
        with served(tmp_path) as (server, source):
            done = keepwarm("models", "load", "other", url=server.url)
            assert done.code == 0
            assert "other is ready" in done.out
            shown = keepwarm("models", "show", "other", url=server.url).out
            assert shown.startswith("other is ready, ")
            assert shown.endswith("\ncomputed by a fake\n")
            card = keepwarm("models", "show", "other", "--json", url=server.url).json
            assert (card["id"], card["computed_by"]) == ("other", "computed by a fake")
            rows = keepwarm("models", "ls", "--json", url=server.url).json
            assert [row["state"] for row in rows] == ["ready", "ready", "known"]
            table = keepwarm("models", "ls", url=server.url).out
            assert "other" in table
            assert (
                keepwarm("models", "unload", "other", "--json", url=server.url).json["id"]
                == "other"
            )
            source.errors = [ModelLoadError("x.safetensors", "it is truncated", "Fetch it again")]
            failed = keepwarm("models", "load", "other", url=server.url)
            assert failed.code == 1
            assert failed.err.count("\n") == 1
            assert "truncated" in failed.err

    def test_the_default_model_can_go_as_well(self, tmp_path: Path) -> None:
        with served(tmp_path) as (server, _), server.client() as client:
            client.put("/v1/agents/ada", json={"system": "Be brief."})
            assert client.post("/v1/models/fake/unload").json()["state"] == "known"
            assert client.get("/v1/agents/ada").json()["system"] == "Be brief."
            assert client.post("/v1/agents/ada/fork", json={"new_id": "eve"}).status_code == 201
            assert text_of(ask(client, "fake")) == "ffff"

    def test_one_that_is_not_used(self, tmp_path: Path) -> None:
        toml = TOML + "idle_unload_s = 0.2\n"
        options = {"toml": toml}
        with served(tmp_path, **options) as (server, source), server.client() as client:
            assert text_of(ask(client, "third")) == "tttt"
            wait_until(lambda: states(client)["third"] == "known")
            assert text_of(ask(client, "third")) == "tttt"
            assert source.loads.count("third") == 2


class TestRefusals:
    def test_twenty_loads_that_fail(self, tmp_path: Path) -> None:
        """The model that made room comes back, and its agents have lost nothing."""
        kinds: list[Exception] = [
            ModelLoadError("config.json", "the file is missing", "Fetch it"),
            MemoryError("no memory"),
            RuntimeError("[load_safetensors] invalid"),
            OSError(5, "Input/output error"),
            ValueError("shapes do not agree"),
        ]
        options = {"room": 100}
        with served(tmp_path, **options) as (server, source), server.client() as client:
            client.put("/v1/agents/ada", json={})
            for number in range(1, 21):
                source.errors = [kinds[number % len(kinds)]]
                refused = client.post("/v1/models/other/load")
                assert refused.status_code == 503
                assert refused.headers["Retry-After"]
                assert (
                    str(kinds[number % len(kinds)]).split(":")[0]
                    in refused.json()["error"]["message"]
                )
                body = {"content": f"turn {number}", "max_tokens": 3}
                answer = client.post("/v1/agents/ada/messages", json=body).json()
                assert answer["turn"] == number
                assert states(client) == {"fake": "ready", "other": "failed", "third": "known"}
            source.errors = []
            assert client.post("/v1/models/other/load").json()["state"] == "ready"

    @pytest.mark.parametrize("auto_load", ["known", "never"])
    def test_who_made_room_comes_back_unasked(self, tmp_path: Path, auto_load: str) -> None:
        options = {"room": 100, "model__auto_load": auto_load}
        with served(tmp_path, **options) as (server, source), server.client() as client:
            source.errors = [StopIteration()]
            assert client.post("/v1/models/other/load").status_code == 503
            wait_until(lambda: states(client)["fake"] == "ready")
            assert text_of(ask(client, "fake")) == "ffff"

    def test_the_default_model_is_tried_whatever_the_numbers_say(self, tmp_path: Path) -> None:
        with served(tmp_path, room=50) as (server, _), server.client() as client:
            assert text_of(ask(client, "fake")) == "ffff"
            assert ask(client, "other").status_code == 400

    def test_a_failed_model_is_not_tried_for_every_request(self, tmp_path: Path) -> None:
        with served(tmp_path) as (server, source), server.client() as c:
            source.errors = [ModelLoadError("f", "it is damaged", "Fetch it")]
            for _ in range(3):
                refused = ask(c, "other")
                assert refused.status_code == 503
                assert "damaged" in refused.text
                assert 0 < int(refused.headers["Retry-After"]) <= 30
            assert source.loads == ["fake", "other"]

    def test_too_large(self, tmp_path: Path) -> None:
        options = {"room": 150}
        with served(tmp_path, **options) as (server, source), server.client() as client:
            source._sizes["other"] = 151
            refused = ask(client, "other")
            assert refused.status_code == 400
            assert "151" in refused.text
            assert "150" in refused.text
            assert states(client)["fake"] == "ready"
            source._sizes["other"] = 120
            assert ask(client, "other").status_code == 200

    def test_no_room_beside_a_pinned_one(self, tmp_path: Path) -> None:
        toml = TOML + "\n[models.fake]\npinned = true\n"
        options = {"room": 150, "toml": toml}
        with served(tmp_path, **options) as (server, _), server.client() as client:
            refused = ask(client, "other")
            assert refused.status_code == 503
            assert refused.headers["Retry-After"]
            assert states(client)["other"] == "known"

    def test_nor_for_the_default_one(self, tmp_path: Path) -> None:
        toml = TOML.replace("[models.other]", "[models.other]\npinned = true")
        with served(tmp_path, room=150, toml=toml) as (server, _), server.client() as client:
            client.post("/v1/models/fake/unload")
            assert text_of(ask(client, "other")) == "oooo"
            assert ask(client, "fake").status_code == 503
            assert text_of(ask(client, "other")) == "oooo"

    def test_where_requests_load_nothing(self, tmp_path: Path) -> None:
        options = {"model__auto_load": "never"}
        with served(tmp_path, **options) as (server, _), server.client() as client:
            refused = ask(client, "other")
            assert refused.status_code == 409
            assert "model.auto_load" in refused.text
            assert client.post("/v1/models/other/load").status_code == 200
            assert text_of(ask(client, "other")) == "oooo"

    def test_any_name_where_that_is_allowed(self, tmp_path: Path) -> None:
        options = {"model__auto_load": "any"}
        with served(tmp_path, **options) as (server, source), server.client() as client:
            assert ask(client, "x/y").status_code == 200
            assert states(client)["x/y"] == "ready"
            source.errors = [ModelLoadError("a/b", "there is no such folder", "Check it")]
            for _ in range(3):
                assert ask(client, "a/b").status_code == 503
            assert source.loads == ["fake", "x/y", "a/b"]
            assert ask(client, "c/d", temperature=-1).status_code == 400
            assert text_of(ask(client, "other")) == "oooo"
            assert "c/d" not in states(client)

    def test_who_waits_too_long_for_a_model(self, tmp_path: Path) -> None:
        options = {"server__queue_timeout_s": 0.3}
        with served(tmp_path, **options) as (server, source), server.client() as client:
            source.open.clear()
            try:
                refused = ask(client, "other")
            finally:
                source.open.set()
            assert refused.status_code == 503
            wait_until(lambda: states(client)["other"] == "ready")
            assert text_of(ask(client, "other")) == "oooo"

    def test_who_has_gone_does_not_count_as_waiting(self, tmp_path: Path) -> None:
        options = {"engine__max_waiting": 3, "server__queue_timeout_s": 0.1}
        with served(tmp_path, **options) as (server, source), server.client() as client:
            source.open.clear()
            try:
                assert {ask(client, "other").status_code for _ in range(5)} == {503}
            finally:
                source.open.set()

    def test_a_deadline_counts_the_load(self, tmp_path: Path) -> None:
        with served(tmp_path, server__deadline_s=0.2) as (server, source), server.client() as c:
            source.open.clear()
            try:
                assert ask(c, "other").status_code == 504
            finally:
                source.open.set()

    def test_after_a_stop_no_request_waits(self, tmp_path: Path) -> None:
        with served(tmp_path) as (server, _):
            models = server.engine.models
            assert models is not None

            async def load() -> None:
                await models.stop()
                with pytest.raises(EngineStopped):
                    await models.load("other")

            asyncio.run_coroutine_threadsafe(load(), server.loop).result(10.0)

    def test_agents_can_be_managed_after_a_bug_while_the_default_model_is_away(
        self, tmp_path: Path
    ) -> None:
        with served(tmp_path, room=100) as (server, _), server.client() as client:
            client.put("/v1/agents/ada", json={"system": "Be brief."})
            assert text_of(ask(client, "other")) == "oooo"

            def spoil(fleet: Fleet) -> None:
                fleet.step = lambda: 1 // 0  # type: ignore[assignment,method-assign,return-value]

            server.call_fleet(spoil)
            wait_until(lambda: client.get("/v1/agents/ada").status_code == 200)
            body = {"content": "Hello", "model": "fake", "max_tokens": 2}
            assert client.post("/v1/agents/ada/messages", json=body).json()["turn"] == 1

    def test_who_hangs_up_while_waiting_leaves_nothing(self, tmp_path: Path) -> None:
        with served(tmp_path) as (server, source), server.client() as c:
            models = server.engine.models
            assert models is not None
            source.open.clear()
            messages = [{"role": "user", "content": "Hello"}]
            with RawClient(server.url) as raw:
                raw.post(CHAT, {"model": "other", "messages": messages, "stream": True})
                wait_until(lambda: models.num_waiting == 1)
            wait_until(lambda: not any(any(w.futures) for w in models._wanted.values()))
            source.open.set()
            wait_until(lambda: models.registry.get("other").state is ModelState.READY)
            assert models.registry.get("other").num_requests == 0
            assert text_of(ask(c, "other")) == "oooo"
