"""Memory goes back after large bodies, and not after others."""

import asyncio

import pytest

from doors import run, until
from keepwarm.server.edge.memory import LARGE_BYTES, MemoryReturn, give_back


@pytest.mark.parametrize(
    ("sizes", "times"),
    [
        ([], 0),
        ([0, 100, LARGE_BYTES - 1] * 100, 0),
        ([LARGE_BYTES], 1),
        ([8 * LARGE_BYTES] * 5, 1),
    ],
)
def test_once_for_those_that_came_together(sizes: list[int], times: int) -> None:
    given: list[str] = []

    async def bodies() -> None:
        memory = MemoryReturn(lambda: given.append("back"), after_s=0.0)
        for size in sizes:
            memory.came(size)
        await asyncio.sleep(0.0)
        await until(lambda: len(given) >= times)

    run(bodies())
    assert len(given) == times


def test_and_again_for_later_ones() -> None:
    given: list[str] = []

    async def bodies() -> None:
        memory = MemoryReturn(lambda: given.append("back"), after_s=0.0)
        for number in range(3):
            memory.came(LARGE_BYTES)
            await until(lambda number=number: len(given) > number)

    run(bodies())
    assert len(given) == 3


def test_it_may_be_called_anywhere() -> None:
    give_back()
