"""Paths as clients write them: what is meant is served, where there is no doubt."""

import httpx
import pytest

from keepwarm.server.edge.paths import tidy
from servers import FakeServer

BODY = {"model": "fake", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}


@pytest.mark.parametrize(
    "path",
    [
        "/v1/chat/completions/",
        "/chat/completions",
        "/v1/v1/chat/completions",
        "//v1//chat//completions//",
        "/v1/messages/",
        "/messages",
        "/v1/v1/messages",
    ],
)
def test_what_is_meant_is_served(server: FakeServer, path: str) -> None:
    with httpx.Client(timeout=30.0, trust_env=False) as client:
        response = client.post(server.url + path, json=BODY)
    assert response.status_code == 200, response.text
    assert response.json()["keepwarm"]["cache"]["prompt_tokens"] > 0


def test_errors_have_the_shape_of_what_is_meant(client: httpx.Client) -> None:
    assert client.post("/v1/v1/messages/", json={}).json()["type"] == "error"
    assert "code" in client.post("/chat/completions/", json={}).json()["error"]


def test_others_say_where_everything_is(client: httpx.Client) -> None:
    for path in ("/v1", "/v1/chat/completions/chat/completions", "/api/generate"):
        response = client.post(path, json=BODY)
        assert response.status_code == 404
        assert "/v1/chat/completions" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("/", "/"),
        ("//", "/"),
        ("/health/", "/health"),
        ("/models", "/v1/models"),
        ("/v1/models/a/b/", "/v1/models/a/b"),
        ("/v1/modelsx", "/v1/modelsx"),
        ("/messages/count_tokens", "/v1/messages/count_tokens"),
        ("/message", "/message"),
        ("//v1///agents/ada/turns/", "/v1/agents/ada/turns"),
        ("/v1/agents//turns", "/v1/agents//turns"),
        ("/v1/agents/blue%2F", "/v1/agents/blue%2F"),
        ("/docs-files//x", "/docs-files/x"),
    ],
)
def test_one_name_for_each(path: str, meant: str) -> None:
    """An empty name of an agent does not make another agent of what stands behind it."""
    assert tidy(path) == meant
    assert tidy(meant) == meant
