"""A prompt that is too long by its size alone is refused, and nothing is done for it."""

from typing import Any

import pytest

from engines import fake_engine, user
from keepwarm.core.errors import ContextTooLong, InvalidRequest, NeverFits
from keepwarm.engine.prompt.limits import least_tokens, least_tokens_of
from keepwarm.engine.requests import PromptSource
from keepwarm.testing.tokenizer import FakeTokenizer

TOKENIZER = FakeTokenizer()
LARGE = "Hello world. " * (8 * 2**20 // 13)
# The fake's longest token has nine bytes.
LEAST_OF_LARGE = -(-len(LARGE) // 9)


class Untouched(FakeTokenizer):
    """Nothing may be rendered or encoded."""

    def render(self, *args: Any, **options: Any) -> Any:
        raise AssertionError("rendered")

    def encode(self, text: str) -> list[int]:
        raise AssertionError("encoded")


class Unencoded(FakeTokenizer):
    """Nothing may be encoded."""

    def encode(self, text: str) -> list[int]:
        raise AssertionError("encoded")


PARTS = [{"type": "text", "text": LARGE}]
TOO_LARGE: list[tuple[dict[str, Any], int]] = [
    ({"messages": [user(LARGE)]}, LEAST_OF_LARGE),
    ({"messages": [{"role": "user", "content": PARTS}]}, LEAST_OF_LARGE),
    ({"messages": [user("")] * 100_000}, 100_000),
    ({"append": [user(LARGE)], "agent_id": "ada"}, LEAST_OF_LARGE),
    ({"append": [user("Hello")] * 100_000, "agent_id": "ada"}, 100_000),
    ({"token_ids": [1] * 100_000}, 100_000),
]


@pytest.mark.parametrize(("request_", "least"), TOO_LARGE, ids=lambda value: type(value).__name__)
def test_it_is_refused_by_its_size_alone(request_: dict[str, Any], least: int) -> None:
    engine = fake_engine(tokenizer=Untouched(), max_context_tokens=8192)
    engine.create("ada")
    with pytest.raises(ContextTooLong) as caught:
        engine.submit(**request_)
    assert str(caught.value).startswith(f"prompt is too long: {least} tokens > 8191 maximum; ")
    assert not engine._turns.active
    assert not engine.turns("ada")


def test_so_it_is_by_what_the_memory_budget_holds() -> None:
    engine = fake_engine(tokenizer=Untouched(), num_blocks=4)
    with pytest.raises(NeverFits) as caught:
        engine.submit(messages=[user("x" * 90_000)])
    assert str(caught.value).startswith("prompt is too long: 10000 tokens > 1023 maximum; ")


def test_bare_text_is_cut_at_its_special_tokens_and_not_encoded() -> None:
    engine = fake_engine(tokenizer=Unencoded(), max_context_tokens=8192)
    with pytest.raises(ContextTooLong) as caught:
        engine.submit(text=f"<|im_start|>{LARGE}")
    assert caught.value.num_prompt_tokens == 2 + LEAST_OF_LARGE  # the template's BOS as well


def test_what_is_too_long_is_not_counted_either() -> None:
    engine = fake_engine(tokenizer=Untouched(), max_context_tokens=8192)
    with pytest.raises(ContextTooLong):
        engine.count_tokens(messages=[user(LARGE)])


@pytest.mark.parametrize("messages", [7, "text", [7], [{"role": "user", "content": 7}], [{}]])
def test_what_is_no_list_of_messages_is_refused_as_that(messages: Any) -> None:
    with pytest.raises(InvalidRequest, match="message"):
        fake_engine().submit(messages=messages)


def test_the_least_is_never_more_than_what_is_counted() -> None:
    engine = fake_engine()
    for content in ("", "assistant" * 40, "Hello 😀 world", "\x01<|im_start|>"):
        messages = [user(content), {"role": "assistant", "content": content}, user(content)]
        counted = engine.count_tokens(messages=messages)
        assert least_tokens(PromptSource(messages=messages), TOKENIZER) <= counted
        assert least_tokens_of(TOKENIZER.render(messages), TOKENIZER) <= counted
