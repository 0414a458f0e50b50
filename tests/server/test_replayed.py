"""Histories that another model has seen: a client that sends one goes on, and is told what is
missing.
"""

import json
from typing import Any

import httpx
import pytest

from sse import events_of

CHAT, MESSAGES = "/v1/chat/completions", "/v1/messages"
HALF = "\ud83d"
SAID = {"role": "assistant", "content": "I see."}
ASKED = {"role": "user", "content": "Now only text."}
PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA"}}
LOOK = {"type": "text", "text": "look "}
CALL = {"type": "tool_use", "id": "t", "name": "read", "input": {}}


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(content)}


def result(*content: Any) -> dict[str, Any]:
    return user({"type": "tool_result", "tool_use_id": "t", "content": list(content)})


READ = [ASKED, {"role": "assistant", "content": [CALL]}]


def ask(client: httpx.Client, path: str, messages: Any, **more: Any) -> httpx.Response:
    body = {"model": "fake", "messages": messages, "max_tokens": 4, "temperature": 0, **more}
    content = json.dumps(body).encode()  # httpx writes no half characters
    return client.post(path, content=content, headers={"Content-Type": "application/json"})


def reply(document: dict[str, Any]) -> Any:
    return document["choices"] if "choices" in document else document["content"]


@pytest.mark.parametrize(
    ("path", "old", "meant", "left_out"),
    [
        (CHAT, [user(LOOK, PICTURE)], "look [image left out]", "messages.0.content.1"),
        (CHAT, [user({"type": "input_image"})], "[image left out]", "messages.0.content.0"),
        (CHAT, [user({"type": "file", "file": {}})], "[file left out]", "messages.0.content.0"),
        (CHAT, [user({"type": "input_audio"})], "[audio left out]", "messages.0.content.0"),
        (MESSAGES, [user(LOOK, IMAGE)], "look [image left out]", "messages.0.content.1"),
        (MESSAGES, [user({"type": "document"})], "[file left out]", "messages.0.content.0"),
    ],
)
def test_a_placeholder_stands_for_it(
    client: httpx.Client, path: str, old: list[Any], meant: str, left_out: str
) -> None:
    response = ask(client, path, [*old, SAID, ASKED])
    assert response.status_code == 200, response.text
    assert response.headers["x-keepwarm-ignored"] == left_out
    assert response.json()["keepwarm"]["ignored"] == [left_out]
    plain = ask(client, path, [{"role": "user", "content": meant}, SAID, ASKED]).json()
    assert reply(plain) == reply(response.json())
    assert plain["keepwarm"]["cache"]["reason"] == "cached"
    streamed = ask(client, path, [*old, SAID, ASKED], stream=True)
    facts = [e.data["keepwarm"] for e in events_of(streamed.text) if "keepwarm" in e.data]
    assert [fact["ignored"] for fact in facts] == [[left_out]]


def test_what_a_tool_has_shown_as_well(client: httpx.Client) -> None:
    shown = [*READ, result({"type": "text", "text": "a"}, IMAGE), SAID, ASKED]
    response = ask(client, MESSAGES, shown)
    assert response.status_code == 200, response.text
    assert response.headers["x-keepwarm-ignored"] == "messages.2.content.0.content.1"
    plain = ask(
        client,
        MESSAGES,
        [*READ, result({"type": "text", "text": "a\n[image left out]"}), SAID, ASKED],
    )
    assert reply(plain.json()) == reply(response.json())
    body = {"model": "fake", "messages": shown}
    counted = client.post("/v1/messages/count_tokens", json=body).json()
    assert counted["input_tokens"] == response.json()["keepwarm"]["cache"]["prompt_tokens"]


def test_what_the_providers_own_tools_have_done(client: httpx.Client) -> None:
    done = [
        {"type": "server_tool_use", "id": "s", "name": "web_fetch", "input": {}},
        {
            "type": "web_fetch_tool_result",
            "tool_use_id": "s",
            "content": {"type": "web_fetch_result", "content": {"type": "document"}},
        },
        {"type": "text", "text": "It says so."},
    ]
    said = {"role": "assistant", "content": done}
    response = ask(client, MESSAGES, [ASKED, said, ASKED])
    assert response.status_code == 200, response.text
    ignored = response.json()["keepwarm"]["ignored"]
    assert ignored == ["messages.1.content.0", "messages.1.content.1"]


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
@pytest.mark.parametrize(
    "old", [[user({"type": "text", "text": HALF})], [{**ASKED, "content": HALF}]]
)
def test_half_a_surrogate_pair_is_made_whole(
    client: httpx.Client, path: str, old: list[Any]
) -> None:
    response = ask(client, path, [*old, SAID, ASKED])
    assert response.status_code == 200, response.text
    note = "message 0: half a surrogate pair became U+FFFD"
    assert response.headers["x-keepwarm-adapted"] == note
    assert response.json()["keepwarm"]["adapted"] == [note]
    whole = ask(client, path, [{**ASKED, "content": "\ufffd"}, SAID, ASKED])
    assert reply(whole.json()) == reply(response.json())


def test_in_an_argument_of_a_tool_as_well(client: httpx.Client) -> None:
    call = {**CALL, "input": {"path": HALF}}
    old = [ASKED, {"role": "assistant", "content": [call]}, result(LOOK)]
    assert ask(client, MESSAGES, old).status_code == 200
    function = {"name": "read", "arguments": json.dumps({"path": HALF}, ensure_ascii=False)}
    calls = [{"id": "t", "type": "function", "function": function}]
    called = {"role": "assistant", "content": None, "tool_calls": calls}
    told = {"role": "tool", "tool_call_id": "t", "content": "look"}
    assert ask(client, CHAT, [ASKED, called, told]).status_code == 200


@pytest.mark.parametrize(
    ("path", "messages", "param"),
    [
        (CHAT, [user(PICTURE)], "messages.0.content.0"),
        (CHAT, [ASKED, SAID, user(LOOK, PICTURE)], "messages.2.content.1"),
        (CHAT, [ASKED, user(PICTURE)], "messages.1.content.0"),
        (CHAT, [ASKED, SAID, {**ASKED, "content": HALF}], "messages"),
        (MESSAGES, [user(IMAGE)], "messages.0.content.0"),
        (MESSAGES, [user(IMAGE), {**SAID, "content": "It is"}], "messages.0.content.0"),
        (MESSAGES, [*READ, user(*result(LOOK)["content"], IMAGE)], "messages.2.content.1"),
        (MESSAGES, [ASKED, SAID, user({"type": "text", "text": HALF})], "half of a surrogate"),
    ],
)
def test_in_the_newest_message_it_is_refused(
    client: httpx.Client, path: str, messages: list[Any], param: str
) -> None:
    """A question about a picture is refused: the model cannot see it."""
    response = ask(client, path, messages)
    assert response.status_code == 400
    error = response.json()["error"]
    assert param in (error["param"] if path == CHAT else error["message"])


@pytest.mark.parametrize(
    ("path", "messages", "left_out"),
    [
        (CHAT, [ASKED, SAID, user(PICTURE), ASKED], "messages.2.content.0"),
        (MESSAGES, [user(IMAGE), ASKED], "messages.0.content.0"),
        (MESSAGES, [*READ, result(IMAGE)], "messages.2.content.0.content.0"),
        (
            MESSAGES,
            [*READ, user(*result(IMAGE)["content"], LOOK)],
            "messages.2.content.0.content.0",
        ),
    ],
)
def test_after_a_refusal_and_after_a_tool_the_client_goes_on(
    client: httpx.Client, path: str, messages: list[Any], left_out: str
) -> None:
    """It keeps what was refused in front of what its user says next, and what a tool returned."""
    response = ask(client, path, messages)
    assert response.status_code == 200, response.text
    assert response.json()["keepwarm"]["ignored"] == [left_out]


def test_nor_does_an_agent_take_it(client: httpx.Client) -> None:
    client.put("/v1/agents/ada", json={})
    for content in (HALF, [PICTURE]):
        body = json.dumps({"content": content}).encode()
        headers = {"Content-Type": "application/json"}
        refused = client.post("/v1/agents/ada/messages", content=body, headers=headers)
        assert refused.status_code == 400
    assert client.get("/v1/agents/ada/turns").json()["turns"] == []
