"""What OpenAI's clients send: what the model is given of it, and what is refused by name."""

from typing import Any

import httpx
import pytest

from keepwarm.testing.tokenizer import FakeTokenizer
from sse import events_of

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
HELLO = {"role": "user", "content": "Hello"}
CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {}}}


def chat(client: httpx.Client, *messages: Any, **more: Any) -> httpx.Response:
    body = {"model": "fake", "messages": messages or [HELLO], "max_tokens": 3, **more}
    return client.post(CHAT, json=body)


def text_of(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    content = response.json()["choices"][0]["message"]["content"]
    assert isinstance(content, str)
    return content


def num_tokens(*messages: Any) -> int:
    """Count a conversation's tokens as the template writes it."""
    tokenizer = FakeTokenizer()
    pieces = tokenizer.render(messages)
    return sum(1 if p.special_id is not None else len(tokenizer.encode(p.text)) for p in pieces)


@pytest.mark.parametrize(
    ("sent", "meant"),
    [
        (
            [{"role": "developer", "content": "Be brief."}, HELLO],
            [{"role": "system", "content": "Be brief."}, HELLO],
        ),
        ([{"role": "user", "content": [{"type": "text", "text": "Hello"}]}], [HELLO]),
        ([{"role": "user", "content": ["Hel", {"type": "input_text", "text": "lo"}]}], [HELLO]),
        ([{**HELLO, "name": None, "more": 1}], [HELLO]),
        (
            [HELLO, {"role": "assistant", "content": None, "tool_calls": [CALL]}],
            [HELLO, {"role": "assistant", "content": '{"name": "look", "arguments": {}}'}],
        ),
        (
            [HELLO, {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}],
            [HELLO, {"role": "assistant", "content": "No."}],
        ),
        (
            [HELLO, {"role": "tool", "content": ["a", "b"], "tool_call_id": "c1"}],
            [HELLO, {"role": "tool", "content": "ab"}],
        ),
        (
            [HELLO, {"role": "function", "content": "ab", "name": "look"}],
            [HELLO, {"role": "tool", "content": "ab"}],
        ),
    ],
)
def test_what_agent_clients_send_is_understood(
    client: httpx.Client, sent: list[Any], meant: list[Any]
) -> None:
    answer = chat(client, *sent)
    assert text_of(answer) == text_of(chat(client, *meant))
    assert answer.json()["usage"]["prompt_tokens"] == num_tokens(*meant)


@pytest.mark.parametrize(
    "more",
    [
        {"tools": [TOOL]},
        {"tools": [TOOL], "tool_choice": "auto", "parallel_tool_calls": True},
        {"functions": [TOOL["function"]], "function_call": "none"},
        {"something_new": {"a": 1}},
        {"response_format": {"type": "text"}},
        {"logprobs": False, "presence_penalty": 0, "logit_bias": {}},
        {"metadata": {"a": "b"}, "store": True, "service_tier": "auto"},
        {"add_generation_prompt": True, "continue_final_message": False},
        {"n": None, "seed": None, "stop": None, "temperature": None, "top_p": None},
        {"seed": -1},
        {"stop": ""},
        {"stop": [""]},
        {"stop": ["", None]},
        {"something_new": None, "logit_bias": None, "tools": None, "tool_choice": None},
        {"stream": None, "stream_options": None, "max_completion_tokens": None, "user": None},
        {"temperature": 0.00009, "seed": 3},
        {"tool_choice": {"type": "auto"}},
        {"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [TOOL]}},
        {
            "tool_choice": {
                "type": "allowed_tools",
                "allowed_tools": {"mode": "auto", "tools": [TOOL]},
            }
        },
    ],
)
def test_what_changes_nothing_is_accepted(client: httpx.Client, more: dict[str, Any]) -> None:
    assert text_of(chat(client, **more)) == text_of(chat(client))


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"tools": [TOOL]}, "tools"),
        ({"something_new": 1}, "something_new"),
        ({"something_new": None}, None),
        ({"store": 1}, None),
    ],
)
def test_what_was_ignored_is_said(
    client: httpx.Client, more: dict[str, Any], named: str | None
) -> None:
    assert chat(client, **more).headers.get("x-keepwarm-ignored") == named


@pytest.mark.parametrize(
    ("path", "more", "param"),
    [
        (CHAT, {"response_format": {"type": "json_object"}}, "response_format"),
        (CHAT, {"tools": [TOOL], "tool_choice": "required"}, "tool_choice"),
        (CHAT, {"tool_choice": {"type": "allowed_tools", "mode": "required"}}, "tool_choice"),
        (CHAT, {"max_tokens": 0}, "max_tokens"),
        (CHAT, {"max_tokens": -2}, "max_tokens"),
        (CHAT, {"max_completion_tokens": 0}, "max_completion_tokens"),
        (CHAT, {"functions": [], "function_call": {"name": "look"}}, "tool_choice"),
        (CHAT, {"logprobs": True}, "logprobs"),
        (CHAT, {"top_logprobs": 2}, "logprobs"),
        (CHAT, {"modalities": ["text", "audio"]}, "modalities"),
        (CHAT, {"presence_penalty": 0.5}, "presence_penalty"),
        (CHAT, {"logit_bias": {"5": 1}}, "logit_bias"),
        (CHAT, {"add_generation_prompt": False}, "add_generation_prompt"),
        (CHAT, {"continue_final_message": True}, "continue_final_message"),
        (CHAT, {"n": 1_000}, "n"),
        (CHAT, {"n": 0}, "n"),
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": [{"role": "wizard", "content": "a"}]}, "messages.0.role"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages.0.content.0",
        ),
        (TEXT, {"echo": True}, "echo"),
        (TEXT, {"suffix": "b"}, "suffix"),
        (TEXT, {"logprobs": 1}, "logprobs"),
        (TEXT, {"best_of": 3}, "best_of"),
        (TEXT, {"prompt": []}, "prompt"),
        (TEXT, {"prompt": [[]]}, "token_ids"),
        (TEXT, {"prompt": [10**9]}, "token_ids"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(
    client: httpx.Client, path: str, more: dict[str, Any], param: str
) -> None:
    prompt = {"messages": [HELLO]} if path == CHAT else {"prompt": "Hello"}
    response = client.post(path, json={"model": "fake", **prompt, **more})
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert error["message"]


def test_the_newer_name_of_the_limit_counts(client: httpx.Client) -> None:
    answer = chat(client, max_completion_tokens=2, max_tokens=5).json()
    assert answer["usage"]["completion_tokens"] == 2
    assert answer["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_minus_one_is_no_limit(client: httpx.Client, field: str) -> None:
    """The reply goes on until its stop string, or to the end of the context."""
    reply = text_of(chat(client, max_tokens=60))
    stop = reply[40:44]
    assert (
        text_of(chat(client, **{"max_tokens": None, field: -1}, stop=[stop]))
        == (reply[: reply.index(stop)])
    )


def test_seeds_are_drawn_where_none_is_given(client: httpx.Client) -> None:
    for seed in (-1, None):  # one in 256 pairs of seeds says the same on the fake generator
        replies = {text_of(chat(client, temperature=1, seed=seed, max_tokens=20)) for _ in "abcde"}
        assert len(replies) > 1
    for seed in (-2, 7):
        replies = {text_of(chat(client, temperature=1, seed=seed, max_tokens=20)) for _ in "abc"}
        assert len(replies) == 1


def test_choices_differ_by_their_seeds(client: httpx.Client) -> None:
    answer = chat(client, n=3, temperature=1.0, seed=5, max_tokens=20).json()
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert answer["usage"]["completion_tokens"] == 60
    again = chat(client, n=3, temperature=1.0, seed=5, max_tokens=20).json()
    assert [choice["message"]["content"] for choice in again["choices"]] == texts


def test_a_reply_goes_on_with_its_beginning(client: httpx.Client) -> None:
    whole = text_of(chat(client, max_tokens=8, user="one"))
    cut = text_of(chat(client, max_tokens=3, user="two"))
    begun = {"role": "assistant", "content": cut}
    more = {"continue_final_message": True, "add_generation_prompt": False, "user": "two"}
    answer = chat(client, HELLO, begun, max_tokens=5, **more)
    assert cut + text_of(answer) == whole
    usage = answer.json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"] - 1


class TestCompletions:
    def test_bare_text_is_as_its_ids(self, client: httpx.Client) -> None:
        tokenizer = FakeTokenizer()
        pieces = tokenizer.split("Hello there")
        ids = [
            token_id
            for piece in pieces
            for token_id in (
                [piece.special_id] if piece.special_id is not None else tokenizer.encode(piece.text)
            )
        ]
        body = {"model": "fake", "max_tokens": 5}
        by_text = client.post(TEXT, json={**body, "prompt": "Hello there"}).json()
        by_ids = client.post(TEXT, json={**body, "prompt": ids}).json()
        assert by_text["choices"] == by_ids["choices"]
        assert by_text["usage"]["prompt_tokens"] == len(ids)

    def test_several_prompts_are_several_choices(self, client: httpx.Client) -> None:
        body = {"model": "fake", "max_tokens": 2, "prompt": ["Hello", "Good", "Hello"]}
        choices = client.post(TEXT, json=body).json()["choices"]
        assert [choice["index"] for choice in choices] == [0, 1, 2]
        assert choices[0]["text"] == choices[2]["text"]

    @pytest.mark.parametrize("n", [1, 2])
    def test_their_usage_is_the_sum(self, client: httpx.Client, n: int) -> None:
        """Each prompt counts once, as it does where it is alone, however many replies it has."""
        prompts = [f"number {n} {word} " + "Hello " * 300 for word in ("one", "two", "three")]
        body = {"model": "fake", "max_tokens": 2, "n": n}
        alone = [client.post(TEXT, json={**body, "prompt": p}).json()["usage"] for p in prompts]
        whole = client.post(TEXT, json={**body, "prompt": prompts}).json()["usage"]
        assert whole["prompt_tokens"] == sum(usage["prompt_tokens"] for usage in alone)
        assert whole["completion_tokens"] == 2 * n * len(prompts)
        cached = whole["prompt_tokens_details"]["cached_tokens"]
        assert cached >= 256 * len(prompts)
        options = {"stream": True, "stream_options": {"include_usage": True}}
        stream = client.post(TEXT, json={**body, "prompt": prompts, **options})
        assert events_of(stream.text)[-2].data["usage"] == {
            **whole,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def test_minus_one_is_no_limit(self, client: httpx.Client) -> None:
        body = {"model": "fake", "prompt": "Hello"}
        text = client.post(TEXT, json={**body, "max_tokens": 40}).json()["choices"][0]["text"]
        asked = {**body, "max_tokens": -1, "stop": text[25:29]}
        reply = client.post(TEXT, json=asked).json()["choices"][0]
        assert reply["text"] == text[: text.index(text[25:29])]

    def test_an_empty_suffix_is_none(self, client: httpx.Client) -> None:
        body = {"model": "fake", "prompt": "Hello", "max_tokens": 2, "suffix": ""}
        assert client.post(TEXT, json=body).status_code == 200

    def test_sixteen_tokens_by_default(self, client: httpx.Client) -> None:
        answer = client.post(TEXT, json={"model": "fake", "prompt": "Hello"}).json()
        assert answer["usage"]["completion_tokens"] == 16
