"""Stop strings: which are accepted, and where in a growing reply one is complete."""

from collections.abc import Sequence
from dataclasses import dataclass

from keepwarm.core.errors import InvalidRequest

MAX_STOPS = 64
"""How many stop strings a request may have. OpenAI accepts 4; role-play clients send one for every
character's name."""
MAX_STOP_BYTES = 256
"""How long a stop string may be in UTF-8. With `MAX_STOPS` it bounds the memory of `StopSearch`."""


@dataclass(frozen=True, slots=True)
class StopMatch:
    """A complete stop string, which begins `start` characters into the text not sent yet."""

    start: int
    stop: str


class StopSearch:
    """Looks for stop strings in one reply's text, which comes in pieces.

    Remembers the longest end of the text that some stop string begins with; nothing before it can
    belong to one. So a character costs as much with `MAX_STOPS` stop strings as with one.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._longest_first = sorted(self._stops, key=len, reverse=True)
        self._beginnings = {stop[:length] for stop in stops for length in range(1, len(stop))}
        self._possible = ""

    def __repr__(self) -> str:
        return f"StopSearch({len(self._stops)} strings, {self._possible!r} may begin one)"

    @property
    def num_possible(self) -> int:
        """How many of the last characters may begin a stop string, and have to be held back."""
        return len(self._possible)

    def push(self, text: str) -> StopMatch | None:
        """Take the next text; return the stop string that it completes first, if there is one.

        Of those complete at the same character the longest counts, so that the answer does not
        depend on how the text was cut into tokens. `start` counts from the first of the
        `num_possible` characters before this text.
        """
        if not self._stops:
            return None
        num_held = len(self._possible)
        for position, character in enumerate(text, num_held + 1):
            ending = self._possible + character
            if ending.endswith(self._stops):
                stop = next(stop for stop in self._longest_first if ending.endswith(stop))
                return StopMatch(position - len(stop), stop)
            self._possible = self._longest_beginning(ending)
        return None

    def _longest_beginning(self, ending: str) -> str:
        """Return the longest end that begins a stop string; over a whole text, linear in its
        length.
        """
        while ending and ending not in self._beginnings:
            ending = ending[1:]
        return ending


def validate_stop(stop: object) -> tuple[str, ...]:
    """Return a request's stop strings, given as none, one, or a list. Raises InvalidRequest."""
    if stop is None:
        return ()
    if isinstance(stop, str):
        return (_valid_stop(stop),)
    if isinstance(stop, Sequence) and not isinstance(stop, bytes):
        check_num_stops("stop", len(stop))
        return tuple(_valid_stop(item) for item in stop)
    raise InvalidRequest("stop", f"must be a string or a list of strings, not {_kind(stop)}")


def check_num_stops(field: str, num_stops: int) -> None:
    """Raise InvalidRequest for more than `MAX_STOPS` stop strings."""
    if num_stops > MAX_STOPS:
        raise InvalidRequest(field, f"has {num_stops} strings; at most {MAX_STOPS} are taken")


def _valid_stop(item: object) -> str:
    if not isinstance(item, str):
        raise InvalidRequest("stop", f"must hold strings only, not {_kind(item)}")
    if not item:
        raise InvalidRequest("stop", "an empty string would stop every reply at once")
    num_bytes = len(item.encode("utf-8", "surrogatepass"))
    if num_bytes > MAX_STOP_BYTES:
        problem = f"has a string of {num_bytes} bytes; at most {MAX_STOP_BYTES} are taken"
        raise InvalidRequest("stop", problem)
    return item


def _kind(value: object) -> str:
    return type(value).__name__
