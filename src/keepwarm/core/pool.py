"""The memory budget: every byte of KV that Keepwarm holds is an allocation here."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from keepwarm.core.errors import ConfigError, InvariantBroken, PoolExhausted


class Kind(StrEnum):
    """What an allocation pays for.

    In order: a line's slab, a block's own copy, a line's tail, a slab to reuse, a copy on its way
    to the disk, a buffer for KV that comes from there.
    """

    SLAB = "slab"
    BLOCK = "block"
    TAIL = "tail"
    SPARE = "spare"
    SAVING = "saving"
    READING = "reading"


@dataclass(slots=True, eq=False)
class Allocation:
    """Bytes taken from the budget, freed when their last holder has released them."""

    kind: Kind
    nbytes: int
    count: int = 1


@dataclass(frozen=True, slots=True)
class PoolSnapshot:
    """The pool's bytes, and how many of each kind there are, for people and metrics."""

    budget_bytes: int
    used_bytes: int
    peak_bytes: int
    bytes_by_kind: Mapping[str, int]
    num_by_kind: Mapping[str, int]


class Neighbours(Protocol):
    """The other pools of one budget."""

    def used_bytes(self) -> int:
        """Return how many bytes of the budget they take."""
        ...

    def make_room(self, needed_bytes: int) -> None:
        """Ask them to free the memory of resting lines until `needed_bytes` of the budget are free.

        They may not be able to; `free_bytes` says what came of it.
        """
        ...

    def will_free(self) -> bool:
        """Whether memory of theirs comes free by itself: a row ends, or KV has been saved."""
        ...


class NoNeighbours:
    """Implements `Neighbours` for a pool that has its budget to itself."""

    def used_bytes(self) -> int:
        return 0

    def make_room(self, needed_bytes: int) -> None:
        return

    def will_free(self) -> bool:
        return False


class BlockPool:
    """A budget in bytes that is never exceeded. Owned by the engine's thread: it has no lock.

    `neighbours` are the pools that take of the same budget.

    >>> pool = BlockPool(budget_bytes=100)
    >>> block = pool.allocate(Kind.BLOCK, 60)
    >>> pool
    BlockPool(60 of 100 bytes: 1 block)
    >>> pool.release(block)
    >>> pool.free_bytes
    100
    """

    def __init__(self, budget_bytes: int, neighbours: Neighbours | None = None) -> None:
        if budget_bytes <= 0:
            raise ConfigError("budget_bytes", f"must be positive, not {budget_bytes}")
        self.budget_bytes = budget_bytes
        self.neighbours = neighbours or NoNeighbours()
        self.used_bytes = 0
        self.peak_bytes = 0
        self._live: set[Allocation] = set()

    def __repr__(self) -> str:
        kinds = Counter(allocation.kind.value for allocation in self._live)
        inside = ", ".join(f"{kinds[kind]} {kind}" for kind in sorted(kinds)) or "empty"
        return f"BlockPool({self.used_bytes:,} of {self.budget_bytes:,} bytes: {inside})"

    @property
    def free_bytes(self) -> int:
        return self.budget_bytes - self.used_bytes - self.neighbours.used_bytes()

    def allocate(self, kind: Kind, nbytes: int) -> Allocation:
        """Take `nbytes`, retained once. Raises PoolExhausted when fewer are free."""
        self._take(nbytes)
        allocation = Allocation(kind, nbytes)
        self._live.add(allocation)
        return allocation

    def resize(self, allocation: Allocation, nbytes: int) -> None:
        """Give the allocation another size. Raises PoolExhausted, leaving the old size."""
        self._expect_live(allocation)
        self._take(nbytes - allocation.nbytes)
        allocation.nbytes = nbytes

    def reuse(self, allocation: Allocation, kind: Kind) -> None:
        """Let the memory serve as another kind: a slab becomes a spare, and comes back."""
        self._expect_live(allocation)
        allocation.kind = kind

    def retain(self, allocation: Allocation) -> None:
        """Add a holder."""
        self._expect_live(allocation)
        allocation.count += 1

    def release(self, allocation: Allocation) -> None:
        """Remove a holder; the bytes are free again when it was the last."""
        self._expect_live(allocation)
        allocation.count -= 1
        if allocation.count == 0:
            self._live.remove(allocation)
            self.used_bytes -= allocation.nbytes

    def snapshot(self) -> PoolSnapshot:
        """Return the sums as they are now."""
        sizes: Counter[str] = Counter()
        for allocation in self._live:
            sizes[allocation.kind.value] += allocation.nbytes
        return PoolSnapshot(
            budget_bytes=self.budget_bytes,
            used_bytes=self.used_bytes,
            peak_bytes=self.peak_bytes,
            bytes_by_kind=dict(sizes),
            num_by_kind=dict(Counter(allocation.kind.value for allocation in self._live)),
        )

    def check(self, holders: Mapping[Allocation, tuple[int, int]] | None = None) -> None:
        """Raise InvariantBroken unless the sums are right.

        `holders` gives, from the owners' side, each allocation's number of holders and the bytes of
        what it pays for; then the pool must know exactly these.
        """
        total = sum(allocation.nbytes for allocation in self._live)
        if total != self.used_bytes or not 0 <= total <= self.budget_bytes:
            raise InvariantBroken(f"{self!r}: the allocations sum to {total}")
        if any(allocation.count < 1 or allocation.nbytes < 0 for allocation in self._live):
            raise InvariantBroken(f"{self!r}: an allocation without a holder, or of negative size")
        if holders is not None:
            self._check_holders(holders)

    def _check_holders(self, holders: Mapping[Allocation, tuple[int, int]]) -> None:
        if holders.keys() != self._live:
            lost, foreign = self._live - holders.keys(), holders.keys() - self._live
            raise InvariantBroken(f"{self!r}: nobody holds {lost}; released but held: {foreign}")
        for allocation, (count, nbytes) in holders.items():
            if (allocation.count, allocation.nbytes) != (count, nbytes):
                raise InvariantBroken(
                    f"{allocation}: {count} holders and {nbytes} bytes by the owners' count"
                )

    def _take(self, nbytes: int) -> None:
        if nbytes > self.free_bytes:
            raise PoolExhausted(needed_bytes=nbytes, free_bytes=self.free_bytes)
        self.used_bytes += nbytes
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)

    def _expect_live(self, allocation: Allocation) -> None:
        if allocation not in self._live:
            raise InvariantBroken(f"{allocation} is used after its release")
