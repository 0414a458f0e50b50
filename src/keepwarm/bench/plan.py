"""Which prompts take which paths, and how long their replies are."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from keepwarm.bench.paths import PATHS, Path
from keepwarm.core.layout import BLOCK_TOKENS

FULL_LENGTHS = (50, 255, 256, 257, 500, 511, 512, 513, 2000)
REPLY_TOKENS = 60
SHORT_REPLY_TOKENS = 12
LONGER = (BLOCK_TOKENS + 1, 2 * BLOCK_TOKENS + 1)
"""Lengths for paths of the quick plan that short prompts cannot take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Prompt lengths for each path, by its name. Replies to prompts of `long_replies` have 60
    tokens.
    """

    lengths: dict[str, tuple[int, ...]]
    long_replies: frozenset[int]
    canary_length: int
    seed: int = 0

    @property
    def all_lengths(self) -> tuple[int, ...]:
        lengths = {length for group in self.lengths.values() for length in group}
        return tuple(sorted({*lengths, self.canary_length}))

    def num_tokens(self, length: int) -> int:
        return REPLY_TOKENS if length in self.long_replies else SHORT_REPLY_TOKENS

    def groups(self, path: Path) -> list[tuple[int, ...]]:
        """Return the path's lengths in groups that run together; the last is filled up from the
        front.
        """
        lengths = self.lengths.get(path.name, ())
        size = path.group_size
        return [
            tuple(lengths[(start + offset) % len(lengths)] for offset in range(size))
            for start in range(0, len(lengths), size)
        ]


def full_plan(*, seed: int = 0, lengths: Sequence[int] = FULL_LENGTHS) -> Plan:
    """Plan every path at every length that can take it, with 60 tokens each."""
    return Plan(
        lengths={path.name: _able(path, lengths) for path in PATHS},
        long_replies=frozenset(lengths),
        canary_length=min(lengths, key=lambda length: abs(length - 500)),
        seed=seed,
    )


def quick_plan(*, seed: int = 0) -> Plan:
    """Plan every path once, at a short length or at a block's edge, as the seed says; few long
    replies.
    """
    shuffler = np.random.default_rng(seed)
    edges = (BLOCK_TOKENS - 1, BLOCK_TOKENS, BLOCK_TOKENS + 1)
    lengths: dict[str, tuple[int, ...]] = {}
    for number, path in enumerate(PATHS):
        able = _able(path, (50,) if number % 2 else edges) or _able(path, LONGER)[:1]
        lengths[path.name] = (int(shuffler.choice(able)),)
        if path.group_size > 1:
            lengths[path.name] = (50, BLOCK_TOKENS + 1)
    lengths["cold"] = (49, 2 * BLOCK_TOKENS + 1)
    lengths["warm"] = (49, 2 * BLOCK_TOKENS)
    return Plan(lengths=lengths, long_replies=frozenset({49}), canary_length=50, seed=seed)


def _able(path: Path, lengths: Sequence[int]) -> tuple[int, ...]:
    return tuple(length for length in lengths if length >= path.min_tokens)
