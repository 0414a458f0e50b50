"""Engines at one moment, for people and metrics."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TypeVar

from keepwarm.core.pool import PoolSnapshot
from keepwarm.core.stored import StoreHealth
from keepwarm.kv.counters import BatchCounters, TierCounters

Counters = TypeVar("Counters", TierCounters, BatchCounters)


@dataclass(frozen=True, slots=True)
class EngineSnapshot:
    """One engine, or several over one store."""

    num_waiting: int
    num_running: int
    pool: PoolSnapshot
    tiers: TierCounters
    batch: BatchCounters
    store: StoreHealth
    num_mended_spans: int
    """Parts of prompts that stored ids would have said wrongly, had the last check not been."""


def merged(
    snapshots: Sequence[EngineSnapshot], store: StoreHealth, *, budget_bytes: int
) -> EngineSnapshot:
    """Add up the snapshots of several engines over one store and one budget."""
    pools = [snapshot.pool for snapshot in snapshots]
    kinds = [Counter(pool.bytes_by_kind) for pool in pools]
    numbers = [Counter(pool.num_by_kind) for pool in pools]
    return EngineSnapshot(
        num_waiting=sum(snapshot.num_waiting for snapshot in snapshots),
        num_running=sum(snapshot.num_running for snapshot in snapshots),
        pool=PoolSnapshot(
            budget_bytes=budget_bytes,
            used_bytes=sum(pool.used_bytes for pool in pools),
            peak_bytes=min(sum(pool.peak_bytes for pool in pools), budget_bytes),
            bytes_by_kind=dict(sum(kinds, Counter())),
            num_by_kind=dict(sum(numbers, Counter())),
        ),
        tiers=_sum_of(TierCounters(), [snapshot.tiers for snapshot in snapshots]),
        batch=_sum_of(BatchCounters(), [snapshot.batch for snapshot in snapshots]),
        store=store,
        num_mended_spans=sum(snapshot.num_mended_spans for snapshot in snapshots),
    )


def _sum_of(zero: Counters, values: Sequence[Counters]) -> Counters:
    names = [field.name for field in fields(zero)]
    return replace(zero, **{name: sum(getattr(value, name) for value in values) for name in names})
