"""What templates of real families refused, over each API: answered, and said what was changed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from conversations import AGAIN, HELLO, HI, RULES, SYSTEM, call, calls, result, said
from servers import FakeServer, fake_server
from templates import FAMILIES, byte_tokenizer, templated

ADAPTED = "x-keepwarm-adapted"
ANTHROPIC = {"anthropic-version": "2023-06-01"}

# A template that takes a conversation, and not with the reply in it.
NO_REPLY = (
    "{% if messages | length > 1 and messages[-1].role == 'assistant' %}"
    "{{ messages[-1].content.index('</think>') }}{% endif %}"
) + FAMILIES["plain"]

NEEDS_THOUGHT = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{{ m['content'][m['content'].index('</think>'):] }}{% else %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
)


@contextmanager
def serving(home: Path, template: str) -> Iterator[tuple[FakeServer, httpx.Client]]:
    loaded = templated(byte_tokenizer(template))
    with fake_server(home, loaded=loaded) as server, server.client() as client:
        yield server, client


def chat(client: httpx.Client, *messages: Any, **more: Any) -> httpx.Response:
    body = {"model": "fake", "messages": messages, "max_tokens": 20, **more}
    return client.post("/v1/chat/completions", json=body)


def message(client: httpx.Client, *messages: Any, **more: Any) -> httpx.Response:
    body = {"model": "fake", "messages": messages, "max_tokens": 20, **more}
    return client.post("/v1/messages", json=body, headers=ANTHROPIC)


def text_of(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


def test_replies_that_a_template_refuses_break_nothing(tmp_path: Path) -> None:
    with serving(tmp_path, NO_REPLY) as (server, client):
        engine = server.call(lambda engine: engine)
        for _ in range(6):
            assert text_of(chat(client, HI, said("assistant", "</think>Well,"))) == "Well."
            assert text_of(chat(client, said("user", "somebody else's"), user="ada")) == "Well."
        assert server.call(lambda engine: engine) is engine
        turns = client.get("/v1/agents/ada/turns").json()["turns"]
        assert turns[0]["messages"][-1]["content"] == "Well."


def test_a_template_that_raises_is_a_400_with_its_reason(tmp_path: Path) -> None:
    with serving(tmp_path, NEEDS_THOUGHT) as (_, client):
        for send in (chat, message):
            bad = send(client, HI, said("assistant", "no thought here"), AGAIN)
            assert bad.status_code == 400
            assert "chat template" in bad.json()["error"]["message"]
            assert "ValueError" in bad.json()["error"]["message"]
        stream = chat(client, HI, said("assistant", "no thought here"), AGAIN, stream=True)
        assert stream.status_code == 400
        assert text_of(chat(client, HI)) == "Well."


TOOL_USE = [
    HI,
    said("assistant", [{"type": "tool_use", "id": "call_1", "name": "add", "input": {"a": 2}}]),
    said("user", [{"type": "tool_result", "tool_use_id": "call_1", "content": "5"}]),
]


@pytest.mark.parametrize("family", ["qwen_coder", "glm", "mistral", "llama_with_tools"])
def test_templates_that_want_objects_get_them(tmp_path: Path, family: str) -> None:
    note = "arguments of tool calls as objects"
    with serving(tmp_path, FAMILIES[family]) as (_, client):
        by_text = chat(client, HI, calls(call('{"a": 2}', "call_1")), result("5", "call_1"))
        assert note in by_text.headers[ADAPTED]
        assert note in by_text.json()["keepwarm"]["adapted"]
        by_object = chat(client, HI, calls(call({"a": 2}, "call_1")), result("5", "call_1"))
        assert note not in by_object.headers.get(ADAPTED, "")
        anthropic = message(client, *TOOL_USE)
        assert anthropic.status_code == 200
        counts = {a.json()["usage"]["prompt_tokens"] for a in (by_text, by_object)}
        usage = anthropic.json()["usage"]
        counts.add(usage["input_tokens"] + usage.get("cache_read_input_tokens", 0))
        assert len(counts) == 1
        assert text_of(chat(client, HI, {**HELLO, "tool_calls": []}, AGAIN)) == "Well."


def test_a_template_that_wants_text_gets_it(tmp_path: Path) -> None:
    with serving(tmp_path, FAMILIES["text_arguments"]) as (_, client):
        by_object = chat(client, HI, calls(call({"a": 2})), result("5"))
        assert by_object.headers[ADAPTED] == "arguments of tool calls as text"
        by_text = chat(client, HI, calls(call('{"a": 2}')), result("5"))
        assert ADAPTED not in by_text.headers
        usages = [answer.json()["usage"]["prompt_tokens"] for answer in (by_object, by_text)]
        assert usages[0] == usages[1]
        assert message(client, *TOOL_USE).status_code == 200


@pytest.mark.parametrize("family", ["qwen_coder", "mistral", "strict", "harmony"])
def test_system_messages_stand_where_a_template_takes_them(tmp_path: Path, family: str) -> None:
    with serving(tmp_path, FAMILIES[family]) as (_, client):
        before = chat(client, HI, HELLO, AGAIN, user="ada")
        midway = chat(
            client, HI, HELLO, AGAIN, said("assistant", "Well."), RULES, AGAIN, user="ada"
        )
        assert "a system message as a user's" in midway.json()["keepwarm"]["adapted"]
        usage = midway.json()["usage"]
        assert (
            usage["prompt_tokens_details"]["cached_tokens"]
            >= before.json()["usage"]["prompt_tokens"]
        )
        two = chat(client, SYSTEM, said("developer", "Be brief."), HI)
        assert "system messages at the beginning joined" in two.headers[ADAPTED]
        assert message(client, HI, HELLO, RULES, AGAIN).status_code == 200
        assert message(client, HI, system=[{"type": "text", "text": "x"}]).status_code == 200


SENDS: dict[str, Callable[..., httpx.Response]] = {"OpenAI": chat, "Anthropic": message}


@pytest.mark.parametrize("dialect", SENDS)
def test_streams_say_it_in_their_heads(tmp_path: Path, dialect: str) -> None:
    with serving(tmp_path, FAMILIES["strict"]) as (_, client):
        answer = SENDS[dialect](client, HI, AGAIN, stream=True)
        assert answer.status_code == 200
        assert answer.headers[ADAPTED] == "a user's messages in a row joined"
        assert '"adapted":["a user\'s messages in a row joined"]' in answer.text


def test_tokens_are_counted_as_they_will_be_computed(tmp_path: Path) -> None:
    with serving(tmp_path, FAMILIES["strict"]) as (_, client):
        body = {"model": "fake", "messages": [HI, AGAIN, HELLO, HI, RULES]}
        counted = client.post("/v1/messages/count_tokens", json=body, headers=ANTHROPIC)
        usage = message(client, *body["messages"]).json()["usage"]
        assert counted.json()["input_tokens"] == usage["input_tokens"]


def test_the_agents_api_adapts_as_well(tmp_path: Path) -> None:
    with serving(tmp_path, FAMILIES["strict"]) as (_, client):
        client.put("/v1/agents/ada", json={"system": "You help."})
        answer = client.post("/v1/agents/ada/messages", json={"content": "hi", "max_tokens": 9})
        assert answer.json()["adapted"] == [
            "a system message as a user's",
            "a user's messages in a row joined",
        ]
        assert client.get("/v1/agents/ada").json()["system"] == "You help."
