"""Every shape of conversation by every template: an answer or a reason, and a cache that is hit."""

from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from conversations import SHAPES, Messages, said
from engines import drain, fake_engine
from keepwarm.core.errors import InvalidRequest
from keepwarm.core.events import Completed
from keepwarm.core.ports import LoadedModel
from keepwarm.mlx_backend.text.tokenizer import HFTokenizer
from real_tokenizers import PACKAGES, real_tokenizer
from servers import fake_server
from templates import FAMILIES, byte_tokenizer, templated

pytestmark = pytest.mark.slow

CHAT = "/v1/chat/completions"
REPLY = "Well."

REFUSED = {
    ("gemma3", "an assistant first"),
    ("strict", "an assistant first"),
    ("mistral", "an assistant first"),
    ("old_mistral", "an assistant first"),
}
"""By the template's own words."""

FORGETFUL = {("qwen3", "an assistant last")}
"""The template writes an assistant's last message with an empty thought, and then without it."""


def real(name: str) -> Any:
    tokenizer = real_tokenizer(name)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = FAMILIES["harmony"]
    return tokenizer


TOKENIZERS: dict[str, Callable[[], Any]] = {
    **{name: lambda name=name: real(name) for name in PACKAGES},
    **{name: lambda name=name: byte_tokenizer(FAMILIES[name]) for name in FAMILIES},
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def model(request: pytest.FixtureRequest) -> tuple[str, LoadedModel]:
    return request.param, templated(TOKENIZERS[request.param](), reply=REPLY)


@pytest.fixture(scope="module")
def client(
    model: tuple[str, LoadedModel], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx.Client]:
    flags: dict[str, Any] = {"memory__budget_bytes": 1 << 26}
    with (
        fake_server(tmp_path_factory.mktemp("home"), loaded=model[1], **flags) as server,
        server.client() as client,
    ):
        yield client
        assert server.call(lambda engine: engine.batch.counters.generator_failures) == 0


def chat(client: httpx.Client, agent: str, messages: Messages) -> httpx.Response:
    body = {"model": "fake", "messages": messages, "max_tokens": 50}
    return client.post(CHAT, json=body, headers={"x-agent-id": agent})


@pytest.mark.parametrize("shape", SHAPES)
def test_a_conversation_is_answered_and_its_continuation_hits_the_cache(
    client: httpx.Client, model: tuple[str, LoadedModel], shape: str
) -> None:
    agent = shape.replace(" ", "-")
    messages = SHAPES[shape]
    first = chat(client, agent, messages)
    if (model[0], shape) in REFUSED:
        assert first.status_code == 400
        assert "chat template refuses" in first.json()["error"]["message"]
        return
    assert first.status_code == 200, first.text
    answer = first.json()
    assert answer["choices"][0]["message"]["content"] == REPLY

    following = [*messages, said("assistant", REPLY), said("user", "And?")]
    second = chat(client, agent, following)
    assert second.status_code == 200, second.text
    usage = second.json()["usage"]
    known = answer["usage"]["prompt_tokens"]
    if (model[0], shape) not in FORGETFUL:
        assert usage["prompt_tokens_details"]["cached_tokens"] >= known, second.headers
    assert usage["prompt_tokens"] > known

    third = chat(client, agent, [*following, said("assistant", REPLY), said("user", "And more?")])
    assert third.json()["usage"]["prompt_tokens_details"]["cached_tokens"] >= usage["prompt_tokens"]


@pytest.mark.parametrize("shape", SHAPES)
def test_all_that_was_said_is_in_the_prompt(model: tuple[str, LoadedModel], shape: str) -> None:
    """Or the response says what is not."""
    name, loaded = model
    if (name, shape) in REFUSED:
        return
    engine = fake_engine(tokenizer=loaded.tokenizer)
    request_id = engine.submit(messages=SHAPES[shape], max_tokens=1)
    active = engine._turns.active[request_id]
    text = "".join(span.text or "" for span in active.wanted.prompt.transcript.spans)
    words = [message["content"] for message in SHAPES[shape] if message["content"]]
    lost = [word for word in words if word.strip() not in text]
    if "text that was said with tool calls left out" in active.wanted.adapted:
        lost.remove("Let me see.")
    assert not lost
    for message in SHAPES[shape]:
        for called in message.get("tool_calls", ()):
            assert called["function"]["name"] in text
    engine.cancel(request_id)
    drain(engine)


RAISES = (
    "raise_exception('no')",
    "messages[-1].content.index('</think>')",
    "messages[-1].nothing.at_all",
    "'a' + 1",
    "1 // 0",
    "2 ** 10000000",
    "'a' * 10000000000",
    "'{a}'.format()",
    "'\\ud800'.encode()",
    "again(0)",
)
CONDITIONS = (
    "messages[-1].role == 'assistant'",
    "not add_generation_prompt",
    "messages | length > 1",
)


@pytest.mark.parametrize(("number", "raises"), list(enumerate(RAISES)))
def test_a_template_that_raises_breaks_nothing(number: int, raises: str) -> None:
    """In any family, under any condition and at any shape; and the engine goes on."""
    prelude = "{% macro again(n) %}{{ again(n + 1) }}{% endmacro %}"
    for other, template in enumerate(FAMILIES.values(), number):
        condition = CONDITIONS[other % len(CONDITIONS)]
        fault = f"{prelude}{{% if {condition} %}}{{{{ {raises} }}}}{{% endif %}}"
        check_all_shapes(HFTokenizer(byte_tokenizer(fault + template), [2]))


def check_all_shapes(tokenizer: HFTokenizer) -> None:
    engine = fake_engine(tokenizer=tokenizer)
    for shape, messages in SHAPES.items():
        try:
            request_id = engine.submit(agent_id="ada", messages=messages, max_tokens=2)
        except InvalidRequest as error:
            assert "chat template refuses" in str(error), shape
            continue
        (end,) = (event for event in run_unchecked(engine) if hasattr(event, "usage"))
        assert isinstance(end, Completed)
        assert end.request_id == request_id
    engine.check()
    assert engine.batch.counters.generator_failures == 0
    assert not engine._turns.active


def run_unchecked(engine: Any) -> list[Any]:
    events: list[Any] = []
    while engine.has_work:
        events += engine.step()
    return events
