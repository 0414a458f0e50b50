"""The Jinja environment of chat templates: transformers' own, with bounds on what they can do."""

import json
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MAX_POWER = 1 << 10
MAX_REPEATED = 1 << 20
"""How many characters or items a text or list may have once it is repeated."""


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """A sandbox in which no product gets larger than a template may write.

    A sandboxed template could still fill memory with `"x" * 10**12` (Jinja 3.1.6).
    """

    intercepted_binops = frozenset({"*", "**"})

    @classmethod
    def made(cls) -> "TemplateEnvironment":
        """Set up the filters and globals that transformers (5.23.0) gives to templates."""
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
        if operator == "*" and max(_length(left, right), _length(right, left)) > MAX_REPEATED:
            raise OverflowError("a text is repeated too often")
        return super().call_binop(context, operator, left, right)


class _GenerationTag(Extension):
    """`{% generation %}` marks an assistant's text for training. Here it is only text."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's way

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(Namespace):
    """A template's namespace, without attributes that Python itself looks for."""

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
    """Write JSON as it is: Jinja's own filter escapes what HTML escapes."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: object) -> None:
    raise jinja2.TemplateError(str(message))


def _strftime_now(form: str) -> str:
    return datetime.now().astimezone().strftime(form)


def _length(value: Any, times: Any) -> int:
    """Return how long a text or list is once it is repeated; 0 for other products."""
    is_repeated = isinstance(value, str | list | tuple) and isinstance(times, int)
    return len(value) * times if is_repeated else 0


def _is_large(value: Any, limit: int) -> bool:
    return isinstance(value, int | float) and abs(value) > limit
