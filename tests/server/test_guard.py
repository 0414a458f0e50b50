"""Who is let in, with what, and what errors look like in each dialect."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from keepwarm.server.operations.logs import log_formatter
from keepwarm.server.settings import LogFormat
from servers import FakeServer, fake_server
from sockets import RawClient

CHAT = "/v1/chat/completions"
BODY = {
    "model": "fake",
    "messages": [{"role": "user", "content": "Hello world"}],
    "max_tokens": 4,
}
KEYS = {"server__api_keys": {"default": "key-of-default", "blue": "key-of-blue", "red": "key-red"}}
POSTS = (CHAT, "/v1/completions", "/v1/messages", "/v1/agents/ada/messages")
PROMPT = "xyzzy-plugh"


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def shape(response: httpx.Response) -> str:
    """Whose error this is."""
    document = response.json()
    if document.get("type") == "error":
        assert set(document["error"]) == {"type", "message"}
        assert document["request_id"] == response.headers["x-request-id"]
        return "anthropic"
    assert set(document) == {"error"}
    return "openai" if "code" in document["error"] else "agents"


def shape_of(path: str) -> str:
    if path.startswith("/v1/messages"):
        return "anthropic"
    return "agents" if path.startswith("/v1/agents") else "openai"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeServer]:
    """One without keys, for what changes nothing in it."""
    with fake_server(tmp_path_factory.mktemp("home"), server__max_body_bytes=20_000) as running:
        with running.client() as client:
            client.put("/v1/agents/ada", json={})
        yield running


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeServer]:
    with fake_server(tmp_path_factory.mktemp("keyed"), **KEYS) as running:
        yield running


class TestKeys:
    @pytest.mark.parametrize("path", [*POSTS, "/v1/models", "/v1/agents", "/v1/stats", "/metrics"])
    @pytest.mark.parametrize(
        "headers",
        [
            {},
            bearer("wrong"),
            {"Authorization": "Bearer"},
            {"x-api-key": "wrong"},
            {"Authorization": "Basic key-of-blue"},
            {"Authorization": "key-of-blue"},
        ],
    )
    def test_without_one_nothing_is_answered(
        self, keyed: FakeServer, path: str, headers: dict[str, str]
    ) -> None:
        with keyed.client() as client:
            method = "POST" if path in POSTS else "GET"
            response = client.request(method, path, headers=headers)
            assert response.status_code == 401
            assert response.headers["www-authenticate"] == "Bearer"
            assert shape(response) == shape_of(path)
            assert "authentication_error" in response.text or shape_of(path) == "agents"
            assert "wrong" not in response.text

    @pytest.mark.parametrize("path", ["/health", "/health/live", "/health/ready", "/"])
    def test_whether_it_lives_may_be_asked(self, keyed: FakeServer, path: str) -> None:
        with keyed.client() as client:
            assert client.get(path).status_code == 200

    @pytest.mark.parametrize(
        "headers",
        [
            bearer("key-of-blue"),
            {"Authorization": "bearer key-of-blue"},
            {"x-api-key": "key-of-blue"},
        ],
    )
    def test_either_header_has_it(self, keyed: FakeServer, headers: dict[str, str]) -> None:
        with keyed.client() as client:
            assert client.get("/v1/models", headers=headers).status_code == 200

    def test_two_keys_share_nothing(self, keyed: FakeServer) -> None:
        """Two keys' agents of one name are two agents, and their prompt is computed for each."""
        body = {**BODY, "messages": [{"role": "user", "content": "Hello " * 300}], "user": "ada"}
        anonymous = {key: value for key, value in body.items() if key != "user"}
        with keyed.client() as client:
            for key in ("key-of-blue", "key-red", "key-of-default"):
                for asked in (body, {**anonymous, "messages": [{"role": "user", "content": "y"}]}):
                    first = client.post(CHAT, json=asked, headers=bearer(key)).json()
                    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
                again = client.post(CHAT, json=anonymous, headers=bearer(key)).json()
                assert again["usage"]["prompt_tokens_details"]["cached_tokens"] >= 256
                shown = client.get("/v1/agents", headers=bearer(key)).json()["agents"]
                assert [agent["id"] for agent in shown] == ["ada"]
                stats = client.get("/v1/stats", headers=bearer(key)).json()
                assert [agent["id"] for agent in stats["agents"]] == ["ada"]

    def test_another_keys_agent_is_unknown(self, keyed: FakeServer) -> None:
        with keyed.client() as client:
            client.put("/v1/agents/eve", json={}, headers=bearer("key-of-blue"))
            for key in ("key-red", "key-of-default"):
                for method, path in (
                    ("GET", "/v1/agents/eve"),
                    ("DELETE", "/v1/agents/eve"),
                    ("GET", "/v1/agents/eve/turns"),
                    ("GET", "/v1/agents/eve/export"),
                    ("POST", "/v1/agents/eve/park"),
                    ("POST", "/v1/agents/eve/verify"),
                    ("GET", "/v1/agents/blue%2Feve"),
                ):
                    response = client.request(method, path, headers=bearer(key))
                    assert response.status_code in (400, 404), (path, response.text)
                fork = client.post(
                    "/v1/agents/eve/fork", json={"new_id": "mine"}, headers=bearer(key)
                )
                assert fork.status_code == 404
                named = {**bearer(key), "X-Agent-ID": "blue/eve"}
                assert client.post(CHAT, json=BODY, headers=named).status_code == 400
            kept = client.get("/v1/agents/eve", headers=bearer("key-of-blue"))
            assert kept.status_code == 200


class TestRoles:
    """The key of the namespace `default` is an admin's, the others are users'."""

    ADMIN, USER = bearer("key-of-default"), bearer("key-of-blue")

    @pytest.mark.parametrize(
        ("method", "path"),
        [
            ("POST", "/v1/models/fake/load"),
            ("POST", "/v1/models/fake/unload"),
            ("GET", "/metrics"),
        ],
    )
    def test_the_house_is_the_admins(self, keyed: FakeServer, method: str, path: str) -> None:
        with keyed.client() as client:
            for key in ("key-of-blue", "key-red"):
                response = client.request(method, path, headers=bearer(key))
                assert response.status_code == 403
                assert "server.admins" in response.text
            assert client.request(method, path, headers=self.ADMIN).status_code == 200
            assert client.post("/v1/models/fake/load", headers=self.ADMIN).status_code == 200

    def test_a_user_sees_no_figures_of_others(self, keyed: FakeServer) -> None:
        with keyed.client() as client:
            for key in (self.ADMIN, self.USER):
                client.put("/v1/agents/roles", json={}, headers=key)
                client.post(CHAT, json={**BODY, "user": "roles"}, headers=key)
            (model,) = client.get("/v1/models", headers=self.USER).json()["data"]
            assert model["requests"] is model["loads"] is None
            own = client.get("/v1/agents", headers=self.USER).json()["agents"]
            assert model["agents"] == len(own) > 0
            assert client.get("/v1/models/fake", headers=self.USER).json() == model
            stats = client.get("/v1/stats", headers=self.USER).json()
            assert set(stats) == {"version", "models", "num_agents", "agents"}
            assert stats["models"][0]["requests"] is None
            assert stats["num_agents"] == len(own)

    def test_an_admin_sees_those_of_all(self, keyed: FakeServer) -> None:
        with keyed.client() as client:
            client.post(CHAT, json=BODY, headers=self.USER)
            (model,) = client.get("/v1/models", headers=self.ADMIN).json()["data"]
            assert model["requests"] is not None
            stats = client.get("/v1/stats", headers=self.ADMIN).json()
            assert stats["models"][0]["loads"] > 0
            assert stats["batch"]["steps"] > 0

    @pytest.mark.parametrize(
        ("settings", "is_admin"),
        [
            ({"api_keys": {"team": "k"}}, True),
            ({"api_keys": {"team": "k", "other": "l"}}, False),
            ({"api_keys": {"team": "k", "other": "l"}, "admins": ["team"]}, True),
            ({"api_keys": {"team": "k", "default": "l"}, "admins": ["default"]}, False),
            ({"api_keys": "team=k,other=l", "admins": "team,other"}, True),
            ({}, True),
        ],
    )
    def test_whose_key_is_an_admins(
        self, tmp_path: Path, settings: dict[str, Any], is_admin: bool
    ) -> None:
        flags = {f"server__{name}": value for name, value in settings.items()}
        with fake_server(tmp_path, **flags) as server, server.client(headers=bearer("k")) as client:
            assert client.get("/metrics").status_code == (200 if is_admin else 403)
            assert ("pool" in client.get("/v1/stats").json()) == is_admin


class TestHosts:
    @pytest.mark.parametrize(
        "host",
        [
            "evil.example",
            "evil.example:80",
            "127.0.0.1.evil.example",
            "localhost.evil.example",
            "internal",
            "evilinternal",
            "host.docker.internal.evil.example",
            "127.0.0.2",
        ],
    )
    def test_a_name_that_points_here_is_refused(self, client: httpx.Client, host: str) -> None:
        response = client.get("/v1/models", headers={"Host": host})
        assert response.status_code == 403
        assert response.json()["error"]["type"] == "permission_error"

    @pytest.mark.parametrize("path", ["/health", "/health/live", "/health/ready"])
    def test_but_health_is_told_to_all(self, client: httpx.Client, path: str) -> None:
        for host in ("evil.example", "", "["):
            assert client.get(path, headers={"Host": host}).status_code == 200

    @pytest.mark.parametrize("host", ["", "[", ":80", "a]b:1"])
    def test_no_name_at_all_is_a_mistake(self, client: httpx.Client, host: str) -> None:
        assert client.get("/v1/models", headers={"Host": host}).status_code == 400

    @pytest.mark.parametrize("version", ["1.0", "1.1"])
    @pytest.mark.parametrize("hosts", ["", "Host: localhost\r\nHost: evil.example\r\n"])
    def test_one_is_needed(self, server: FakeServer, version: str, hosts: str) -> None:
        with RawClient(server.url) as raw:
            raw.socket.sendall(f"GET /v1/models HTTP/{version}\r\n{hosts}\r\n".encode())
            status, _, body = raw.read_document()
        assert status == 400
        assert "Host" in json.loads(body)["error"]["message"]

    def test_also_where_every_name_is_answered(self, tmp_path: Path) -> None:
        with fake_server(tmp_path, server__host="::") as server:
            with RawClient(server.url) as raw:
                raw.socket.sendall(b"GET /v1/models HTTP/1.1\r\n\r\n")
                assert raw.read_document()[0] == 400
            with server.client() as client:
                assert client.get("/v1/models", headers={"Host": "any.example"}).is_success

    @pytest.mark.parametrize(
        "host",
        [
            "localhost",
            "LOCALHOST:1",
            "127.0.0.1:8642",
            "[::1]:8642",
            "localhost.",
            "localhost.:1",
            "keepwarm.localhost:8642",
            "host.docker.internal:8642",
            "gateway.docker.internal",
            "Host.Containers.Internal.",
        ],
    )
    def test_loopback_has_several(self, client: httpx.Client, host: str) -> None:
        assert client.get("/v1/models", headers={"Host": host}).status_code == 200

    def test_others_may_be_allowed(self, tmp_path: Path) -> None:
        with (
            fake_server(tmp_path, server__allowed_hosts=["Box.local", "other:80"]) as server,
            server.client() as client,
        ):
            for host in ("box.local:80", "box.local.", "other", "OTHER:1"):
                assert client.get("/v1/models", headers={"Host": host}).status_code == 200
            assert client.get("/v1/models", headers={"Host": "box.example"}).status_code == 403

    @pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://[", "x", ""])
    def test_other_pages_may_not_send(self, client: httpx.Client, origin: str) -> None:
        response = client.post(CHAT, json=BODY, headers={"Origin": origin})
        assert response.status_code == 403
        assert "access-control-allow-origin" not in response.headers

    @pytest.mark.parametrize("site", ["cross-site", "same-site", "anything"])
    @pytest.mark.parametrize(
        ("method", "path"),
        [
            ("POST", CHAT),
            ("PUT", "/v1/agents/bob"),
            ("DELETE", "/v1/agents/ada"),
            ("POST", "/v1/agents/ada/park"),
            ("POST", "/v1/models/fake/unload"),
            ("GET", "/v1/agents/ada/export"),
            ("HEAD", "/v1/agents/ada/export"),
            ("GET", "/v1/agents/ada//export/"),
        ],
    )
    def test_nor_those_that_do_not_say_who_they_are(
        self, client: httpx.Client, method: str, path: str, site: str
    ) -> None:
        """Images and scripts have no Origin. Another port of this machine is the same site."""
        answer = client.request(method, path, headers={"Sec-Fetch-Site": site})
        assert answer.status_code == 403
        assert client.get("/v1/agents/ada").status_code == 200

    @pytest.mark.parametrize("site", ["same-origin", "none"])
    def test_our_own_page_and_what_was_typed_may(self, client: httpx.Client, site: str) -> None:
        headers = {"Sec-Fetch-Site": site}
        assert client.get("/v1/agents/ada/export", headers=headers).status_code == 200
        assert client.post(CHAT, json=BODY, headers=headers).status_code == 200

    @pytest.mark.parametrize("path", ["/", "/docs", "/v1/models", "/v1/agents/ada/turns"])
    def test_a_link_on_another_page_may_be_followed(self, client: httpx.Client, path: str) -> None:
        answer = client.get(path, headers={"Sec-Fetch-Site": "cross-site"})
        assert answer.status_code == 200

    def test_our_own_page_may(self, client: httpx.Client, server: FakeServer) -> None:
        response = client.post(CHAT, json=BODY, headers={"Origin": server.url})
        assert response.status_code == 200

    def test_no_page_is_told_that_it_may_read(self, client: httpx.Client) -> None:
        headers = {"Origin": "http://app.example", "Access-Control-Request-Method": "POST"}
        response = client.options(CHAT, headers=headers)
        assert response.status_code == 403
        assert not [name for name in response.headers if name.startswith("access-control")]

    def test_a_page_that_was_allowed_may_send_and_read(self, tmp_path: Path) -> None:
        origin = "http://app.example"
        with (
            fake_server(tmp_path, server__allowed_origins=[origin], **KEYS) as server,
            server.client() as client,
        ):
            asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
            assert client.options(CHAT, headers=asked).status_code == 200
            sent = {"Origin": origin, **bearer("key-red"), "Sec-Fetch-Site": "cross-site"}
            response = client.post(CHAT, json=BODY, headers=sent)
            assert response.status_code == 200
            assert response.headers["access-control-allow-origin"] == origin
            assert "X-Keepwarm-Cache" in response.headers["access-control-expose-headers"]
            other = {**sent, "Origin": "http://evil.example"}
            assert client.post(CHAT, json=BODY, headers=other).status_code == 403

    def test_it_may_come_from_the_internet(self, tmp_path: Path) -> None:
        """Chrome asks before it lets a public page call a private network."""
        name = "Access-Control-Allow-Private-Network"
        origin = "https://ui.example"
        with (
            fake_server(tmp_path, server__allowed_origins=[origin]) as server,
            server.client() as client,
        ):
            asked = {
                "Origin": origin,
                "Access-Control-Request-Method": "POST",
                "Access-Control-Request-Headers": "authorization,content-type",
            }
            private = {**asked, "Access-Control-Request-Private-Network": "true"}
            assert name not in client.options(CHAT, headers=asked).headers
            answer = client.options(CHAT, headers=private)
            assert answer.status_code == 200
            assert answer.headers[name] == "true"
            other = client.options(CHAT, headers={**private, "Origin": "https://evil.example"})
            assert other.status_code == 400
            assert "access-control-allow-origin" not in other.headers


class TestBodies:
    @pytest.mark.parametrize("path", POSTS)
    def test_too_large_is_refused_by_its_length(self, server: FakeServer, path: str) -> None:
        with RawClient(server.url) as raw:
            raw.socket.sendall(raw.request(path, b"", {"Content-Length": "20001"}))
            status, _, body = raw.read_document()
        self._check(status, json.loads(body), path)

    @pytest.mark.parametrize("path", POSTS)
    def test_or_as_it_comes(self, client: httpx.Client, path: str) -> None:
        response = client.post(
            path, content=iter([b" " * 15_000] * 2), headers={"Content-Type": "application/json"}
        )
        self._check(response.status_code, response.json(), path)

    def _check(self, status: int, document: Any, path: str) -> None:
        assert status == 413
        assert "20,000 bytes" in document["error"]["message"]
        kind = {"anthropic": "request_too_large", "agents": "request_too_large"}
        assert document["error"]["type"] == kind.get(shape_of(path), "invalid_request_error")

    @pytest.mark.parametrize("path", POSTS)
    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"{",
            b"nonsense",
            b"[]",
            b"null",
            b'"text"',
            b"\xff\xfe\x00",
            b"[" * 19_000,
            b'{"a":' * 3_800,
            b'{"model": "fake", "messages": ' + b"[" * 15_000,
            b'{"seed": ' + b"9" * 6_000 + b"}",
        ],
    )
    def test_what_is_no_request_is_refused(
        self, client: httpx.Client, path: str, content: bytes
    ) -> None:
        headers = {"Content-Type": "application/json"}
        response = client.post(path, content=content, headers=headers)
        assert response.status_code == 400
        assert shape(response) == shape_of(path)
        if shape_of(path) != "anthropic":
            assert response.json()["error"]["param"]

    @pytest.mark.parametrize("path", POSTS)
    def test_what_is_not_called_json_is_refused(self, client: httpx.Client, path: str) -> None:
        response = client.post(path, content=b"a=b", headers={"Content-Type": "text/plain"})
        assert response.status_code == 400
        assert shape(response) == shape_of(path)

    @pytest.mark.parametrize(
        "body",
        [
            {"model": "\ud800"},
            {"messages": [{"role": "user", "content": "a\ud800"}]},
            {"messages": [{"role": "\ud800", "content": "a"}]},
            {"messages": [{"role": "user", "content": [{"type": "\ud800"}]}]},
            {"messages": [{"role": "user", "content": "a", "name": "\udfff"}]},
            {"user": "\ud800"},
            {"\ud800": "\ud800"},
            {"stop": ["\ud800"]},
            {"max_tokens": "\ud800"},
        ],
    )
    @pytest.mark.parametrize("stream", [False, True])
    def test_half_a_surrogate_pair_harms_nothing(
        self, client: httpx.Client, body: dict[str, Any], stream: bool
    ) -> None:
        content = json.dumps({**BODY, "stream": stream, **body}).encode()
        headers = {"Content-Type": "application/json"}
        assert client.post(CHAT, content=content, headers=headers).status_code in (200, 400, 404)

    @pytest.mark.parametrize(
        ("path", "body"),
        [
            ("/v1/agents/x", {"system": "\ud800"}),
            ("/v1/agents/x", {"\ud800": 1}),
            ("/v1/agents/x", {"kv_policy": "\ud800"}),
            ("/v1/agents/ada/messages", {"content": "\ud800"}),
            ("/v1/agents/ada/messages", {"content": "a", "\ud800": 1}),
            ("/v1/agents/ada/messages", {"messages": [{"content": "a", "name": "\ud800"}]}),
            ("/v1/agents/ada/messages", {"messages": [{"content": "a", "tool_call_id": "\ud800"}]}),
            ("/v1/agents/ada/fork", {"new_id": "\ud800"}),
        ],
    )
    def test_nor_in_the_agents_api(
        self, client: httpx.Client, path: str, body: dict[str, Any]
    ) -> None:
        method = "PUT" if path.endswith("/x") else "POST"
        content = json.dumps(body).encode()
        response = client.request(
            method, path, content=content, headers={"Content-Type": "application/json"}
        )
        assert response.status_code in (200, 201, 400)
        assert client.get("/v1/agents/ada/turns").status_code == 200
        assert client.get("/v1/agents").status_code == 200


class TestPaths:
    @pytest.mark.parametrize(
        "path", ["/v1/nothing", "/nothing", "/v1/messages/x", "/v1/agents/a/x"]
    )
    @pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
    def test_an_unknown_one_is_not_found(
        self, client: httpx.Client, path: str, method: str
    ) -> None:
        response = client.request(method, path)
        assert response.status_code == 404
        assert shape(response) == shape_of(path)

    @pytest.mark.parametrize("path", POSTS)
    def test_a_wrong_method_says_which_is_right(self, client: httpx.Client, path: str) -> None:
        response = client.get(path)
        assert response.status_code == 405
        assert response.headers["allow"] == "POST"
        assert shape(response) == shape_of(path)

    @pytest.mark.parametrize("path", ["/health", "/v1/models", "/", "/v1/agents", "/metrics"])
    def test_head_is_get_without_a_body(self, client: httpx.Client, path: str) -> None:
        response = client.head(path)
        assert response.status_code == 200
        assert response.content == b""
        assert client.head("/v1/nothing").status_code == 404

    def test_every_answer_has_an_id(self, client: httpx.Client) -> None:
        for path in ("/health", "/v1/nothing", CHAT):
            ids = {client.get(path).headers["x-request-id"] for _ in range(3)}
            assert len(ids) == 3
        assert client.get("/health", headers={"X-Request-ID": "my.id-1"}).headers[
            "x-request-id"
        ] == ("my.id-1")
        bad = client.get("/health", headers={"X-Request-ID": "a b\t" + "c" * 100})
        assert bad.headers["x-request-id"].startswith("req_")


def test_so_many_requests_in_a_minute(tmp_path: Path) -> None:
    """For each key; health may always be asked for."""
    with (
        fake_server(tmp_path, server__rate_per_minute=3, **KEYS) as server,
        server.client() as client,
    ):
        for key in ("key-red", "key-of-blue"):
            answers = [client.get("/v1/models", headers=bearer(key)) for _ in range(5)]
            assert [a.status_code for a in answers] == [200, 200, 200, 429, 429]
            assert 1 <= int(answers[-1].headers["retry-after"]) <= 61
            assert answers[-1].json()["error"]["type"] == "rate_limit_error"
            assert shape(client.post("/v1/messages", headers=bearer(key))) == "anthropic"
        assert all(client.get("/health").status_code == 200 for _ in range(5))


def test_a_client_that_guesses_keys_is_slowed_down(tmp_path: Path) -> None:
    with (
        fake_server(tmp_path, server__rate_per_minute=3, **KEYS) as server,
        server.client() as client,
    ):
        guesses = [client.get("/v1/models", headers=bearer(f"k{n}")) for n in range(5)]
        assert [g.status_code for g in guesses] == [401, 401, 401, 429, 429]
        assert client.get("/v1/models", headers=bearer("key-red")).status_code == 200


def test_logs_hold_no_prompt_and_no_key(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Neither when all goes well nor when something breaks."""
    caplog.set_level(logging.DEBUG)
    with fake_server(tmp_path, **KEYS) as server, server.client() as client:
        auth = bearer("key-of-blue")
        client.put(f"/v1/agents/a?{PROMPT}", json={"system": PROMPT}, headers=auth)
        bodies: list[tuple[str, Any]] = [
            (CHAT, {**BODY, "messages": [{"role": "user", "content": PROMPT}]}),
            (CHAT, {**BODY, "messages": [{"role": "user", "content": PROMPT}], "stream": True}),
            (CHAT, {**BODY, "messages": [{"role": PROMPT, "content": PROMPT}]}),
            (CHAT, {**BODY, "stop": [PROMPT], "unknown": PROMPT, "temperature": PROMPT}),
            (CHAT, {**BODY, "unknown": PROMPT}),
            ("/v1/completions", {"model": "fake", "prompt": PROMPT}),
            ("/v1/messages", {**BODY, "system": PROMPT}),
            ("/v1/agents/a/messages", {"content": PROMPT, "max_tokens": 3}),
            ("/v1/agents/a/messages", {"content": PROMPT, "max_tokens": PROMPT}),
        ]
        for path, body in bodies:
            client.post(path, json=body, headers=auth)
            client.post(path, json=body, headers=bearer(f"{PROMPT}-key"))

        def submit(**arguments: Any) -> str:
            raise RuntimeError("a bug")

        server.call(lambda engine: setattr(engine, "submit", submit))
        for stream in (False, True):
            response = client.post(CHAT, json={**bodies[0][1], "stream": stream}, headers=auth)
            assert response.status_code == 500
            assert response.json()["error"]["message"] == (
                "an error inside the server; its log has the details"
            )
    ours = [r for r in caplog.records if not r.name.startswith(("httpx", "httpcore"))]
    format_one = logging.Formatter("%(name)s %(message)s").format
    said = "\n".join(map(format_one, ours)) + "".join(capfd.readouterr())
    assert "POST /v1/chat/completions 200" in said
    assert "a bug" in said
    for secret in (PROMPT, *KEYS["server__api_keys"].values()):
        assert secret not in said


def test_no_path_forges_a_line_of_the_log(
    server: FakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with server.client() as client:
        client.get(
            "/v1/x%0D%0A2026-01-01%20[error]%20all%20agents%20deleted%1B[2J%E2%80%A8%E2%80%AE"
        )
        client.put("/v1/agents/a%0Ab", json={})
        client.post(CHAT, json={**BODY, "un\nknown\x1b[2J": 1}, headers={"X-Agent-ID": b"a\x85b"})
    records = [r for r in caplog.records if r.name.startswith("keepwarm")]
    lines = [log_formatter(LogFormat.CONSOLE).format(record) for record in records]
    assert sum("all agents deleted" in line for line in lines) == 1
    assert all(line.isprintable() for line in lines)
