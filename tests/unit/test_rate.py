"""Requests in a minute, by a clock that only goes forward."""

import time

from hypothesis import given
from hypothesis import strategies as st

from keepwarm.server.edge import rate
from keepwarm.server.edge.rate import WINDOW_S, RateLimit


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@given(
    per_minute=st.integers(1, 5),
    pauses=st.lists(st.sampled_from([0.0, 0.5, 7.0, 20.0, 59.5, 60.0, 61.0]), max_size=40),
)
def test_never_more_in_any_minute_and_never_fewer_than_allowed(
    per_minute: int, pauses: list[float]
) -> None:
    clock = Clock()
    limit = RateLimit(per_minute, clock)
    let_in: list[float] = []
    for pause in pauses:
        clock.now_s += pause
        recent = [at for at in let_in if clock.now_s - at < WINDOW_S]
        wait_s = limit.wait_s("ada")
        assert (wait_s == 0.0) == (len(recent) < per_minute)
        if wait_s == 0.0:
            let_in.append(clock.now_s)
        else:
            assert wait_s == recent[0] + WINDOW_S - clock.now_s


def test_it_may_ask_when_it_has_waited() -> None:
    clock = Clock()
    limit = RateLimit(2, clock)
    assert [limit.wait_s("ada") for _ in range(3)] == [0.0, 0.0, 60.0]
    assert limit.wait_s("bob") == 0.0
    clock.now_s += 60.0
    assert limit.wait_s("ada") == 0.0


def test_of_many_clients_the_last_are_remembered() -> None:
    limit = RateLimit(1, Clock())
    for number in range(10 * rate.MAX_CLIENTS):
        assert limit.wait_s(f"address {number}") == 0.0
        assert limit.wait_s("ada") == (0.0 if number == 0 else 60.0)
    assert len(limit._asked) == rate.MAX_CLIENTS


def test_the_clock_is_not_the_walls() -> None:
    """Which is set back and forward; a limit by it once held for hours, or not at all."""
    assert RateLimit(1)._now is time.monotonic
