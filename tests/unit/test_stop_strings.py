"""Stop strings: which are taken, and what looking for them costs."""

import pytest

from keepwarm.core.errors import InvalidRequest
from keepwarm.engine.reply.stop_strings import (
    MAX_STOP_BYTES,
    MAX_STOPS,
    StopMatch,
    StopSearch,
    validate_stop,
)


def test_the_stop_string_that_is_complete_first_wins() -> None:
    assert StopSearch(["abcd", "bc"]).push("xabcd") == StopMatch(2, "bc")
    assert StopSearch(["b", "ab"]).push("xab") == StopMatch(1, "ab")
    assert StopSearch(["b"]).push("x") is None
    assert StopSearch([]).push("x") is None


def test_what_may_begin_a_stop_string_is_remembered_and_nothing_else() -> None:
    search = StopSearch(["\nUser:", "ring"])
    assert search.push("a long text\nUs") is None
    assert search.num_possible == 3
    assert search.push("er, r") is None
    assert search.num_possible == 1
    assert search.push("ing") == StopMatch(0, "ring")


class CountingStr(str):
    """Counts what is asked of the text that is searched."""

    __slots__ = ()
    num_looks = 0

    def __add__(self, other: str) -> "CountingStr":
        return CountingStr(super().__add__(other))

    def endswith(self, *args: object) -> bool:  # type: ignore[override]
        CountingStr.num_looks += 1
        return super().endswith(*args)  # type: ignore[arg-type]


def test_a_character_costs_as_much_with_one_stop_string_as_with_many() -> None:
    text = "".join("ab"[n * n * n % 11 % 2] for n in range(2000))
    stops = [f"{text[n : n + MAX_STOP_BYTES - 1]}c" for n in range(MAX_STOPS)]

    def num_looks(stops: list[str]) -> int:
        search = StopSearch(stops)
        CountingStr.num_looks = 0
        for character in text:
            search._possible = CountingStr(search._possible)
            assert search.push(character) is None
        return CountingStr.num_looks

    assert num_looks(stops) == num_looks(stops[:1]) == len(text)


def test_stop_strings_are_normalised() -> None:
    assert validate_stop(None) == ()
    assert validate_stop("a") == ("a",)
    assert validate_stop(["a", "b"]) == ("a", "b")
    assert len(validate_stop(["é" * (MAX_STOP_BYTES // 2)] * MAX_STOPS)) == MAX_STOPS


@pytest.mark.parametrize(
    ("stop", "problem"),
    [
        ("", "empty"),
        (["a", ""], "empty"),
        (7, "int"),
        ([7], "int"),
        (b"a", "bytes"),
        (["a"] * 65, "has 65 strings; at most 64 are taken"),
        ("é" * 129, "has a string of 258 bytes; at most 256 are taken"),
    ],
)
def test_a_stop_that_cannot_work_is_refused(stop: object, problem: str) -> None:
    with pytest.raises(InvalidRequest, match=problem) as caught:
        validate_stop(stop)
    assert caught.value.field == "stop"
