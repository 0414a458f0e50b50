"""Numbers that JSON's grammar allows or Python adds to it, and that nothing can keep."""

import httpx
import pytest

CHAT = """{"model": "fake", "max_tokens": 2, "messages": [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "", "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"n": [NUMBER]}}}]},
    {"role": "tool", "content": "done", "tool_call_id": "1"},
    {"role": "user", "content": "And?"}]}"""
MESSAGES = """{"model": "fake", "max_tokens": 2, "messages": [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": [
        {"type": "tool_use", "id": "1", "name": "f", "input": {"n": [NUMBER]}}]},
    {"role": "user", "content": [
        {"type": "tool_result", "tool_use_id": "1", "content": "done"}]}]}"""
BODIES = {
    "/v1/chat/completions": CHAT,
    "/v1/messages": MESSAGES,
    "/v1/messages/count_tokens": MESSAGES.replace('"max_tokens": 2, ', ""),
}
JSON = {"Content-Type": "application/json", "X-Agent-ID": "ada"}


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
def test_numbers_without_an_end_are_refused(client: httpx.Client, path: str, number: str) -> None:
    body = BODIES[path].replace("NUMBER", number)
    refused = client.post(path, content=body, headers=JSON)
    assert refused.status_code == 400, refused.text
    assert "invalid_request" in refused.text
    assert client.get("/v1/agents/ada").status_code == 404


def test_whole_numbers_of_more_than_64_bits_are_refused(client: httpx.Client) -> None:
    body = CHAT.replace("NUMBER", str(1 << 64))
    refused = client.post("/v1/chat/completions", content=body, headers=JSON)
    assert refused.status_code == 400
    assert "64 bits" in refused.json()["error"]["message"]


def test_the_largest_come_back_as_they_were(client: httpx.Client) -> None:
    body = CHAT.replace("NUMBER", f"{(1 << 64) - 1}, {-(1 << 63)}, 1.5e300")
    headers = {**JSON, "X-Agent-ID": "eve"}
    assert client.post("/v1/chat/completions", content=body, headers=headers).status_code == 200
    turns = client.get("/v1/agents/eve/turns").json()["turns"]
    (call,) = turns[0]["messages"][1]["tool_calls"]
    assert call["function"]["arguments"]["n"] == [(1 << 64) - 1, -(1 << 63), 1.5e300]
    bundle = client.get("/v1/agents/eve/export")
    assert client.post("/v1/agents/import?id=bob", content=bundle.content).status_code == 201
    assert client.get("/v1/agents/bob/turns").json()["turns"] == turns
