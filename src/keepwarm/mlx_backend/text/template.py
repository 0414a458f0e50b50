"""A model's chat template: foreign code, which may raise anything and write without end."""

import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from keepwarm.core.errors import InvalidRequest, TemplateRefused
from keepwarm.mlx_backend.text.template_environment import TemplateEnvironment

FREE_CHARACTERS = 1 << 20
CHARACTERS_PER_VALUE = 1 << 10
CHARACTERS_PER_CHARACTER = 16
"""How many characters a template may write: FREE_CHARACTERS in any case, and more for each value
and each character of the messages."""

REASONING = ("reasoning_content", "thinking", "reasoning")
"""The fields by which clients and templates know reasoning; every template is given the first."""

Apply = Callable[[list[Any], bool], Iterable[str]]
"""Renders messages, with a generation prompt or without, piece by piece."""


class ChatTemplate:
    """The template of transformers' fast tokenizer, or of mlx-lm's wrapper around it.

    Rendered as transformers (5.23.0) renders it, except that a message's `content` None stays None:
    templates recognise a tool call by that. Any thread may call `render`.
    """

    def __init__(self, owner: Any) -> None:
        self._owner = owner

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool) -> str:
        """Render the messages. Whatever the template raises becomes TemplateRefused, as does text
        beyond what these messages may need; InvalidRequest where there is no template.
        """
        prepared = [_prepared(message) for message in messages]
        limit = _limit(prepared)
        written: list[str] = []
        num_written = 0
        try:
            for text in self._apply(prepared, add_generation_prompt):
                num_written += len(text)
                if num_written > limit:
                    raise OverflowError(f"it writes more than {limit:,} characters")
                written.append(text)
            return "".join(written)
        except InvalidRequest:
            raise
        except Exception as error:  # a template is code that came with a model
            raise TemplateRefused(_reason(error)) from error

    @cached_property
    def _apply(self) -> Apply:
        tokenizer = unwrapped(self._owner)
        if not _has_template(self._owner):
            raise InvalidRequest("messages", "the model has no chat template; send a text prompt")
        if _writes_in_python(self._owner, tokenizer):
            return self._call_owner
        given = dict(tokenizer.special_tokens_map)
        if self._owner is not tokenizer:
            given["enable_thinking"] = self._owner.has_thinking
        compiled = TemplateEnvironment.made().from_string(tokenizer.get_chat_template())

        def apply(messages: list[Any], add_generation_prompt: bool) -> Iterator[str]:
            return compiled.generate(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **given,
            )

        return apply

    def _call_owner(self, messages: list[Any], add_generation_prompt: bool) -> Iterator[str]:
        yield str(
            self._owner.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )


def _prepared(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return the message without None values, with its reasoning under every name of it."""
    prepared = {
        key: value for key, value in message.items() if value is not None or key == "content"
    }
    thought = next((prepared[name] for name in REASONING if name in prepared), None)
    if thought is not None:
        prepared = {"thinking": thought, **prepared, "reasoning_content": thought}
    return prepared


def _limit(messages: Sequence[Any]) -> int:
    """Return how many characters a template may write for these messages."""
    num_values = num_characters = 0
    unseen: list[Any] = list(messages)
    while unseen:
        value = unseen.pop()
        num_values += 1
        if isinstance(value, str):
            num_characters += len(value)
        elif isinstance(value, Mapping):
            unseen += (*value.keys(), *value.values())
        elif isinstance(value, list | tuple):
            unseen += value
    return (
        FREE_CHARACTERS
        + CHARACTERS_PER_VALUE * num_values
        + CHARACTERS_PER_CHARACTER * num_characters
    )


def _reason(error: Exception) -> str:
    """Return the template's own words where it refuses on purpose; otherwise what failed, and
    where.
    """
    if type(error) is jinja2.TemplateError:
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == "<template>"]
    where = f" at its line {lines[-1]}" if lines else ""
    return f"{type(error).__name__}{where}: {error}"


def unwrapped(owner: Any) -> Any:
    """Transformers' tokenizer, out of mlx-lm's wrapper if it is in one."""
    return owner if isinstance(owner, PreTrainedTokenizerBase) else owner._tokenizer


def _has_template(owner: Any) -> bool:
    if isinstance(owner, PreTrainedTokenizerBase):
        return owner.chat_template is not None
    return bool(owner.has_chat_template)


def _writes_in_python(owner: Any, tokenizer: Any) -> bool:
    """Whether its template is a function, of the tokenizer's class or of mlx-lm."""
    is_plain = type(tokenizer).apply_chat_template is PreTrainedTokenizerBase.apply_chat_template
    return not is_plain or getattr(owner, "_chat_template", None) is not None
