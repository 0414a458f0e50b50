"""Nothing of one request is in the prompt of another that does not send it."""

from pathlib import Path
from typing import Any

import httpx
import pytest

from engines import user
from servers import fake_server

NOTE = 'A note of mine. The password of the vault is "purple heron". ' * 6
QUESTION = [user("What is the password of the vault?")]


def num_prompt(client: httpx.Client, path: str, **body: Any) -> int:
    answer = client.post(path, json={"model": "fake", "max_tokens": 4, **body})
    assert answer.status_code == 200, answer.text
    return int(answer.json()["usage"]["prompt_tokens"])


@pytest.mark.parametrize("user_name", [{}, {"user": "dev"}], ids=["nameless", "named"])
@pytest.mark.parametrize("restarts", [False, True])
def test_a_bare_completion_is_in_no_chat(
    tmp_path: Path, user_name: dict[str, str], restarts: bool
) -> None:
    with fake_server(tmp_path) as server, server.client() as client:
        count = client.post(
            "/v1/messages/count_tokens", json={"model": "fake", "messages": QUESTION}
        )
        right = count.json()["input_tokens"]
        num_prompt(client, "/v1/completions", prompt=NOTE, **user_name)
        if not restarts:
            assert num_prompt(client, "/v1/chat/completions", messages=QUESTION) == right
            told = num_prompt(client, "/v1/chat/completions", messages=QUESTION, **user_name)
            assert told == right
    if restarts:
        with fake_server(tmp_path) as server, server.client() as client:
            told = num_prompt(client, "/v1/chat/completions", messages=QUESTION, **user_name)
            assert told == right
