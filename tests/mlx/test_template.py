"""Chat templates are foreign code: what they raise and how much they write is contained."""

import sys
import threading
from typing import Any

import pytest

from hf_tokenizers import sentencepiece_tokenizer
from keepwarm.core.errors import InvalidRequest, TemplateRefused
from keepwarm.mlx_backend.text.template import FREE_CHARACTERS
from keepwarm.mlx_backend.text.tokenizer import HFTokenizer
from templates import FAMILIES, byte_tokenizer

HELLO = [{"role": "user", "content": "Hello"}]
RAISING = {
    "{{ raise_exception('one at a time') }}": "one at a time",
    "{{ messages[0]['content'].index('</think>') }}": "ValueError",
    "{{ messages[0].nothing.at_all }}": "UndefinedError",
    "{{ dict([1]) }}": "TypeError",
    "{{ '{a}'.format() }}": "KeyError",
    "{{ '{}'.format() }}": "IndexError",
    "{{ 'a' + 1 }}": "TypeError",
    "{{ 1 // 0 }}": "ZeroDivisionError",
    "{{ messages[0].content.encode('ascii') + 1 }}": "TypeError",
    "{% macro again(n) %}{{ again(n + 1) }}{% endmacro %}{{ again(0) }}": "RecursionError",
    "{{ 2.0 ** 1000 * 2.0 ** 1000 * 10 ** 400 }}": "OverflowError",
    "{{ 2 ** 100000 }}": "OverflowError",
    "{{ 'a' * 10000000000 }}": "OverflowError",
    "{{ 10000000000 * 'a' }}": "OverflowError",
    "{{ range(10000000000) | list }}": "OverflowError",
    "{{ 'é'.encode('ascii') }}": "UnicodeEncodeError",
    "{{ messages[0].content.__class__() }}": "SecurityError",
    "{% set n = namespace(_secret=1) %}": "SecurityError",
    "{% set n = namespace() %}{% set n._secret = 1 %}": "SecurityError",
    "{{ messages.append(1) }}": "SecurityError",
    "{{ 'a' | no_such_filter }}": "TemplateAssertionError",
    "{% if %}": "TemplateSyntaxError",
    "{% include 'file' %}": "TypeError",
}


def tokenizer_of(template: str) -> HFTokenizer:
    return HFTokenizer(byte_tokenizer(template), [2])


@pytest.mark.parametrize("template", RAISING)
def test_whatever_a_template_raises_is_a_refusal(template: str) -> None:
    tokenizer = tokenizer_of(template)
    for _ in range(2):
        with pytest.raises(TemplateRefused, match=r"chat template") as caught:
            tokenizer.render(HELLO)
        assert RAISING[template] in str(caught.value)
        assert caught.value.field == "messages"


def test_a_refusal_says_where() -> None:
    with pytest.raises(TemplateRefused, match="ZeroDivisionError at its line 3"):
        tokenizer_of("a\nb\n{{ 1 / 0 }}\n").render(HELLO)


def test_a_refusal_that_quotes_the_conversation_is_short() -> None:
    with pytest.raises(TemplateRefused) as caught:
        tokenizer_of("{{ raise_exception(messages[0].content) }}").render(
            [{"role": "user", "content": "a" * 100_000}]
        )
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "template",
    [
        "{% for n in range(100000) %}{% for m in range(100000) %}more{% endfor %}{% endfor %}",
        "{% for n in range(100000) %}{{ messages[0].content * 100 }}{% endfor %}",
    ],
)
def test_a_template_that_writes_without_end_is_stopped(template: str) -> None:
    with pytest.raises(TemplateRefused, match="writes more than"):
        tokenizer_of(template).render(HELLO)


def test_a_long_conversation_may_become_a_long_prompt() -> None:
    messages = [{"role": "user", "content": "\x01" * (2 * FREE_CHARACTERS)}]
    pieces = tokenizer_of("{{ messages | tojson }}").render(messages)
    assert len(pieces[0].text) > 12 * FREE_CHARACTERS


def test_templates_in_python_are_contained_as_well() -> None:
    class Wrapper:
        has_chat_template = True
        has_thinking = False

        def __init__(self, inner: Any) -> None:
            self._tokenizer = inner
            self._chat_template = object()

        def apply_chat_template(self, *arguments: Any, **more: Any) -> str:
            raise LookupError("no such thing")

    with pytest.raises(TemplateRefused, match="LookupError: no such thing"):
        HFTokenizer(Wrapper(byte_tokenizer(FAMILIES["plain"])), [2]).render(HELLO)


def test_what_templates_are_given_is_what_transformers_gives() -> None:
    template = (
        "{{ bos_token }}{% generation %}{{ messages[1].reasoning_content }}{% endgeneration %}"
        "{{ messages | length }}{{ tools is none }}{{ add_generation_prompt }}"
        "{% for m in messages %}{% if loop.index == 3 %}{% break %}{% endif %}{{ m | tojson }}"
        "{% endfor %}{% set n = namespace(a=1) %}{% set n.a = 'é<' %}{{ n.a | tojson }}"
        "{{ strftime_now('%Y') | length }}"
    )
    messages = [*HELLO, {"role": "assistant", "content": "b", "reasoning": "c", "name": None}]
    hf_tokenizer = byte_tokenizer(template)
    expected = hf_tokenizer.apply_chat_template(messages, tokenize=False)
    pieces = HFTokenizer(hf_tokenizer, [2]).render(messages, add_generation_prompt=False)
    assert "".join(piece.text for piece in pieces) == expected


def test_many_threads_may_render() -> None:
    tokenizer = tokenizer_of(FAMILIES["plain"])
    expected = tokenizer.render(HELLO * 50)
    wrong: list[object] = []

    def render() -> None:
        for _ in range(20):
            pieces = tokenizer.render(HELLO * 50)
            wrong.extend([pieces] * (pieces != expected))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=render) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong


def test_a_tokenizer_that_panics_refuses_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        pass

    class Panicking:
        def encode(self, *arguments: object, **more: object) -> None:
            raise PanicException("not a char boundary")

    tokenizer = HFTokenizer(sentencepiece_tokenizer("first"), [2])
    monkeypatch.setattr(tokenizer, "_fast", Panicking())
    with pytest.raises(InvalidRequest, match="not a char boundary"):
        tokenizer.encode("Hello")
