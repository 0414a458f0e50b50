"""Timings: percentiles, and two sides measured in turns so that both meet the same machine."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Percentiles of the times of calls, in seconds."""

    p50_s: float
    p95_s: float
    p99_s: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Percentiles":
        return cls(*(float(value) for value in np.percentile(seconds, (50, 95, 99))))


def timed(call: Callable[[], object]) -> float:
    """Return the seconds that the call takes."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def median(seconds: Sequence[float]) -> float:
    return float(np.median(seconds))
