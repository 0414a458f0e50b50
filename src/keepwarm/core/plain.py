"""Plain values: what a message may consist of, because JSON and every reader of it can hold them.

All that is kept with a turn is written to the catalogue, shown by the API and carried in bundles.
Requests and imported bundles are checked once, where they come in, so that none of these can fail.
"""

import math
from collections.abc import Mapping

MAX_DEPTH = 64
"""How deep a message's values may be nested; the arguments of a tool call are the deep ones."""
MIN_INT = -(1 << 63)
MAX_INT = (1 << 64) - 1

Plain = None | bool | int | float | str | list["Plain"] | dict[str, "Plain"]


class NotPlain(Exception):
    """What is wrong with a value, as the end of a sentence that begins with whose value it is."""


def plain(value: object, depth: int = 0) -> Plain:
    """Copy the value as JSON would give it back: tuples become lists. Raises NotPlain."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, int | float):
        return _number(value)
    if not isinstance(value, Mapping | list | tuple):
        raise NotPlain(f"has a {type(value).__name__}, which JSON does not have")
    if depth >= MAX_DEPTH:
        raise NotPlain(f"is nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, Mapping):
        return plain_object(value, depth)
    return [plain(item, depth + 1) for item in value]


def plain_object(value: Mapping[str, object], depth: int = 0) -> dict[str, Plain]:
    """Copy an object, like a whole message, as JSON would give it back. Raises NotPlain."""
    return {_key(key): plain(item, depth + 1) for key, item in value.items()}


def check_text(text: str) -> None:
    """Raise NotPlain for half of a surrogate pair in the text, which no tokenizer takes."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        problem = f"has half of a surrogate pair, {half!r}; send whole characters"
        raise NotPlain(problem) from error


def _text(text: str) -> str:
    check_text(text)
    return str(text)


def _key(key: object) -> str:
    if not isinstance(key, str):
        raise NotPlain(f"has the key {key!r}, which is not text")
    return _text(key)


def _number(number: float) -> float:
    """Refuse numbers that JSON's grammar allows but other programs cannot read: over 64 bits."""
    if isinstance(number, int):
        if not MIN_INT <= number <= MAX_INT:
            raise NotPlain("has a whole number of more than 64 bits")
        return int(number)
    if not math.isfinite(number):
        raise NotPlain(f"has the number {number}, which JSON does not have")
    return float(number)
