"""Anthropic's dialect over HTTP, on the fake generator."""

import json
import re
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sse
from engines import FakeFactory
from keepwarm.server.dialects.anthropic.schema import Conversation
from keepwarm.server.dialects.anthropic.translate import messages_of
from keepwarm.server.problems import Unsupported
from servers import FakeServer, fake_server

GOLDEN = Path(__file__).parent / "golden" / "anthropic_stream.txt"
HELLO = [{"role": "user", "content": "Hello"}]
MARKED = {"type": "text", "text": "42", "cache_control": {"type": "ephemeral"}}
RESULT = {"type": "tool_result", "tool_use_id": "t1", "content": [MARKED]}
SEAM = (
    '","type":"text_delta"},"index":0,"type":"content_block_delta"}\n\n'
    'event: content_block_delta\ndata: {"delta":{"text":"'
)
"""Between two deltas; how many a reply comes in depends on how soon each is read."""
SCHEMAS = {
    "message_start": "MessageStartEvent",
    "content_block_start": "ContentBlockStartEvent",
    "content_block_delta": "ContentBlockDeltaEvent",
    "content_block_stop": "ContentBlockStopEvent",
    "message_delta": "MessageDeltaEvent",
    "message_stop": "MessageStopEvent",
}


@pytest.fixture(scope="module")
def client(server: FakeServer) -> Iterator[httpx.Client]:
    with server.client(headers={"anthropic-version": "2023-06-01"}) as client:
        yield client


def body_of(**more: Any) -> dict[str, Any]:
    return {"model": "fake", "messages": HELLO, "max_tokens": 6, "temperature": 0, **more}


def ask(client: httpx.Client, **more: Any) -> dict[str, Any]:
    response = client.post("/v1/messages", json=body_of(**more))
    assert response.status_code == 200, response.text
    document: dict[str, Any] = response.json()
    return document


def events_of(response: httpx.Response) -> list[tuple[str, dict[str, Any]]]:
    assert response.status_code == 200, response.text
    return [(event.name, event.data) for event in sse.events_of(response.text)]


def check(schema: str, document: dict[str, Any]) -> None:
    """Against Anthropic's own specification, which llm-comply carries."""
    text = files("llm_comply").joinpath("specs", "anthropic.json").read_text("utf-8")
    root = {
        "$ref": f"#/components/schemas/{schema}",
        "components": json.loads(text)["components"],
    }
    jsonschema.Draft202012Validator(root).validate(document)


def without_time(keepwarm: dict[str, Any]) -> dict[str, Any]:
    return {**keepwarm, "cache": {**keepwarm["cache"], "restored_ms": 0}}


def prompt_tokens(usage: dict[str, int]) -> int:
    kinds = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
    return sum(usage[kind] for kind in kinds)


class TestReplies:
    def test_a_whole_one(self, client: httpx.Client) -> None:
        document = ask(client)
        assert re.fullmatch(r"msg_\w+", document["id"])
        assert (document["type"], document["role"], document["model"]) == (
            *("message", "assistant", "fake"),
        )
        (block,) = document["content"]
        assert block["type"] == "text"
        assert document["stop_reason"] == "max_tokens"
        assert document["stop_sequence"] is None
        assert document["usage"]["output_tokens"] == 6

    def test_a_stream_has_the_events_that_clients_expect(self, client: httpx.Client) -> None:
        body = body_of(stream=True, messages=[{"role": "user", "content": "golden"}])
        response = client.post("/v1/messages", json=body)
        assert response.headers["content-type"].startswith("text/event-stream")
        text = re.sub(r"msg_\w+", "msg_ID", response.text.replace(SEAM, ""))
        text = re.sub(r'"restored_ms":[\d.]+', '"restored_ms":0', text)
        assert text == GOLDEN.read_text()

    def test_a_stop_sequence_is_named(self, client: httpx.Client) -> None:
        text = ask(client, max_tokens=12)["content"][0]["text"]
        stop = text[3:5]
        document = ask(client, max_tokens=12, stop_sequences=[stop])
        assert document["stop_reason"] == "stop_sequence"
        assert document["stop_sequence"] == stop
        assert document["content"][0]["text"] == text[: text.index(stop)]

    def test_empty_stop_sequences_are_none_and_minus_one_is_no_limit(
        self, client: httpx.Client
    ) -> None:
        text = ask(client, max_tokens=12, stop_sequences=["", None])["content"][0]["text"]
        assert text == ask(client, max_tokens=12)["content"][0]["text"]
        document = ask(client, max_tokens=-1, stop_sequences=[text[3:5]])
        assert document["content"][0]["text"] == text[: text.index(text[3:5])]

    @settings(
        max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
    )
    @given(
        content=st.text("abc \u00e9\u6f22", min_size=1, max_size=20),
        max_tokens=st.integers(1, 30),
        system=st.none() | st.text("xyz", max_size=5),
        asks_for_cache=st.booleans(),
    )
    def test_streamed_it_says_what_it_says_whole(
        self,
        client: httpx.Client,
        content: str,
        max_tokens: int,
        system: str | None,
        asks_for_cache: bool,
    ) -> None:
        """Text, end and usage; asked once before, so that both find as much in the cache."""
        request = {
            "messages": [{"role": "user", "content": content}],
            "max_tokens": max_tokens,
            "system": system,
            "cache_control": {"type": "ephemeral"} if asks_for_cache else None,
        }
        ask(client, **request)
        whole = ask(client, **request)
        events = events_of(client.post("/v1/messages", json=body_of(stream=True, **request)))
        names = [name for name, _ in events]
        assert names[:3] == ["message_start", "content_block_start", "ping"]
        assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]
        assert set(names[3:-3]) <= {"content_block_delta"}
        assert all(name == data["type"] for name, data in events)
        text = "".join(d["delta"]["text"] for n, d in events if n == "content_block_delta")
        assert [{"type": "text", "text": text, "citations": None}] * bool(text) == whole["content"]
        end = events[-2][1]
        assert end["delta"] == {key: whole[key] for key in end["delta"]}
        assert end["usage"] == whole["usage"]
        assert without_time(end["keepwarm"]) == without_time(whole["keepwarm"])
        start = events[0][1]["message"]["usage"]
        assert start == {**whole["usage"], "output_tokens": 0}

    def test_all_of_it_has_the_published_schema(self, client: httpx.Client) -> None:
        check("Message", ask(client))
        events = events_of(client.post("/v1/messages", json=body_of(stream=True)))
        assert {name for name, _ in events} == {*SCHEMAS, "ping"}
        for name, data in events:
            if name != "ping":
                check(SCHEMAS[name], data)
        check("ErrorResponse", client.post("/v1/messages", json=body_of(model="other")).json())

    def test_one_that_breaks_off_ends_with_an_error(self, tmp_path: Path) -> None:
        factory = FakeFactory(fail_at=[[5]])
        with fake_server(tmp_path, factory=factory) as server, server.client() as client:
            events = events_of(client.post("/v1/messages", json=body_of(stream=True)))
            assert events[0][0] == "message_start"
            assert "message_stop" not in dict(events)
            name, data = events[-1]
            assert name == data["type"] == "error"
            assert data["error"]["type"] == "api_error"
            assert data["error"]["message"]
            assert ask(client)["usage"]["output_tokens"] == 6


class TestUsage:
    def test_a_second_turn_reads_the_first_from_the_cache(self, client: httpx.Client) -> None:
        metadata = {"user_id": "user_1_account__session_2"}
        first = ask(client, metadata=metadata)
        messages = [
            *HELLO,
            {"role": "assistant", "content": first["content"]},
            {"role": "user", "content": "More"},
        ]
        second = ask(client, messages=messages, metadata=metadata)
        held = prompt_tokens(first["usage"]) + first["usage"]["output_tokens"] - 1
        assert second["usage"]["cache_read_input_tokens"] == held
        assert second["usage"]["cache_creation_input_tokens"] == 0
        assert second["usage"]["input_tokens"] > 0

    @pytest.mark.parametrize(
        "marked",
        [
            {"system": [{"type": "text", "text": "S", "cache_control": {"type": "ephemeral"}}]},
            {"cache_control": {"type": "ephemeral"}},
            {"tools": [{"name": "t", "cache_control": {"type": "ephemeral"}}]},
            {"messages": [*HELLO, {"role": "user", "content": [RESULT]}]},
        ],
    )
    def test_who_asks_for_caching_is_told_what_was_written(
        self, client: httpx.Client, marked: dict[str, Any]
    ) -> None:
        usage = ask(client, **marked)["usage"]
        assert usage["input_tokens"] == 0
        assert usage["cache_creation_input_tokens"] + usage["cache_read_input_tokens"] > 0

    def test_a_final_assistant_message_is_the_beginning_of_the_reply(
        self, client: httpx.Client
    ) -> None:
        messages = [*HELLO, {"role": "assistant", "content": "It is"}]
        reply = ask(client, messages=messages, metadata={"user_id": "ada"})
        assert not reply["content"][0]["text"].startswith("It is")
        (turn,) = client.get("/v1/agents/ada/turns").json()["turns"]
        said = "It is" + reply["content"][0]["text"]
        assert turn["messages"][-1] == {"role": "assistant", "content": said}
        body = {"model": "fake", "messages": messages}
        counted = client.post("/v1/messages/count_tokens", json=body)
        assert counted.json() == {"input_tokens": prompt_tokens(reply["usage"])}

    def test_counted_tokens_are_those_of_the_prompt(self, client: httpx.Client) -> None:
        body = {"model": "fake", "messages": HELLO, "system": "Be brief."}
        counted = client.post("/v1/messages/count_tokens", json=body)
        assert counted.status_code == 200
        usage = ask(client, system="Be brief.")["usage"]
        assert counted.json() == {"input_tokens": prompt_tokens(usage)}


class TestContent:
    @staticmethod
    def messages_of(*messages: Any, system: Any = None) -> Any:
        return messages_of(
            Conversation.model_validate({"model": "m", "messages": messages, "system": system}),
            left_out=[],
        )

    def test_every_kind_of_block(self) -> None:
        messages = self.messages_of(
            {"role": "user", "content": [{"type": "text", "text": "What is 6 times 7?"}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "Hm.", "signature": "x"},
                    {"type": "text", "text": "Let me see."},
                    {"type": "tool_use", "id": "t1", "name": "times", "input": {"a": 6, "b": 7}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "t1", "content": "42"},
                    {
                        "type": "tool_result",
                        "tool_use_id": "t2",
                        "content": [{"type": "text", "text": "43"}],
                        "is_error": True,
                    },
                    {"type": "text", "text": "So?"},
                ],
            },
            system=[{"type": "text", "text": "One."}, {"type": "text", "text": "Two."}],
        )
        call = {
            "id": "t1",
            "type": "function",
            "function": {"name": "times", "arguments": '{"a": 6, "b": 7}'},
        }
        assert messages == [
            {"role": "system", "content": "One.\nTwo."},
            {"role": "user", "content": "What is 6 times 7?"},
            {"role": "assistant", "content": "Let me see.", "tool_calls": [call]},
            {"role": "tool", "content": "42", "tool_call_id": "t1"},
            {"role": "tool", "content": "43", "tool_call_id": "t2"},
            {"role": "user", "content": "So?"},
        ]

    @pytest.mark.parametrize("kind", ["image", "document", "server_tool_use"])
    def test_what_is_no_text_is_refused(self, kind: str) -> None:
        with pytest.raises(Unsupported, match=rf"messages\.0\.content\.1: .*'{kind}'") as caught:
            self.messages_of(
                {"role": "user", "content": [{"type": "text", "text": "Look:"}, {"type": kind}]}
            )
        assert caught.value.field == "messages.0.content.1"

    def test_words_stand_for_a_picture_in_a_result(self) -> None:
        """No client can take it back, so it would be refused again and again."""
        result = {**RESULT, "content": [MARKED, {"type": "image", "source": {}}]}
        (told,) = self.messages_of({"role": "user", "content": [result]})
        assert told["content"].endswith("\n[image left out]")

    def test_thoughts_are_dropped_and_a_system_message_may_come_late(self) -> None:
        redacted = {"type": "redacted_thinking", "data": "x"}
        assert self.messages_of(
            *HELLO,
            {"role": "system", "content": "Be brief."},
            {"role": "assistant", "content": [redacted, {"type": "text", "text": "Hi."}]},
        ) == [
            *HELLO,
            {"role": "system", "content": "Be brief."},
            {"role": "assistant", "content": "Hi."},
        ]

    def test_an_empty_list_is_an_empty_message(self) -> None:
        assert self.messages_of({"role": "user", "content": []}) == [
            {"role": "user", "content": ""}
        ]


class TestRefusals:
    @pytest.mark.parametrize(
        ("wrong", "status", "kind", "names"),
        [
            ({"max_tokens": 0}, 400, "invalid_request_error", "max_tokens"),
            ({"messages": []}, 400, "invalid_request_error", "messages"),
            ({"messages": [{"role": "user"}]}, 400, "invalid_request_error", "messages.0.content"),
            ({"temperature": 3}, 400, "invalid_request_error", "temperature"),
            ({"tool_choice": {"type": "any"}}, 400, "invalid_request_error", "tool_choice"),
            (
                {"tool_choice": {"type": "tool", "name": "t"}},
                *(400, "invalid_request_error", "tool_choice"),
            ),
            ({"max_tokens": -2}, 400, "invalid_request_error", "max_tokens"),
            ({"stop_sequences": [5]}, 400, "invalid_request_error", "stop_sequences.0: "),
            (
                {"messages": [{"role": "user", "content": [{"text": "Hi"}]}]},
                *(400, "invalid_request_error", "messages.0.content.0.type: "),
            ),
            (
                {"messages": [{"role": "user", "content": 5}]},
                *(400, "invalid_request_error", "messages.0.content: "),
            ),
            (
                {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
                *(400, "invalid_request_error", "messages.0.content.0: "),
            ),
            (
                {"output_config": {"format": {"type": "json_schema", "schema": {}}}},
                *(400, "invalid_request_error", "output_config"),
            ),
            ({"model": "other"}, 404, "not_found_error", "other"),
        ],
    )
    def test_the_shape_is_anthropics(
        self, client: httpx.Client, wrong: dict[str, Any], status: int, kind: str, names: str
    ) -> None:
        response = client.post("/v1/messages", json=body_of(**wrong))
        assert response.status_code == status
        document = response.json()
        assert (document["type"], document["error"]["type"]) == ("error", kind)
        assert names in document["error"]["message"]
        assert document["request_id"] == response.headers["X-Request-ID"]

    def test_max_tokens_must_be_there(self, client: httpx.Client) -> None:
        response = client.post("/v1/messages", json={"model": "fake", "messages": HELLO})
        assert response.status_code == 400
        assert "max_tokens" in response.json()["error"]["message"]

    @pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
    def test_both_paths_refuse_alike(self, client: httpx.Client, path: str) -> None:
        images = [{"role": "user", "content": [{"type": "image"}]}]
        for wrong, status in (({"messages": images}, 400), ({"model": "other"}, 404)):
            response = client.post(path, json=body_of(**wrong))
            assert response.status_code == status
            check("ErrorResponse", response.json())

    def test_what_is_ignored_is_named(self, client: httpx.Client) -> None:
        more = {
            "tools": [{"name": "times", "input_schema": {"type": "object"}}],
            "thinking": {"type": "enabled", "budget_tokens": 1024},
            "output_config": {"effort": "low"},
            "tool_choice": {"type": "auto"},
        }
        headers = {"anthropic-beta": "prompt-caching-2024-07-31"}
        response = client.post("/v1/messages", json=body_of(**more), headers=headers)
        assert response.status_code == 200
        assert response.headers["X-Keepwarm-Ignored"] == "output_config, thinking, tools"

    def test_what_changes_nothing_is_not_worth_a_note(self, client: httpx.Client) -> None:
        more = {
            "thinking": {"type": "disabled"},
            "metadata": {"user_id": None},
            "service_tier": "auto",
            "context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]},
            "container": None,
            "mcp_servers": [],
            "betas": ["x"],
            "tools": [],
        }
        for headers in ({}, {"anthropic-version": "2023-06-01", "anthropic-beta": "x,y"}):
            response = client.post("/v1/messages", json=body_of(**more), headers=headers)
            assert response.status_code == 200
            assert "X-Keepwarm-Ignored" not in response.headers

    def test_models_are_listed_in_its_own_shape(self, client: httpx.Client) -> None:
        page = client.get("/v1/models").json()
        assert [model["id"] for model in page["data"]] == ["fake"]
        assert page["data"][0]["type"] == "model"
        assert client.get("/v1/models/fake").json()["display_name"] == "fake"
        assert client.get("/v1/models/other").json()["error"]["type"] == "not_found_error"

    def test_long_prompts_work(self, client: httpx.Client) -> None:
        messages = [{"role": "user", "content": "word " * 16_000}]
        assert ask(client, messages=messages)["usage"]["output_tokens"] == 6
