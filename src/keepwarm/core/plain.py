"""What a message may be made of: values that JSON has, and that everything that reads it can hold.

Whatever is kept with a turn is written to the catalogue, shown by the API and carried in bundles.
One check at each door, a request's and a bundle's, keeps out what any of them could not give back.
"""

import math
from collections.abc import Mapping

MAX_DEPTH = 64
"""How deep a message's values may be nested, like the arguments of a tool call."""
MIN_INT = -(1 << 63)
MAX_INT = (1 << 64) - 1

Plain = None | bool | int | float | str | list["Plain"] | dict[str, "Plain"]


class NotPlain(Exception):
    """What is wrong with a value; the door knows whose it is."""


def plain(value: object, depth: int = 0) -> Plain:
    """A copy of the value as JSON gives it back: tuples are lists. Raises NotPlain."""
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
    """The same for what is an object, like a whole message."""
    return {_key(key): plain(item, depth + 1) for key, item in value.items()}


def check_text(text: str) -> None:
    """Raise NotPlain when the text has half of a surrogate pair: no tokenizer takes it."""
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
    """JSON's grammar bounds no number; what other programs can read has 64 bits."""
    if isinstance(number, int):
        if not MIN_INT <= number <= MAX_INT:
            raise NotPlain("has a whole number of more than 64 bits")
        return int(number)
    if not math.isfinite(number):
        raise NotPlain(f"has the number {number}, which JSON does not have")
    return float(number)
