"""Slabs from the budget: new ones, and those that were given back and can be written again."""

from dataclasses import dataclass

from keepwarm.core.pool import Allocation, BlockPool, Kind
from keepwarm.core.ports import Slab
from keepwarm.kv.generator_source import GeneratorSource

MAX_SPARES = 2
"""Slabs kept to be reused: fresh memory is several times slower to write than recycled."""


@dataclass(frozen=True, slots=True)
class PaidSlab:
    """A slab and the bytes of the budget that it occupies."""

    slab: Slab
    allocation: Allocation


class SpareSlabs:
    """Hands out slabs and keeps a few that were given back, as spares, within the budget."""

    def __init__(self, pool: BlockPool, model: GeneratorSource) -> None:
        self._pool = pool
        self._model = model
        self._spares: list[PaidSlab] = []

    def take_spare(self, capacity_tokens: int) -> PaidSlab | None:
        """The smallest spare that fits and is at most a quarter too large."""
        fitting = [
            spare
            for spare in self._spares
            if capacity_tokens <= spare.slab.capacity_tokens <= capacity_tokens * 5 // 4
        ]
        if not fitting:
            return None
        spare = min(fitting, key=lambda spare: spare.slab.capacity_tokens)
        self._spares.remove(spare)
        self._pool.reuse(spare.allocation, Kind.SLAB)
        return spare

    def new(self, capacity_tokens: int) -> PaidSlab:
        """Raises PoolExhausted when the budget has no room; nothing is taken then."""
        generator = self._model.generator
        allocation = self._pool.allocate(Kind.SLAB, generator.slab_bytes(capacity_tokens))
        try:
            return PaidSlab(generator.new_slab(capacity_tokens), allocation)
        except BaseException:
            self._pool.release(allocation)
            raise

    def keep(self, slab: Slab, allocation: Allocation) -> None:
        """An emptied slab becomes a spare; the oldest one goes when there are too many."""
        self._pool.reuse(allocation, Kind.SPARE)
        self._spares.append(PaidSlab(slab, allocation))
        if len(self._spares) > MAX_SPARES:
            self._pool.release(self._spares.pop(0).allocation)

    def drop(self, needed_bytes: int) -> None:
        """Free spares until so many bytes of the budget are free, or none is left."""
        while self._spares and self._pool.free_bytes < needed_bytes:
            self._pool.release(self._spares.pop(0).allocation)

    def holders(self) -> dict[Allocation, tuple[int, int]]:
        """What the spares are paid with: how often, and the bytes of each."""
        return {spare.allocation: (1, spare.slab.nbytes) for spare in self._spares}
