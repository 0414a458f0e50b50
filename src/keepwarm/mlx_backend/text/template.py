"""A model's chat template: foreign code, which may raise anything and write without end."""

import json
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from transformers import PreTrainedTokenizerBase

from keepwarm.core.errors import InvalidRequest, TemplateRefused

FREE_CHARACTERS = 1 << 20
CHARACTERS_PER_VALUE = 1 << 10
CHARACTERS_PER_CHARACTER = 16
"""What a template may write: so many in any case, and for each value and character of a message."""
MAX_POWER = 1 << 10

REASONING = ("reasoning_content", "thinking", "reasoning")
"""The names by which clients and templates know what was thought. The first is everybody's."""

Apply = Callable[[list[Any], bool], Iterable[str]]


class ChatTemplate:
    """The template of transformers' fast tokenizer, or of mlx-lm's wrapper around it.

    It is rendered as transformers renders it, but for a message whose `content` is None, which
    stays so: templates tell a call of a tool by that. `render` can be called from any thread.
    """

    def __init__(self, owner: Any) -> None:
        self._owner = owner

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool) -> str:
        """Raises TemplateRefused, whatever the template raises, and where it writes too much."""
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
        compiled = _Environment.made().from_string(tokenizer.get_chat_template())

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


class _Environment(ImmutableSandboxedEnvironment):
    """Transformers' own, in which no product is larger than a template may write."""

    intercepted_binops = frozenset({"*", "**"})

    @classmethod
    def made(cls) -> "_Environment":
        environment = cls(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        environment.globals["namespace"] = _namespace
        return environment

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and _is_large(right, MAX_POWER):
            raise OverflowError("a power is too large")
        if operator == "*" and max(_length(left, right), _length(right, left)) > FREE_CHARACTERS:
            raise OverflowError("a text is repeated too often")
        return super().call_binop(context, operator, left, right)


class _GenerationTag(Extension):
    """`{% generation %}` marks an assistant's text for those who train. Here it is only text."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's way

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(Namespace):
    """Without names that Python itself looks for."""

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _namespace(*pairs: Any, **attributes: Any) -> _Namespace:
    for name in dict(*pairs, **attributes):
        _check_name(name)
    return _Namespace(*pairs, **attributes)


def _check_name(name: object) -> None:
    if str(name).startswith("_"):
        raise jinja2.exceptions.SecurityError(f"{name!r} is no name for an attribute")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own would escape what HTML escapes."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: object) -> None:
    raise jinja2.TemplateError(str(message))


def _strftime_now(form: str) -> str:
    return datetime.now().astimezone().strftime(form)


def _prepared(message: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is None, as templates ask for keys; what was thought under its known names."""
    prepared = {
        key: value for key, value in message.items() if value is not None or key == "content"
    }
    thought = next((prepared[name] for name in REASONING if name in prepared), None)
    if thought is not None:
        prepared = {"thinking": thought, **prepared, "reasoning_content": thought}
    return prepared


def _limit(messages: Sequence[Any]) -> int:
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


def _length(value: Any, times: Any) -> int:
    """Of a text or list that is repeated so many times."""
    is_repeated = isinstance(value, str | list | tuple) and isinstance(times, int)
    return len(value) * times if is_repeated else 0


def _is_large(value: Any, limit: int) -> bool:
    return isinstance(value, int | float) and abs(value) > limit


def _reason(error: Exception) -> str:
    """Its own words where it means to refuse; otherwise what happened, and where."""
    if type(error) is jinja2.TemplateError:
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == "<template>"]
    where = f" at its line {lines[-1]}" if lines else ""
    return f"{type(error).__name__}{where}: {error}"


def unwrapped(owner: Any) -> Any:
    """Transformers' tokenizer."""
    return owner if isinstance(owner, PreTrainedTokenizerBase) else owner._tokenizer


def _has_template(owner: Any) -> bool:
    if isinstance(owner, PreTrainedTokenizerBase):
        return owner.chat_template is not None
    return bool(owner.has_chat_template)


def _writes_in_python(owner: Any, tokenizer: Any) -> bool:
    """Whether its template is a function, of the tokenizer's class or of mlx-lm."""
    is_plain = type(tokenizer).apply_chat_template is PreTrainedTokenizerBase.apply_chat_template
    return not is_plain or getattr(owner, "_chat_template", None) is not None
