"""What a request may be made of: refused in each dialect's shape, and nothing is done for it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from engines import FakeFactory, fake_loaded, user
from keepwarm.server.dialects.json_body import MAX_OBJECTS, MAX_VALUES
from keepwarm.testing.tokenizer import FakeTokenizer
from servers import FakeServer, fake_server

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
MESSAGES, COUNT = "/v1/messages", "/v1/messages/count_tokens"
SEND = "/v1/agents/ada/messages"
LARGE = "Hello world. " * (8 * 2**20 // 13)
LEAST = -(-len(LARGE) // 9)
TOO_LONG = f"prompt is too long: {LEAST} tokens > 8191 maximum; "


class CountingTokenizer(FakeTokenizer):
    """Counts what it encodes."""

    num_encoded = 0

    def encode(self, text: str) -> list[int]:
        CountingTokenizer.num_encoded += 1
        return super().encode(text)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeServer]:
    loaded = fake_loaded(tokenizer=CountingTokenizer(), max_context_tokens=8192)
    with fake_server(
        tmp_path_factory.mktemp("home"), loaded=loaded, memory__budget_bytes=1 << 30
    ) as server:
        yield server


@pytest.fixture
def client(server: FakeServer) -> Iterator[httpx.Client]:
    """Nothing that is sent is encoded."""
    with server.client() as client:
        client.put("/v1/agents/ada", json={}).raise_for_status()
        before = CountingTokenizer.num_encoded
        yield client
        assert CountingTokenizer.num_encoded == before


def refused(client: httpx.Client, path: str, **fields: Any) -> dict[str, Any]:
    base: dict[str, Any] = {} if path == SEND else {"model": "fake"}
    if path == MESSAGES:
        base["max_tokens"] = 3
    response = client.post(path, json={**base, **fields})
    assert response.status_code == 400, response.text
    error: dict[str, Any] = response.json()["error"]
    return error


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (CHAT, {"messages": [user(LARGE)]}),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": LARGE}]}]}),
        (MESSAGES, {"messages": [user(LARGE)]}),
        (MESSAGES, {"messages": [user("")], "system": LARGE}),
        (SEND, {"content": LARGE}),
        (SEND, {"messages": [user(LARGE)]}),
    ],
)
def test_a_prompt_of_8_mb_is_refused_by_its_size(
    client: httpx.Client, path: str, fields: dict[str, Any], stream: bool
) -> None:
    assert refused(client, path, stream=stream, **fields)["message"].startswith(TOO_LONG)


def test_so_it_is_where_it_would_be_counted(client: httpx.Client) -> None:
    error = refused(client, COUNT, messages=[user(LARGE)])
    assert error["type"] == "invalid_request_error"
    assert error["message"].startswith(TOO_LONG)


@pytest.mark.parametrize("prompt", [LARGE, [LARGE], [LARGE, LARGE], "<|bos|>" + LARGE])
def test_so_it_is_as_bare_text(client: httpx.Client, prompt: Any) -> None:
    least = LEAST + 1  # the beginning-of-text token is special
    message = refused(client, TEXT, prompt=prompt)["message"]
    assert message.startswith(f"prompt is too long: {least} tokens > 8191 maximum; ")


@pytest.mark.parametrize("prompt", [[5] * 20_000, [[5] * 20_000, [5]]])
def test_so_are_ids(client: httpx.Client, prompt: Any) -> None:
    message = refused(client, TEXT, prompt=prompt)["message"]
    assert message.startswith("prompt is too long: 20000 tokens > 8191 maximum; ")


def test_the_code_is_the_one_that_openai_s_clients_know(client: httpx.Client) -> None:
    error = refused(client, CHAT, messages=[user(LARGE)])
    assert error["code"] == "context_length_exceeded"
    assert error["param"] == "prompt"
    assert "maximum context length is 8192 tokens" in error["message"]  # litellm's OpenAI provider


@pytest.mark.parametrize(("path"), [CHAT, MESSAGES, COUNT, SEND])
def test_100_000_messages_are_refused(client: httpx.Client, path: str) -> None:
    error = refused(client, path, messages=[user("Hello")] * 100_000)
    assert error["message"] == (
        "prompt is too long: 100000 messages > 8192 maximum; "
        "the parts of a message's content count as well"
    )


def test_the_parts_of_messages_count(client: httpx.Client) -> None:
    parts = [{"type": "text", "text": "a"}] * 5000
    messages = [{"role": "user", "content": parts}] * 2
    for path in (CHAT, MESSAGES):
        message = refused(client, path, messages=messages)["message"]
        assert message.startswith("prompt is too long: 10000 messages > 8192 maximum; ")


def test_100_000_stop_strings_are_refused(client: httpx.Client) -> None:
    stops = [f"stop {number}" for number in range(100_000)]
    for path, field, prompt in (
        (CHAT, "stop", {"messages": [user("Hello")]}),
        (TEXT, "stop", {"prompt": "Hello"}),
        (SEND, "stop", {"content": "Hello"}),
        (MESSAGES, "stop_sequences", {"messages": [user("Hello")]}),
    ):
        error = refused(client, path, **{field: stops}, **prompt)
        assert error["message"] == f"{field}: has 100000 strings; at most 64 are taken"


def test_a_long_stop_string_is_refused(client: httpx.Client) -> None:
    error = refused(client, CHAT, messages=[user("Hello")], stop="x" * 257)
    assert error["message"] == "stop: has a string of 257 bytes; at most 256 are taken"
    assert error["param"] == "stop"


def test_a_large_map_of_biases_is_refused(client: httpx.Client) -> None:
    biases = {str(number): 1 for number in range(100_000)}
    error = refused(client, CHAT, messages=[user("Hello")], logit_bias=biases)
    assert error["message"] == "logit_bias: has 100000 entries; at most 1024 are taken"
    assert error["param"] == "logit_bias"


@pytest.mark.parametrize(
    "body",
    [
        b"[" + b"{}," * MAX_OBJECTS + b"{}]",
        b'{"x": [' + b"[[" * MAX_OBJECTS,
        b"[" + b"1," * (MAX_VALUES + 1) + b"1]",
        b'["' + b'","' * (MAX_VALUES + 1) + b'"]',
    ],
)
def test_what_would_take_much_memory_as_values_is_not_parsed(
    client: httpx.Client, body: bytes
) -> None:
    response = client.post(CHAT, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["message"] == (
        "body: has more than 150000 objects and lists, or 600000 names and values"
    )


def test_braces_and_commas_in_text_are_text(server: FakeServer) -> None:
    text = '{"a": [1, 2, "\\"], ' * 100_000
    body = {"model": "fake", "prompt": [1, 2], "max_tokens": 1, "user": "u", "unknown": text}
    with server.client() as client:
        assert client.post(TEXT, json=body).status_code == 200


# -- before a stream's head is sent ----------------------------------------------------------------


def test_what_waits_for_its_agent_s_turn_is_refused_before_it_waits(tmp_path: Path) -> None:
    factory = FakeFactory(pause_s=0.001)
    loaded = fake_loaded(factory=factory, max_context_tokens=8192)
    options = {"server__heartbeat_s": 3.0, "memory__budget_bytes": 1 << 30}
    with (
        fake_server(tmp_path, loaded=loaded, **options) as server,
        server.client() as client,
        httpx.Client(base_url=server.url, trust_env=False) as other,
    ):
        client.put("/v1/agents/ada", json={}).raise_for_status()
        running = other.stream("POST", SEND, json={"content": "Hello", "stream": True})
        with running as reply:
            parts = reply.iter_raw()
            next(parts)
            for content in (LARGE, "word " * 4000):
                late = client.post(SEND, json={"content": content, "stream": True})
                assert late.status_code == 400
                assert "prompt is too long: " in late.json()["error"]["message"]
            assert server.engine.num_requests == 1


def test_so_is_the_last_of_several_prompts(server: FakeServer) -> None:
    prompts = ["Hello", "word " * 4000]
    with server.client() as client:
        body = {"model": "fake", "prompt": prompts, "max_tokens": 50, "stream": True}
        response = client.post(TEXT, json=body)
        assert response.status_code == 400
        assert response.json()["error"]["code"] == "context_length_exceeded"
    assert server.engine.num_requests == 0
