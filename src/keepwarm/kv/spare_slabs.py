"""Slabs from the budget: new ones, and spares that were given back and can be written again."""

import logging
from dataclasses import dataclass

from keepwarm.core.pool import Allocation, BlockPool, Kind
from keepwarm.core.ports import Slab
from keepwarm.kv.generator_source import GeneratorSource

_log = logging.getLogger(__name__)

MAX_SPARES = 2
"""How many slabs are kept to be reused: fresh memory is several times slower to write."""


@dataclass(frozen=True, slots=True)
class PaidSlab:
    """A slab and the bytes of the budget that it occupies."""

    slab: Slab
    allocation: Allocation


class SpareSlabs:
    """Owns the spares, hands out slabs, and takes those that no line needs any more."""

    def __init__(self, pool: BlockPool, model: GeneratorSource) -> None:
        self._pool = pool
        self._model = model
        self._spares: list[PaidSlab] = []

    def __repr__(self) -> str:
        return f"SpareSlabs({[spare.slab.capacity_tokens for spare in self._spares]} tokens)"

    @property
    def nbytes(self) -> int:
        """How many bytes of the budget the spares hold."""
        return sum(spare.allocation.nbytes for spare in self._spares)

    def take_spare(self, capacity_tokens: int) -> PaidSlab | None:
        """Return the smallest spare that fits and is at most a quarter too large, if there is one.

        A larger one would keep memory from others for as long as the line runs.
        """
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
        """Allocate a slab. Raises PoolExhausted when the budget has no room; nothing is taken."""
        generator = self._model.generator
        allocation = self._pool.allocate(Kind.SLAB, generator.slab_bytes(capacity_tokens))
        try:
            return PaidSlab(generator.new_slab(capacity_tokens), allocation)
        except BaseException:
            self._pool.release(allocation)
            raise

    def keep(self, paid: PaidSlab) -> None:
        """Empty the slab and keep it as a spare; the oldest spare goes when there are too many.

        One that the device does not empty is freed.
        """
        try:
            self._model.generator.trim(paid.slab, 0)
        except Exception as error:  # noqa: BLE001 - whatever the device raises, as in decision 14
            _log.warning("a slab of %d tokens is freed: %r", paid.slab.capacity_tokens, error)
            self._pool.release(paid.allocation)
            return
        self._pool.reuse(paid.allocation, Kind.SPARE)
        self._spares.append(paid)
        if len(self._spares) > MAX_SPARES:
            self._pool.release(self._spares.pop(0).allocation)

    def drop(self, needed_bytes: int) -> None:
        """Free spares until `needed_bytes` of the budget are free, or no spare is left."""
        while self._spares and self._pool.free_bytes < needed_bytes:
            self._pool.release(self._spares.pop(0).allocation)

    def drop_all(self) -> None:
        """Free every spare."""
        while self._spares:
            self._pool.release(self._spares.pop(0).allocation)

    def holders(self) -> dict[Allocation, tuple[int, int]]:
        """Return what the spares are paid with: how often, and the bytes of each."""
        return {spare.allocation: (1, spare.slab.nbytes) for spare in self._spares}
