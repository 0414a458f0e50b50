"""KV through a slab and out again: the same bits, however they are cut."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from keepwarm.bench.lab import Setting
from keepwarm.bench.recording import raw_kv
from keepwarm.core.layout import BLOCK_TOKENS, capacity_for
from keepwarm.mlx_backend.compute.payload import KVPayload, RawArray


def round_trip_problem(setting: Setting, kv: Sequence[RawArray]) -> str | None:
    """Return what differs after KV went into slabs and out again, or None.

    It is reconstructed block by block, extracted in odd pieces, reconstructed and extracted once
    more.
    """
    generator = setting.loaded.batch_gen_factory(deterministic=setting.deterministic)
    num_tokens = kv[0].shape[1]
    first = generator.new_slab(capacity_for(num_tokens))
    for start in range(0, num_tokens, BLOCK_TOKENS):
        generator.reconstruct(first, [_piece(kv, start, start + BLOCK_TOKENS)])
    cuts = sorted({0, 1, num_tokens // 3, num_tokens - 1, num_tokens})
    spans = list(pairwise(cuts))
    second = generator.new_slab(capacity_for(num_tokens))
    generator.reconstruct(second, [generator.extract(first, *span) for span in spans])
    for name, slab in (("block by block", first), ("in odd pieces", second)):
        back = raw_kv(generator.extract(slab, 0, num_tokens))
        if not all(np.array_equal(a, b) for a, b in zip(kv, back, strict=True)):
            return f"other bits came back {name}"
    return None


def _piece(kv: Sequence[RawArray], start: int, stop: int) -> KVPayload:
    arrays = tuple(array[:, start:stop].copy() for array in kv)
    return KVPayload(arrays[0].shape[1], arrays)
