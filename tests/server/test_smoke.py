"""The whole server on the fake generator: one request of each kind."""

from pathlib import Path

from servers import fake_server


def test_a_conversation_goes_on_where_it_was(tmp_path: Path) -> None:
    with fake_server(tmp_path) as server, server.client() as client:
        messages = [{"role": "user", "content": "Hello world"}]
        body = {"model": "fake", "messages": messages, "max_tokens": 8, "user": "ada"}
        first = client.post("/v1/chat/completions", json=body)
        assert first.status_code == 200
        messages += [first.json()["choices"][0]["message"], {"role": "user", "content": "More"}]
        second = client.post("/v1/chat/completions", json=body).json()
        usage = first.json()["usage"]
        held = usage["prompt_tokens"] + usage["completion_tokens"] - 1
        assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == held


def test_an_agent_is_sent_its_new_messages_only(tmp_path: Path) -> None:
    with fake_server(tmp_path) as server, server.client() as client:
        assert client.put("/v1/agents/ada", json={"system": "Be brief."}).status_code == 201
        for turn in (1, 2):
            reply = client.post("/v1/agents/ada/messages", json={"content": "Hi", "max_tokens": 4})
            assert reply.status_code == 200, reply.text
            assert reply.json()["turn"] == turn
            assert reply.json()["durable"]
        rows = client.get("/v1/agents/ada/turns").json()["turns"]
        assert [row["messages"][-2]["content"] for row in rows] == ["Hi", "Hi"]
