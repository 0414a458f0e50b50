"""One agent's requests over the standard APIs, on SmolLM2: the next turn, and several at once."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from servers import home_beside, server_process

pytest.importorskip("mlx.core")

pytestmark = pytest.mark.slow

TALE = "A short tale about a river and the town that grew beside it. " * 12


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory, keepwarm_home: Path) -> Iterator[httpx.Client]:
    home = home_beside(keepwarm_home, tmp_path_factory.mktemp("home"))
    with server_process(home, home / "log") as server, server.client() as client:
        yield client


def chat(client: httpx.Client, agent: str, messages: Any, **more: Any) -> httpx.Response:
    body = {"model": "smollm2", "messages": messages, "max_tokens": 12, "temperature": 0, **more}
    response = client.post("/v1/chat/completions", json=body, headers={"X-Agent-ID": agent})
    assert response.status_code == 200, response.text
    return response


def cached(response: httpx.Response) -> int:
    return int(response.json()["usage"]["prompt_tokens_details"]["cached_tokens"])


def cache_of(response: httpx.Response) -> dict[str, str]:
    parts = response.headers["X-Keepwarm-Cache"].split("; ")
    return dict(part.split("=", 1) for part in parts)


def tier_of(client: httpx.Client, agent: str) -> str:
    return str(client.get(f"/v1/agents/{agent}").json()["tier"])


@pytest.mark.parametrize("max_tokens", [5, 12, 60])
def test_a_second_turn_computes_only_what_is_new(client: httpx.Client, max_tokens: int) -> None:
    agent = f"ada-{max_tokens}"
    messages: list[dict[str, str]] = [{"role": "user", "content": TALE}]
    first = chat(client, agent, messages, max_tokens=max_tokens)
    usage = first.json()["usage"]
    messages += [first.json()["choices"][0]["message"], {"role": "user", "content": "Go on."}]
    second = chat(client, agent, messages, max_tokens=2)
    # The reply's last token was sampled and never fed.
    assert cached(second) == usage["prompt_tokens"] + usage["completion_tokens"] - 1
    assert cache_of(second)["tier"] == "hot"
    assert (cache_of(second)["reason"], cache_of(second)["message"]) == ("new_message", "2")


@pytest.mark.parametrize("num_sentences", [1, 12])
def test_four_requests_of_one_name_leave_its_main_line_hot(
    client: httpx.Client, num_sentences: int
) -> None:
    """However short the main line is."""
    agent = f"team-{num_sentences}"
    tale = TALE[: len(TALE) * num_sentences // 12]
    messages: list[dict[str, str]] = [{"role": "user", "content": tale}]
    first = chat(client, agent, messages)
    messages.append(first.json()["choices"][0]["message"])
    sides = [[{"role": "user", "content": f"Give chat {n} a title: {tale}"}] for n in range(3)]
    prompts = [[*messages, {"role": "user", "content": "Go on."}], *sides]
    with ThreadPoolExecutor(4) as pool:
        main, *others = pool.map(lambda prompt: chat(client, agent, prompt), prompts)
    assert cached(main) >= first.json()["usage"]["prompt_tokens"]
    assert all(cached(other) < 256 for other in others)
    assert tier_of(client, agent) == "hot"
    messages = [*prompts[0], main.json()["choices"][0]["message"]]
    last = chat(client, agent, [*messages, {"role": "user", "content": "And then?"}])
    usage = main.json()["usage"]
    assert cached(last) >= usage["prompt_tokens"] + usage["completion_tokens"] - 1
    assert client.get(f"/v1/agents/{agent}").json()["num_side_lines"] == 3


def test_an_edited_message_is_named(client: httpx.Client) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": TALE},
        {"role": "assistant", "content": "A tale."},
        {"role": "user", "content": "Go on."},
    ]
    chat(client, "eve", messages, max_tokens=2)
    messages[1] = {"role": "user", "content": TALE.replace("town", "city", 1)}
    second = chat(client, "eve", messages, max_tokens=2)
    assert (cache_of(second)["reason"], cache_of(second)["message"]) == ("edited_text", "1")
    assert int(cache_of(second)["diverged_at"]) < 40
