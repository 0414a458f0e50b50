"""What every move of KV works on: the budget, the books, the free slabs and the generator."""

from dataclasses import dataclass

from keepwarm.core.pool import BlockPool
from keepwarm.core.prefix_index import PrefixIndex
from keepwarm.core.stored import KVFamily
from keepwarm.kv.generator_source import GeneratorSource
from keepwarm.kv.line_table import LineTable
from keepwarm.kv.spare_slabs import SpareSlabs


@dataclass(frozen=True, slots=True)
class Memory:
    """One model's memory: the objects that own its parts. It has no state of its own."""

    pool: BlockPool
    index: PrefixIndex
    lines: LineTable
    spares: SpareSlabs
    model: GeneratorSource
    token_bytes: int
    """How many bytes the KV of a token has, over all layers."""

    @classmethod
    def of_model(
        cls, pool: BlockPool, model: GeneratorSource, family: KVFamily, *, now: int
    ) -> "Memory":
        """Return an empty memory. `now` is where the ages of its lines begin."""
        index = PrefixIndex(pool)
        lines = LineTable(pool, index, family, now=now)
        return cls(pool, index, lines, SpareSlabs(pool, model), model, family.layout.token_bytes)
