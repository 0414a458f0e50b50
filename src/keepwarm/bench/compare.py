"""What two recordings of one reply differ by, and whether that is allowed."""

from collections.abc import Collection
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from keepwarm.bench.recording import Logits, Recording
from keepwarm.mlx_backend.compute.payload import RawArray


@dataclass(frozen=True, slots=True)
class Bounds:
    """The largest differences that legitimate computations of one reply may show."""

    logits: float
    kv: float


FLOAT32_BOUNDS = Bounds(logits=1e-3, kv=5e-4)
"""Legitimate paths differ by 2.2e-4 and 1.0e-4 (measured); float16-rounded KV by 7e-3."""

BOUND_FACTOR = 4
"""How many times the largest difference between mlx-lm's own runs, in dtypes but float32."""


@dataclass(frozen=True, slots=True)
class Difference:
    """How far a recording is from its reference.

    `num_ties`: steps in which the best token differs and the reference's two best are closer than
    twice the bound. `num_flips`: those in which they are not.
    """

    num_steps: int
    max_logits: float
    max_kv: float
    num_ties: int
    num_flips: int

    def is_within(self, bounds: Bounds) -> bool:
        return self.num_flips == 0 and self.max_logits <= bounds.logits and self.max_kv <= bounds.kv


def difference(
    reference: Recording,
    other: Recording,
    *,
    dtype: str,
    bounds: Bounds,
    forbidden: Collection[int],
) -> Difference:
    """Compare all steps that have the same history: up to the first token that differs."""
    num_same = _num_same(reference.tokens, other.tokens)
    num_steps = min(num_same + 1, len(reference.tokens), len(other.tokens))
    ours, theirs = other.logits[:num_steps], reference.logits[:num_steps]
    gaps = _gaps_where_best_differs(theirs, ours, forbidden)
    return Difference(
        num_steps=num_steps,
        max_logits=float(np.abs(ours - theirs).max()),
        max_kv=_max_kv(reference, other, _num_fed(reference, num_steps), dtype),
        num_ties=int((gaps < 2 * bounds.logits).sum()),
        num_flips=int((gaps >= 2 * bounds.logits).sum()),
    )


def why_not_identical(expected: Recording, other: Recording) -> str | None:
    """Return what differs, or None when the shorter recording is, bit for bit, how the longer
    begins.
    """
    num_steps = min(len(expected.tokens), len(other.tokens))
    if not np.array_equal(_bits(expected.logits[:num_steps]), _bits(other.logits[:num_steps])):
        return f"logits differ at {_first_step(expected.logits, other.logits)}"
    if expected.tokens[:num_steps] != other.tokens[:num_steps]:
        return "tokens differ"
    num_fed = _num_fed(expected, num_steps)
    if any(
        not np.array_equal(a[:, :num_fed], b[:, :num_fed])
        for a, b in zip(expected.kv, other.kv, strict=True)
    ):
        return f"KV differs from position {_first_position(expected, other, num_fed)}"
    if len(expected.tokens) == len(other.tokens) and expected.text != other.text:
        return "text differs"
    return None


def bounds_from(runs: list[Recording], dtype: str) -> Bounds:
    """Return bounds for a device: a multiple of what the reference's own runs differ by."""
    wide = Bounds(np.inf, np.inf)
    differences = [
        difference(a, b, dtype=dtype, bounds=wide, forbidden=()) for a, b in pairwise(runs)
    ]
    return Bounds(
        logits=BOUND_FACTOR * max(d.max_logits for d in differences),
        kv=BOUND_FACTOR * max(d.max_kv for d in differences),
    )


def bounds_of_rounding(rounded: Recording, exact: Recording) -> Bounds:
    """Return bounds for float32 computations that keep their KV in float16, from two references.

    Logits: twice what rounding the KV changes at all. KV: three steps of float16 at the largest
    value; a value between two neighbours may go either way, and rounding to bfloat16 moves it by
    four steps. Measured on SmolLM2: legitimate paths differ by 1.8e-2 and one step up to 513 tokens
    (the logits' bound is 5.6e-2), by 1.5e-2 and two steps at 2,000 (3.1e-2).
    """
    largest = max(np.abs(as_floats(kv, "float16")).max() for kv in rounded.kv)
    return Bounds(
        logits=2 * float(np.abs(rounded.logits - exact.logits).max()),
        kv=3 * float(np.spacing(np.float16(largest))),
    )


def as_floats(raw: RawArray, dtype: str) -> Logits:
    """Return raw KV bits as numbers.

    numpy has no bfloat16: its bits are the upper half of a float32.
    """
    if dtype == "bfloat16":
        return (raw.astype(np.uint32) << 16).view(np.float32)
    return raw.view(dtype).astype(np.float32)


def _num_same(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    pairs = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


def _num_fed(recording: Recording, num_steps: int) -> int:
    return recording.num_prompt_tokens + num_steps - 1


def _gaps_where_best_differs(
    reference: Logits, other: Logits, forbidden: Collection[int]
) -> NDArray[np.float32]:
    reference, other = reference.copy(), other.copy()
    reference[:, list(forbidden)] = other[:, list(forbidden)] = -np.inf
    best, others_best = reference.argmax(axis=1), other.argmax(axis=1)
    rows = np.flatnonzero(best != others_best)
    two_best = np.sort(reference[rows], axis=1)[:, -2:]
    gaps: NDArray[np.float32] = two_best[:, 1] - two_best[:, 0]
    return gaps


def _max_kv(reference: Recording, other: Recording, num_fed: int, dtype: str) -> float:
    # numpy's maximum, unlike Python's, keeps a NaN.
    largest = [
        np.abs(as_floats(a[:, :num_fed], dtype) - as_floats(b[:, :num_fed], dtype)).max()
        for a, b in zip(reference.kv, other.kv, strict=True)
    ]
    return float(np.max(largest))


def _bits(logits: Logits) -> NDArray[np.uint32]:
    return np.ascontiguousarray(logits).view(np.uint32)


def _first_step(a: Logits, b: Logits) -> str:
    num_steps = min(len(a), len(b))
    steps = (_bits(a[:num_steps]) != _bits(b[:num_steps])).any(axis=1)
    return f"step {int(steps.argmax())} by {float(np.abs(a[:num_steps] - b[:num_steps]).max()):.1e}"


def _first_position(a: Recording, b: Recording, num_fed: int) -> int:
    firsts = [
        int((x[:, :num_fed] != y[:, :num_fed]).any(axis=(0, 2)).argmax())
        for x, y in zip(a.kv, b.kv, strict=True)
        if not np.array_equal(x[:, :num_fed], y[:, :num_fed])
    ]
    return min(firsts)
