"""Limits how many requests a client may send in a minute."""

import time
from collections import OrderedDict, deque
from collections.abc import Callable

WINDOW_S = 60.0
MAX_CLIENTS = 1024
"""How many clients are remembered, those that asked last: a sender has any number of addresses."""


class RateLimit:
    """Remembers the last `per_minute` requests of each client, by a monotonic clock."""

    def __init__(self, per_minute: int, now: Callable[[], float] = time.monotonic) -> None:
        self.per_minute = per_minute
        self._now = now
        self._asked: OrderedDict[str, deque[float]] = OrderedDict()

    def __repr__(self) -> str:
        return f"RateLimit({self.per_minute} per minute, {len(self._asked)} clients)"

    def wait_s(self, client: str) -> float:
        """Seconds until the client may ask again; at 0.0 it may now, and the request is counted."""
        now = self._now()
        asked = self._asked.setdefault(client, deque(maxlen=self.per_minute))
        self._asked.move_to_end(client)
        if len(self._asked) > MAX_CLIENTS:
            self._asked.popitem(last=False)
        if len(asked) == self.per_minute and now - asked[0] < WINDOW_S:
            return asked[0] + WINDOW_S - now
        asked.append(now)
        return 0.0
