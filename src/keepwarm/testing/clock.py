"""A clock that only a test moves."""


class FakeClock:
    """Promises seconds that grow by `tick_s` with each reading, and by what `advance` is given.

    >>> clock = FakeClock(tick_s=0.5)
    >>> clock(), clock()
    (0.5, 1.0)
    >>> clock.advance(10.0)
    >>> clock()
    11.5
    """

    def __init__(self, start_s: float = 0.0, *, tick_s: float = 0.001) -> None:
        self.now_s = start_s
        self._tick_s = tick_s

    def __call__(self) -> float:
        self.now_s += self._tick_s
        return self.now_s

    def advance(self, seconds: float) -> None:
        self.now_s += seconds
