"""The rows that are open in a generator, and whose slab each one is writing."""

import math
from typing import Generic, Protocol, TypeVar

from keepwarm.core.errors import InvariantBroken
from keepwarm.core.ports import RowId, RowInput, Slab


class OwnSlab(Slab, Protocol):
    """A generator's own slab."""

    @property
    def is_gone(self) -> bool: ...

    def prepare(self, max_bytes: float) -> None: ...


S = TypeVar("S", bound=OwnSlab)


class OpenRows(Generic[S]):
    """Owns which slab belongs to which open row. Everything raises InvariantBroken on misuse."""

    def __init__(self, kind: type[S]) -> None:
        self._kind = kind
        self._slabs: dict[RowId, S] = {}

    def __repr__(self) -> str:
        return f"OpenRows({list(self._slabs)})"

    def __len__(self) -> int:
        return len(self._slabs)

    def __getitem__(self, row: RowId) -> S:
        slab = self._slabs.get(row)
        if slab is None:
            raise InvariantBroken(f"row {row} is not open")
        return slab

    def open(self, row: RowId, slab: Slab) -> None:
        """Let the row write the slab, whose memory is touched first."""
        if row in self._slabs:
            raise InvariantBroken(f"row {row} is open already")
        outside = self.outside(slab)
        outside.prepare(math.inf)
        self._slabs[row] = outside

    def close(self, row: RowId) -> S:
        """End the row, and return its slab."""
        slab = self[row]
        del self._slabs[row]
        return slab

    def with_room(self, item: RowInput) -> S:
        """Return the row's slab, which has room for the row's ids."""
        slab = self[item.row]
        if slab.num_tokens + len(item.token_ids) > slab.capacity_tokens:
            raise InvariantBroken(f"{len(item.token_ids)} more tokens overflow {slab!r}")
        return slab

    def own(self, slab: Slab) -> S:
        """Return the slab as this generator's, which is not gone."""
        if not isinstance(slab, self._kind) or slab.is_gone:
            raise InvariantBroken(f"{slab!r} is not a live slab of this generator")
        return slab

    def outside(self, slab: Slab) -> S:
        """Return the slab as this generator's own; its row must not be open."""
        own = self.own(slab)
        if any(own is inside for inside in self._slabs.values()):
            raise InvariantBroken(f"{own!r} was touched while its row is open")
        return own
