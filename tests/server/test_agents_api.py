"""The agents API over HTTP, on the fake generator and a real store."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import sse
from servers import FakeServer, fake_server, say

KEY = {"Idempotency-Key": "key-1"}
OTHER_KEY = {"Authorization": "Bearer other-key"}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FakeServer]:
    with fake_server(tmp_path) as running:
        yield running
        running.call(lambda engine: engine.check())


def events_of(response: httpx.Response) -> list[tuple[str, dict[str, Any]]]:
    return [(event.name, event.data) for event in sse.events_of(response.text)]


def error_of(response: httpx.Response) -> tuple[int, str, str | None]:
    error = response.json()["error"]
    assert error["message"]
    return response.status_code, error["type"], error["param"]


class TestCreation:
    def test_put_creates_and_then_changes(self, client: httpx.Client) -> None:
        body = {"system": "Be brief.", "priority": 3, "pinned": True, "overflow": "drop_oldest"}
        created = client.put("/v1/agents/ada", json=body)
        assert created.status_code == 201
        assert created.json() == client.get("/v1/agents/ada").json()
        assert {key: created.json()[key] for key in body} == body
        again = client.put("/v1/agents/ada", json=body)
        assert (again.status_code, again.json()) == (200, created.json())
        changed = client.put("/v1/agents/ada", json={"pinned": False, "quota_bytes": 5})
        assert changed.json()["pinned"] is False
        assert changed.json()["priority"] == 3
        assert changed.json()["quota_bytes"] == 5
        assert client.put("/v1/agents/ada", json={}).json()["quota_bytes"] == 5
        lifted = client.put("/v1/agents/ada", json={"quota_bytes": None})
        assert lifted.json()["quota_bytes"] is None

    def test_another_system_prompt_is_a_conflict(self, client: httpx.Client) -> None:
        client.put("/v1/agents/ada", json={"system": "Be brief."})
        refused = client.put("/v1/agents/ada", json={"system": "Be long."})
        assert error_of(refused) == (409, "agent_exists", None)

    @pytest.mark.parametrize(
        ("body", "param"),
        [
            ({"kv_policy": "q8"}, "kv_policy"),
            ({"priority": 101}, "priority"),
            ({"overflow": "drop_newest"}, "overflow"),
            ({"sytem": "typo"}, "sytem"),
            ({"system": 5}, "system"),
            ([], "body"),
        ],
    )
    def test_a_wrong_field_is_named(self, client: httpx.Client, body: Any, param: str) -> None:
        refused = client.put("/v1/agents/ada", json=body)
        assert refused.status_code == 400
        assert error_of(refused)[2] == param
        assert client.get("/v1/agents/ada").status_code == 404

    @pytest.mark.parametrize("name", ["-ada", "a" * 129, "a b", "a%00b", "\u00e4da"])
    def test_a_wrong_name_is_refused(self, client: httpx.Client, name: str) -> None:
        assert error_of(client.put(f"/v1/agents/{name}", json={}))[:2] == (400, "invalid_request")

    def test_an_unknown_agent_is_not_found(self, client: httpx.Client) -> None:
        for method, path, body in (
            ("GET", "", None),
            ("DELETE", "", None),
            ("GET", "/turns", None),
            ("GET", "/export", None),
            ("POST", "/messages", {"content": "Hi"}),
            ("POST", "/fork", {"new_id": "eve"}),
            ("POST", "/rollback", {"turn": 0}),
            ("POST", "/park", None),
            ("POST", "/prefetch", None),
            ("POST", "/verify", None),
        ):
            answer = client.request(method, f"/v1/agents/ada{path}", json=body)
            assert error_of(answer) == (404, "not_found", None), path

    def test_listing_goes_page_by_page(self, client: httpx.Client) -> None:
        names = [f"agent-{number}" for number in range(5)]
        for name in names:
            client.put(f"/v1/agents/{name}", json={})
        seen: list[str] = []
        while True:
            query = {"limit": 2, **({"after": seen[-1]} if seen else {})}
            page = client.get("/v1/agents", params=query).json()
            seen += [agent["id"] for agent in page["agents"]]
            if not page["has_more"]:
                break
        assert seen == names


class TestMessages:
    def test_only_the_new_message_is_sent(self, client: httpx.Client) -> None:
        client.put("/v1/agents/ada", json={"system": "Be brief."})
        first = say(client, "ada", "Hello")
        second = say(client, "ada", "More")
        assert [first["turn"], second["turn"]] == [1, 2]
        assert second["cache"]["tier"] == "hot"
        held = first["usage"]["prompt_tokens"] + first["usage"]["completion_tokens"] - 1
        assert second["usage"]["cached_tokens"] == held
        assert (second["cache"]["reason"], second["cache"]["message"]) == ("new_message", 3)
        rows = client.get("/v1/agents/ada/turns").json()["turns"]
        said = [[message["content"] for message in row["messages"]] for row in rows]
        assert said == [
            ["Be brief.", "Hello", first["message"]["content"]],
            ["More", second["message"]["content"]],
        ]

    def test_streamed_it_says_the_same(self, client: httpx.Client) -> None:
        client.put("/v1/agents/ada", json={})
        client.put("/v1/agents/eve", json={})
        whole = say(client, "ada", "Hello", max_tokens=20)
        response = client.post(
            "/v1/agents/eve/messages", json={"content": "Hello", "max_tokens": 20, "stream": True}
        )
        events = events_of(response)
        assert events[0][0] == "started"
        assert events[-1][0] == "completed"
        assert {name for name, _ in events} <= {"started", "progress", "delta", "completed"}
        text = "".join(data["text"] for name, data in events if name == "delta")
        document = events[-1][1]
        assert text == document["message"]["content"] == whole["message"]["content"]
        for field in ("usage", "finish_reason", "turn"):
            expected = whole[field]
            if field == "usage":  # what the first agent computed is found by the second
                expected = {**expected, "cached_tokens": document["usage"]["cached_tokens"]}
            assert document[field] == expected

    def test_messages_to_one_agent_take_turns(self, server: FakeServer) -> None:
        import threading

        with server.client() as client:
            client.put("/v1/agents/ada", json={})
            turns: list[int] = []

            def send(number: int) -> None:
                turns.append(say(client, "ada", f"message {number}", max_tokens=30)["turn"])

            threads = [threading.Thread(target=send, args=(number,)) for number in range(6)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
            assert sorted(turns) == [1, 2, 3, 4, 5, 6]

    def test_a_tool_result_may_be_sent(self, client: httpx.Client) -> None:
        client.put("/v1/agents/ada", json={})
        message = {"role": "tool", "content": "42", "tool_call_id": "call-1"}
        body = {"messages": [message], "max_tokens": 2}
        assert client.post("/v1/agents/ada/messages", json=body).status_code == 200
        (row,) = client.get("/v1/agents/ada/turns").json()["turns"]
        assert row["messages"][0] == message

    def test_no_limit_and_nothing(self, client: httpx.Client) -> None:
        client.put("/v1/agents/ada", json={})
        whole = say(client, "ada", "Hello", max_tokens=30)["message"]["content"]
        client.put("/v1/agents/eve", json={})
        nothing = dict.fromkeys(("stream", "temperature", "top_p", "top_k", "min_p"))
        stop = whole[20:24]
        more = {"seed": -1, "max_tokens": -1, "stop": ["", stop, None]}
        reply = say(client, "eve", "Hello", **nothing, **more)
        assert reply["stop_sequence"] == stop
        assert reply["message"]["content"] == whole[: whole.index(stop)]

    @pytest.mark.parametrize(
        "body",
        [
            {},
            {"content": "a", "messages": [{"content": "b"}]},
            {"messages": []},
            {"content": "a", "max_tokens": 0},
            {"content": "a", "temperature": -1},
            {"content": "a", "max_tokens": -2},
            {"content": "a", "seed": -2},
            {"content": "a", "stop": [5]},
            {"content": "a", "tools": []},
        ],
    )
    def test_a_wrong_body_changes_nothing(self, client: httpx.Client, body: Any) -> None:
        client.put("/v1/agents/ada", json={})
        refused = client.post("/v1/agents/ada/messages", json=body)
        assert refused.status_code == 400
        assert error_of(refused)[2]
        assert client.get("/v1/agents/ada/turns").json()["turns"] == []


class TestChanges:
    @pytest.fixture(autouse=True)
    def _spoken(self, client: httpx.Client) -> None:
        client.put("/v1/agents/ada", json={})
        for text in ("One", "Two", "Three"):
            say(client, "ada", text)

    def test_fork_knows_what_its_parent_knew(self, client: httpx.Client) -> None:
        settings = {"priority": -7, "overflow": "drop_oldest", "quota_bytes": 1 << 20}
        client.put("/v1/agents/ada", json={**settings, "pinned": True})
        forked = client.post("/v1/agents/ada/fork", json={"new_id": "eve", "at_turn": 2})
        assert forked.status_code == 201
        assert {key: forked.json()[key] for key in settings} == settings
        assert not forked.json()["pinned"]
        assert forked.json()["num_turns"] == 2
        assert say(client, "eve", "Three")["turn"] == 3
        taken = client.post("/v1/agents/ada/fork", json={"new_id": "eve"})
        assert error_of(taken)[:2] == (409, "agent_exists")

    def test_rollback_forgets(self, client: httpx.Client) -> None:
        assert client.post("/v1/agents/ada/rollback", json={"turn": 1}).json()["num_turns"] == 1
        assert say(client, "ada", "Again")["turn"] == 2
        too_far = client.post("/v1/agents/ada/rollback", json={"turn": 9})
        assert error_of(too_far) == (400, "invalid_request", "turn")

    def test_park_and_prefetch_keep_everything(
        self, client: httpx.Client, server: FakeServer
    ) -> None:
        before = client.get("/v1/agents/ada").json()
        client.post("/v1/agents/ada/park")
        for _ in range(500):
            parked = client.get("/v1/agents/ada").json()
            if parked["tier"] == "cold":
                break
        assert parked["tier"] == "cold"
        assert parked["context_tokens"] == before["context_tokens"]
        client.post("/v1/agents/ada/prefetch")
        reply = say(client, "ada", "Four")
        assert reply["usage"]["cached_tokens"] >= before["context_tokens"] - 1

    def test_verify_compares_with_a_cold_run(self, client: httpx.Client) -> None:
        report = client.post("/v1/agents/ada/verify").json()
        assert report["passed"]
        assert report["compared_tokens"] > 0
        assert report["largest_difference"] == 0.0

    def test_delete_leaves_nothing(self, client: httpx.Client) -> None:
        assert client.delete("/v1/agents/ada").json() == {"id": "ada", "deleted": True}
        assert client.get("/v1/agents").json()["agents"] == []
        assert client.get("/v1/agents/ada").status_code == 404

    def test_export_and_import(
        self, client: httpx.Client, server: FakeServer, tmp_path: Path
    ) -> None:
        bundle = client.get("/v1/agents/ada/export")
        assert bundle.status_code == 200
        assert bundle.headers["X-Keepwarm-Left-Out-Tokens"] == "0"
        taken = client.post("/v1/agents/import", content=bundle.content)
        assert error_of(taken)[:2] == (409, "agent_exists")
        imported = client.post("/v1/agents/import", params={"id": "eve"}, content=bundle.content)
        assert imported.status_code == 201
        assert imported.json()["num_turns"] == 3
        assert client.get("/v1/agents/eve").json()["private"]
        assert client.post("/v1/agents/eve/verify").json()["became_shared"]
        assert say(client, "eve", "Four")["turn"] == 4
        assert not list((tmp_path / "transfers").iterdir())

    def test_a_bundle_that_is_none_is_refused(self, client: httpx.Client, tmp_path: Path) -> None:
        refused = client.post("/v1/agents/import", params={"id": "eve"}, content=b"not a bundle")
        assert error_of(refused)[:2] == (400, "invalid_request")
        assert str(tmp_path) not in refused.text
        assert not list((tmp_path / "transfers").iterdir())
        assert client.get("/v1/agents/eve").status_code == 404


class TestIdempotency:
    def test_the_same_request_runs_once(self, client: httpx.Client) -> None:
        client.put("/v1/agents/ada", json={})
        first = say(client, "ada", "Hello", headers=KEY)
        again = say(client, "ada", "Hello", headers=KEY)
        for field in ("message", "finish_reason", "usage"):
            assert again[field] == first[field]
        assert len(client.get("/v1/agents/ada/turns").json()["turns"]) == 1

    def test_also_after_a_restart_and_streamed(self, tmp_path: Path) -> None:
        with fake_server(tmp_path / "home") as server, server.client() as client:
            client.put("/v1/agents/ada", json={})
            first = say(client, "ada", "Hello", headers=KEY)
        with fake_server(tmp_path / "home") as server, server.client() as client:
            body = {"content": "Hello", "max_tokens": 4, "stream": True}
            response = client.post("/v1/agents/ada/messages", json=body, headers=KEY)
            events = events_of(response)
            assert events[-1][1]["message"] == first["message"]
            assert server.factory.num_prefilled == 0
            assert len(client.get("/v1/agents/ada/turns").json()["turns"]) == 1

    def test_another_request_under_the_key_is_refused(self, client: httpx.Client) -> None:
        client.put("/v1/agents/ada", json={})
        say(client, "ada", "Hello", headers=KEY)
        body = {"content": "Other", "max_tokens": 4}
        refused = client.post("/v1/agents/ada/messages", json=body, headers=KEY)
        assert error_of(refused)[:2] == (409, "conflict")

    def test_an_agent_that_has_one_moves_with_it(
        self, client: httpx.Client, tmp_path: Path
    ) -> None:
        """There a request that is sent again is answered; under a new name it is a new one."""
        client.put("/v1/agents/ada", json={})
        first = say(client, "ada", "Hello", headers=KEY)
        client.post("/v1/agents/ada/fork", json={"new_id": "eve"})
        assert say(client, "eve", "Hello", headers=KEY)["turn"] == 2
        bundles = [client.get(f"/v1/agents/{name}/export") for name in ("ada", "eve")]
        assert [bundle.status_code for bundle in bundles] == [200, 200]
        with fake_server(tmp_path / "other") as other, other.client() as there:
            assert there.post("/v1/agents/import", content=bundles[0].content).status_code == 201
            again = say(there, "ada", "Hello", headers=KEY)
            assert again["message"] == first["message"]
            assert len(there.get("/v1/agents/ada/turns").json()["turns"]) == 1
            there.post("/v1/agents/import", params={"id": "bob"}, content=bundles[0].content)
            assert say(there, "bob", "Hello", headers=KEY)["turn"] == 2

    def test_a_key_is_its_agents_own(self, client: httpx.Client) -> None:
        for name in ("ada", "eve"):
            client.put(f"/v1/agents/{name}", json={})
            assert say(client, name, "Hello", headers=KEY)["turn"] == 1


def test_two_keys_are_two_worlds(tmp_path: Path) -> None:
    keys = {"default": "first-key", "team": "other-key"}
    with fake_server(tmp_path, server__api_keys=keys) as server:
        with server.client(headers={"x-api-key": "first-key"}) as client:
            client.put("/v1/agents/ada", json={"system": "one"})
            say(client, "ada", "x" * 600)
            bundle = client.get("/v1/agents/ada/export").content
        with server.client(headers=OTHER_KEY) as client:
            assert client.get("/v1/agents").json()["agents"] == []
            assert client.get("/v1/agents/ada").status_code == 404
            client.put("/v1/agents/ada", json={"system": "one"})
            assert say(client, "ada", "x" * 600)["usage"]["cached_tokens"] == 0
            imported = client.post("/v1/agents/import", params={"id": "eve"}, content=bundle)
            assert imported.json()["agent_id"] == "eve"
            assert client.post("/v1/agents/eve/verify").json()["became_shared"]
            names = [agent["id"] for agent in client.get("/v1/agents").json()["agents"]]
            assert names == ["ada", "eve"]
