"""Whose prompt is computed next, and how much of it beside rows that decode: pure decisions."""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median

from keepwarm.core.layout import BLOCK_TOKENS
from keepwarm.core.sequence import TokenSequence

OVERTAKING_PER_PRIORITY = 4
"""By how many times what it misses a prompt is overtaken before it gains one priority."""

FIRST_CHUNK_TOKENS = 8
"""The length of a chunk beside decode while it is not known what a token costs."""

BACKGROUND_TOKENS = 32
"""How many tokens are computed at once where no request runs: one that comes waits for them."""

STEPS_PER_PLAIN_STEP = 16
"""After how many steps with prefill one without it shows again how long decode takes alone."""


def prefill_order(prefilling: Iterable[TokenSequence]) -> list[TokenSequence]:
    """Sort by priority, then by how few tokens are missing, then by arrival.

    Tokens of later arrivals that are computed first overtake a prompt, which raises its priority:
    so no prompt starves, and a nearly finished one is raised soonest.
    """

    def key(row: TokenSequence) -> tuple[int, int, int]:
        patience = OVERTAKING_PER_PRIORITY * max(row.num_missing, 1)
        return (-(row.priority + row.num_overtaken // patience), row.num_missing, row.arrival)

    return sorted(prefilling, key=key)


def next_chunk(row: TokenSequence, limit: int) -> Sequence[int]:
    """Return the ids to prefill next: at most `limit`, never across the end of a block."""
    start = row.blocks.num_tokens
    block_end = start - start % BLOCK_TOKENS + BLOCK_TOKENS
    return row.token_ids[start : min(start + limit, block_end, row.target_tokens)]


@dataclass(slots=True)
class PrefillThrottle:
    """How many tokens to prefill beside decode, learnt from how long steps took.

    Prefill may add `max_step_stretch - 1` times what a step without it takes with as many rows.
    Where even `least_tokens`, the shortest chunk that is worth its place, takes longer than that,
    chunks come more rarely instead, so that the steps keep the bound on average.

    The cost of a token follows a prompt that becomes dearer as it gets longer: up by at most half a
    step, because a chunk that takes too long is seen only after every row has waited for it, and
    down by a tenth.
    """

    max_step_stretch: float
    least_tokens: int = 1
    token_s: float | None = None
    saved_s: float = 0.0
    """What earlier steps left unused for the next chunk; below 0 after one that took too long."""
    num_since_plain: int = 0
    recent_plain: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=9))
    """Rows and seconds of the last steps without prefill."""

    def num_tokens(self, num_rows: int) -> int:
        """Return how many tokens the next step may prefill beside `num_rows` rows that decode.

        0: the step is to show how long it takes without prefill, or the rows are owed a pause.
        """
        if self.num_since_plain >= STEPS_PER_PLAIN_STEP:
            return 0
        plain_s = self._plain_s(num_rows)
        if plain_s is None:
            return 0
        if self.token_s is None:
            return max(FIRST_CHUNK_TOKENS, self.least_tokens)
        allowed_s = (self.max_step_stretch - 1.0) * plain_s
        if allowed_s >= self.least_tokens * self.token_s:
            return int(allowed_s / self.token_s)
        return self.least_tokens if self.saved_s >= self.least_tokens * self.token_s else 0

    def spare_tokens(self, num_rows: int) -> int:
        """Return how many tokens other work may compute beside the rows, in a pass of its own."""
        plain_s = self._plain_s(num_rows)
        if plain_s is None or self.token_s is None:
            return 1
        return max(int((self.max_step_stretch - 1.0) * plain_s / self.token_s), 1)

    def observe(self, *, num_rows: int, num_tokens: int, step_s: float) -> None:
        """Learn from a step in which rows decoded; `num_tokens` were prefilled beside them."""
        if not num_tokens:
            self.recent_plain.append((num_rows, step_s))
            self.num_since_plain = 0
        else:
            self.num_since_plain += 1
        plain_s = self._plain_s(num_rows)
        if plain_s is None:
            return
        prefill_s = max(step_s - plain_s, 0.0) if num_tokens else 0.0
        if 2 * num_tokens >= max(self.num_tokens(num_rows), self.least_tokens):
            self._learn(num_tokens, prefill_s)
        allowed_s = (self.max_step_stretch - 1.0) * plain_s
        most_s = allowed_s + self.least_tokens * (self.token_s or 0.0)
        self.saved_s = min(max(self.saved_s + allowed_s - prefill_s, -most_s), most_s)

    def observe_alone(self, *, num_tokens: int, step_s: float) -> None:
        """Learn from a step in which no row decoded."""
        if num_tokens >= self.least_tokens:
            self._learn(num_tokens, step_s)

    def _learn(self, num_tokens: int, prefill_s: float) -> None:
        token_s = prefill_s / num_tokens
        if self.token_s is not None:
            token_s = min(max(token_s, self.token_s / 1.1), self.token_s * 1.5)
        if token_s > 0.0:
            self.token_s = token_s

    def _plain_s(self, num_rows: int) -> float | None:
        """Return how long a step with as many rows took lately without prefill."""
        alike = [step_s for rows, step_s in self.recent_plain if rows == num_rows]
        return median(alike) if alike else None
