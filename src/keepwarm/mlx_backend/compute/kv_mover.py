"""Moves KV between slabs and payloads.

Reconstruct (payloads to slab) and extract (slab to payloads) are inverses, bit for bit. A payload
is a copy: a borrowed buffer would see the slab's later writes.
"""

import math
from collections.abc import Sequence

from keepwarm.core.errors import InvariantBroken
from keepwarm.mlx_backend.compute.kv_copies import KVCopies
from keepwarm.mlx_backend.compute.payload import KVPayload, RawArray
from keepwarm.mlx_backend.compute.slab import RowSlab


class KVMover:
    """Moves KV by the given kind of copies. Raises InvariantBroken for a move out of bounds."""

    def __init__(self, copies: KVCopies) -> None:
        self._copies = copies

    def extract(self, slab: RowSlab, start: int, stop: int) -> KVPayload:
        """Copy the positions [start, stop) of the slab."""
        if not 0 <= start <= stop <= slab.num_tokens:
            raise InvariantBroken(f"[{start}, {stop}) is not within {slab!r}")
        read = self._copies.read
        return KVPayload(stop - start, tuple(read(a, start, stop) for a in slab.arrays()))

    def reconstruct(self, slab: RowSlab, payloads: Sequence[KVPayload]) -> None:
        """Append the payloads, in order, behind what the slab holds."""
        start = slab.num_tokens
        end = start + sum(payload.num_tokens for payload in payloads)
        if end > slab.capacity_tokens:
            raise InvariantBroken(f"{end} tokens overflow {slab!r}")
        slab.prepare(math.inf)
        columns = list(zip(*(payload.arrays for payload in payloads), strict=True))
        slab.set_arrays(self._copies.write(slab.arrays(), start, columns))
        slab.set_num_tokens(end)

    def copy_span(self, source: RowSlab, target: RowSlab, start: int, stop: int) -> None:
        """Append the positions [start, stop) of one slab to another, which ends at `start`."""
        if target.num_tokens != start:
            raise InvariantBroken(f"a span from {start} does not follow {target!r}")
        # By way of a copy: a view of the source would be live while MLX may write to it.
        self.reconstruct(target, [self.extract(source, start, stop)])

    def dismantle(self, slab: RowSlab, spans: Sequence[tuple[int, int]]) -> list[KVPayload]:
        """Extract the spans [start, stop) and free the slab, one layer at a time.

        So the peak is one layer above the larger of slab and payloads.
        """
        num_tokens = slab.num_tokens
        if any(not 0 <= start <= stop <= num_tokens for start, stop in spans):
            raise InvariantBroken(f"{spans} are not within {slab!r}")
        parts: list[list[RawArray]] = [[] for _ in spans]
        read = self._copies.read
        for cache in slab.layers:
            for part, (start, stop) in zip(parts, spans, strict=True):
                part += [read(cache.keys, start, stop), read(cache.values, start, stop)]
            cache.release()
        slab.is_gone = True
        lengths = (stop - start for start, stop in spans)
        return [KVPayload(n, tuple(part)) for n, part in zip(lengths, parts, strict=True)]

    def grow(self, slab: RowSlab, larger: RowSlab) -> None:
        """Move the KV into a larger, empty slab, one layer at a time."""
        num_tokens = slab.num_tokens
        for cache, target in zip(slab.layers, larger.layers, strict=True):
            keys = self._copies.read(cache.keys, 0, num_tokens)
            values = self._copies.read(cache.values, 0, num_tokens)
            cache.release()
            target.keys, target.values = self._copies.write(
                [target.keys, target.values], 0, [[keys], [values]]
            )
        slab.is_gone = True
        larger.set_num_tokens(num_tokens)
        larger.prepare(math.inf)
