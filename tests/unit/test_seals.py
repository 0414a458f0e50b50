"""A row's seal: the same for the same row, another for any other."""

import sqlite3
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepwarm.store.catalog.seals import install, seal_of, sealed, sound

VALUES = st.one_of(
    st.none(), st.integers(-(1 << 63), (1 << 63) - 1), st.text(), st.binary(), st.booleans()
)
ROW = (1, "ada", b"\x00\xff", None)


@given(st.lists(VALUES, max_size=9), st.integers(0, 8), VALUES)
def test_one_value_that_differs_is_another_seal(row: list[Any], place: int, value: Any) -> None:
    assert seal_of(*row) == seal_of(*row)
    other = list(row)
    if place < len(row):
        other[place] = value
    if [(type(v), v) for v in plain(other)] != [(type(v), v) for v in plain(row)]:
        assert seal_of(*other) != seal_of(*row)


def plain(row: list[Any]) -> list[Any]:
    """Return a row as SQLite gives it back."""
    return [int(value) if isinstance(value, bool) else value for value in row]


@given(st.lists(VALUES, min_size=1, max_size=9))
def test_sqlite_says_the_same(row: list[Any]) -> None:
    row = [value.encode("utf-8", "replace") if isinstance(value, str) else value for value in row]
    db = sqlite3.connect(":memory:")
    install(db)
    marks = ", ".join("?" * len(row))
    (seal,) = db.execute(f"SELECT seal_of({marks})", row).fetchone()
    db.close()
    assert seal == seal_of(*row)


def test_a_seal_fits_into_sqlite() -> None:
    assert all(-(1 << 63) <= seal_of(number) < 1 << 63 for number in range(1000))


@pytest.mark.parametrize("other", ["1", 1.0, b"1", None, 2])
def test_of_another_type_is_another_row(other: object) -> None:
    assert seal_of(other, *ROW[1:]) != seal_of(*ROW)


def test_rows_with_a_wrong_seal_are_left_out() -> None:
    good, bad = sealed([ROW, (2, "bob", b"", None)])
    assert list(sound([good, (*bad[:-1], bad[-1] ^ 1)])) == [ROW]
    assert list(sound([(*ROW, None), good])) == [ROW]
