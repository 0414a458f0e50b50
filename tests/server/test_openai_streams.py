"""OpenAI's streams: equal to what is not streamed, and byte for byte as they were."""

import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engines import FakeFactory
from servers import fake_server

GOLDEN = Path(__file__).parent / "golden"
CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"


def collected(text: str) -> dict[str, Any]:
    """A stream's frames as the document that it should have been."""
    frames = [f[6:] for f in text.split("\n\n") if f.startswith("data: ")]
    assert frames[-1] == "[DONE]"
    chunks = [json.loads(frame) for frame in frames[:-1]]
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    texts: dict[int, str] = {}
    reasons: dict[int, str] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            index = choice["index"]
            assert index not in reasons, "something came after a choice's end"
            delta = choice.get("delta", choice)
            texts[index] = texts.get(index, "") + (delta.get("content") or delta.get("text") or "")
            if choice["finish_reason"] is not None:
                reasons[index] = choice["finish_reason"]
    assert chunks[-1]["choices"] == []
    assert [c["keepwarm"] for c in chunks if "keepwarm" in c] == [chunks[-1]["keepwarm"]]
    told = {name: chunks[-1][name] for name in ("usage", "keepwarm")}
    return {"texts": texts, "reasons": reasons, **told}


def whole(document: dict[str, Any]) -> dict[str, Any]:
    choices = document["choices"]
    return {
        "texts": {c["index"]: c.get("text", c.get("message", {}).get("content")) for c in choices},
        "reasons": {c["index"]: c["finish_reason"] for c in choices},
        "usage": document["usage"],
        "keepwarm": document["keepwarm"],
    }


def without_cache(answer: dict[str, Any]) -> dict[str, Any]:
    """The second of two equal requests finds what the first has computed."""
    usage = {k: v for k, v in answer["usage"].items() if k != "prompt_tokens_details"}
    keepwarm = {k: v for k, v in answer["keepwarm"].items() if k != "cache"}
    return {**answer, "usage": usage, "keepwarm": keepwarm}


PARAMETERS = st.fixed_dictionaries(
    {"max_tokens": st.integers(1, 40), "seed": st.integers(0, 1 << 31)},
    optional={
        "n": st.integers(1, 4),
        "stop": st.one_of(
            st.text("abcdefgh \n", min_size=1, max_size=2),
            st.lists(st.text("aeiou.x", min_size=1, max_size=2), min_size=1, max_size=4),
        ),
        "temperature": st.sampled_from([0.0, 0.7, 1.0, 2.0]),
        "top_p": st.sampled_from([0.0, 0.5, 1.0]),
        "user": st.sampled_from(["ada", "eve"]),
        "something_new": st.just(1),
    },
)
PROMPT = st.text(min_size=1, max_size=60)


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(path=st.sampled_from([CHAT, TEXT]), prompt=PROMPT, parameters=PARAMETERS)
def test_streamed_or_not_it_says_the_same(
    client: httpx.Client, path: str, prompt: str, parameters: dict[str, Any]
) -> None:
    asked = (
        {"messages": [{"role": "user", "content": prompt}]} if path == CHAT else {"prompt": prompt}
    )
    body = {"model": "fake", **asked, **parameters}
    first = client.post(path, json=body)
    assert first.status_code == 200, first.text
    options = {"stream": True, "stream_options": {"include_usage": True}}
    second = client.post(path, json={**body, **options})
    assert without_cache(collected(second.text)) == without_cache(whole(first.json()))


GOLDEN_BODIES = {
    "openai_chat": (CHAT, {"messages": [{"role": "user", "content": "Hello world"}]}),
    "openai_completions": (TEXT, {"prompt": "Hello world"}),
}


@pytest.mark.parametrize("name", GOLDEN_BODIES)
def test_the_transcript_is_as_it_was(tmp_path: Path, name: str) -> None:
    """Delete the file to have it written again."""
    path, body = GOLDEN_BODIES[name]
    script = [*"Hi é".encode(), 256, 257]
    with (
        fake_server(tmp_path, factory=FakeFactory(script=script)) as server,
        server.client() as client,
    ):
        options = {"stream": True, "stream_options": {"include_usage": True}}
        sent = {"model": "fake", "max_tokens": 6, **body, **options}
        response = client.post(path, json=sent)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    transcript = normalised(response.text)
    golden = GOLDEN / f"{name}.txt"
    if not golden.exists():
        golden.write_text(transcript, "utf-8")
        pytest.fail(f"{golden} was written; read it and keep it")
    assert transcript == golden.read_text("utf-8")


def normalised(text: str) -> str:
    """Without what differs from run to run: ids, times, and how the text falls into events."""
    text = re.sub(r'"id":"(chatcmpl|cmpl)-[0-9a-f]+"', r'"id":"\1-ID"', text)
    text = re.sub(r'"created":\d+', '"created":0', text)
    text = re.sub(r'"restored_ms":[0-9.]+', '"restored_ms":0', text)
    frames: list[tuple[int, str]] = []
    for frame in text.removesuffix("\n\n").split("\n\n"):
        index = re.search(r'"index":(\d+)', frame)
        frames.append((int(index[1]) if index else 99, frame))
    joined: list[str] = []
    for _, frame in sorted(frames, key=lambda pair: pair[0]):
        if joined and (both := _joined(joined[-1], frame)):
            joined[-1] = both
        else:
            joined.append(frame)
    return "\n\n".join(joined) + "\n\n"


def _joined(one: str, other: str) -> str | None:
    """Two events that add text to the same choice, as one."""
    adds = r'(.*(?:"delta":{"content"|"index":\d+,"text"):")(.*?)("[,}].*)'
    a, b = re.fullmatch(adds, one), re.fullmatch(adds, other)
    if a is None or b is None or not a[2] or not b[2] or (a[1], a[3]) != (b[1], b[3]):
        return None
    return f"{a[1]}{a[2]}{b[2]}{a[3]}"
