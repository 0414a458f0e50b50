"""The engine's decisions, as pure functions over values."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from keepwarm.core.agent import AgentBlocks
from keepwarm.core.block import Block, LineId
from keepwarm.core.errors import ConfigError
from keepwarm.core.layout import BLOCK_TOKENS, capacity_for
from keepwarm.core.sequence import TokenSequence


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How the engine schedules.

    max_rows: rows decoding, prefilling or restoring at once. max_waiting: requests queued beyond
    that. prefill_chunk_tokens: the longest chunk; it ends at a block's end at the latest.
    idle_prefill_tokens: prefill per step when no row decodes. max_step_stretch: how many times
    longer decode steps may become through prefill beside them. reserve_reply_tokens: the part of
    the reply for which memory is reserved at admission. restore_bytes_per_step: bytes copied into
    slabs per step while others decode. fresh_bytes_per_step: bytes of a new slab's memory touched
    per step while others decode. save_bytes_per_step: bytes handed to the store per step.
    always_restore: read from disk even where computing has been faster lately. max_side_lines: side
    lines kept for each agent. max_anonymous_lines: lines without an agent kept in all.
    """

    max_rows: int = 16
    max_waiting: int = 1024
    prefill_chunk_tokens: int = BLOCK_TOKENS
    idle_prefill_tokens: int = BLOCK_TOKENS
    max_step_stretch: float = 1.8
    reserve_reply_tokens: int = 2 * BLOCK_TOKENS
    restore_bytes_per_step: int = 128 << 20
    fresh_bytes_per_step: int = 16 << 20
    save_bytes_per_step: int = 32 << 20
    always_restore: bool = False
    max_side_lines: int = 4
    max_anonymous_lines: int = 64

    def __post_init__(self) -> None:
        positive = (
            "max_rows",
            "max_waiting",
            "idle_prefill_tokens",
            "restore_bytes_per_step",
            "fresh_bytes_per_step",
            "save_bytes_per_step",
        )
        for key in positive:
            if getattr(self, key) < 1:
                raise ConfigError(key, f"must be at least 1, not {getattr(self, key)}")
        for key in ("reserve_reply_tokens", "max_side_lines", "max_anonymous_lines"):
            if getattr(self, key) < 0:
                raise ConfigError(key, f"must not be negative, as {getattr(self, key)} is")
        if not 1 <= self.prefill_chunk_tokens <= BLOCK_TOKENS:
            raise ConfigError("prefill_chunk_tokens", f"must be from 1 to {BLOCK_TOKENS}")
        if not self.max_step_stretch > 1.0:
            raise ConfigError("max_step_stretch", "must be above 1")


def reserve_capacity(*, num_tokens: int, reply_tokens: int, config: EngineConfig) -> int:
    """Return the slab capacity to reserve at admission: the tokens and a part of the reply."""
    return capacity_for(num_tokens + min(reply_tokens, config.reserve_reply_tokens))


def grown_capacity(capacity_tokens: int, max_tokens: int) -> int:
    """Return the next capacity of a full slab: an eighth more, at least a block, at most all.

    Growing copies the slab, so a long row grows by more than a block.
    """
    step = max(BLOCK_TOKENS, capacity_for(capacity_tokens // 8))
    return min(capacity_tokens + step, capacity_for(max_tokens))


def reply_room(limit_tokens: int, max_tokens: int | None) -> int:
    """Return how many tokens a conversation must leave for the reply, or lose its oldest turns.

    As many as were asked for, at most half of the context; an eighth of it by default.
    """
    if max_tokens is None:
        return limit_tokens // 8
    return min(max_tokens, limit_tokens // 2)


def shortened_limit(limit_tokens: int) -> int:
    """Return how many tokens a conversation may have after turns were dropped.

    Half of the context: what follows the gap is computed anew, so it must not happen at each turn.
    """
    return limit_tokens // 2


def demotion_order(lines: Iterable[AgentBlocks]) -> list[AgentBlocks]:
    """Return the hot lines at rest: the one that has rested longest first, pinned ones last."""
    hot = (line for line in lines if line.is_resting)
    return sorted(hot, key=lambda line: (line.pinned, line.last_used))


@dataclass(frozen=True, slots=True)
class TailVictim:
    """A warm line's tail, to be dropped."""

    line: AgentBlocks
    nbytes: int


@dataclass(frozen=True, slots=True)
class BlockVictim:
    """A block's only copy, to be dropped; its owners lose what follows it as well."""

    block: Block
    nbytes: int


Victim = TailVictim | BlockVictim


def choose_victims(
    lines: Mapping[LineId, AgentBlocks],
    blocks: Iterable[Block],
    needed_bytes: int,
    unsaved: Collection[LineId] = (),
) -> list[Victim]:
    """Choose what to forget for `needed_bytes`: least recently used first, leaf before prefix.

    A prefix has all the owners of what follows it, so its last use is no earlier; among equals the
    deeper goes first. Blocks that a held or pinned line owns, or that a slab holds as well, stay.
    Lines with KV that is in memory only (`unsaved`) lose theirs last.
    """
    aged: list[tuple[bool, int, float, Victim]] = [
        (line.line in unsaved, line.last_used, -math.inf, TailVictim(line, line.tail.nbytes))
        for line in lines.values()
        if line.evictable and line.tail is not None
    ]
    for block in blocks:
        owners = [lines[owner] for owner in block.owners]
        if block.payload is not None and not block.slabs and all(o.evictable for o in owners):
            age = max(owner.last_used for owner in owners)
            is_unsaved = any(owner in unsaved for owner in block.owners)
            nbytes = block.payload.nbytes
            aged.append((is_unsaved, age, -block.depth, BlockVictim(block, nbytes)))
    aged.sort(key=lambda item: item[:3])
    victims: list[Victim] = []
    freed = 0
    for *_, victim in aged:
        if freed >= needed_bytes:
            break
        victims.append(victim)
        freed += victim.nbytes
    return victims


PASSES_PER_PRIORITY = 16
"""After how many admissions before it a waiting request gains one priority."""


def admission_order(waiting: Iterable[TokenSequence]) -> list[TokenSequence]:
    """Sort by priority, then by arrival; waiting raises the priority, so no request starves."""
    return sorted(
        waiting,
        key=lambda row: (-(row.priority + row.num_passed_over // PASSES_PER_PRIORITY), row.arrival),
    )


def choose_preempted(running: Sequence[TokenSequence]) -> TokenSequence | None:
    """Choose the youngest row of the lowest priority; never the oldest, so that rows finish."""
    if len(running) < 2:
        return None
    oldest = min(running, key=lambda row: row.arrival)
    return min(
        (row for row in running if row is not oldest),
        key=lambda row: (row.priority, -row.arrival),
    )


@dataclass(slots=True)
class RestoreCost:
    """Decides whether to read tokens from disk or to compute them, by what either cost lately.

    Seconds per token; while one is unknown, the disk is tried. Each time it is not chosen it counts
    as a tenth cheaper, so that one slow moment of a disk is not held against it.
    """

    prefill_token_s: float | None = None
    restore_token_s: float | None = None

    def observe_prefill(self, num_tokens: int, seconds: float) -> None:
        self.prefill_token_s = _smoothed(self.prefill_token_s, seconds / num_tokens)

    def observe_restore(self, num_tokens: int, seconds: float) -> None:
        self.restore_token_s = _smoothed(self.restore_token_s, seconds / num_tokens)

    def is_worth_restoring(self) -> bool:
        if self.prefill_token_s is None or self.restore_token_s is None:
            return True
        if self.restore_token_s <= self.prefill_token_s:
            return True
        self.restore_token_s *= 0.9
        return False


def _smoothed(before: float | None, now: float) -> float:
    return now if before is None else 0.7 * before + 0.3 * now
