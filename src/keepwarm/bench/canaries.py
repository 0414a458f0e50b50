"""Damages to an agent's KV that the comparison must notice."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import numpy as np

from keepwarm.bench.lab import Case, Lab, Setting
from keepwarm.bench.paths import first_turn, split_of
from keepwarm.bench.recording import Recording, raw_kv
from keepwarm.core.ports import Slab
from keepwarm.mlx_backend.compute.payload import KVPayload, RawArray

Damage = Callable[[Lab, Setting, Case, Slab], KVPayload]

# As many low bits of the mantissa as rounding to the next coarser format would lose: float32 to
# float16, float16 to bfloat16, and bfloat16 to 3 bits.
_LOST_BITS = {"float32": 13, "float16": 3, "bfloat16": 4}


@dataclass(frozen=True, slots=True)
class Canary:
    """A damage: `damage` makes the KV that is put into the slab of a resting agent."""

    name: str
    damage: Damage

    def run(self, setting: Setting, case: Case) -> Recording:
        """Record the reply of an agent whose KV was damaged."""
        lab = setting.lab()
        turn = first_turn(lab, setting, case)
        slab = lab.recorder.slabs[turn.seed]
        damaged = self.damage(lab, setting, case, slab)
        _overwrite(lab, slab, damaged)
        return lab.recording(lab.run_case("ada", case))


def rounded(lab: Lab, setting: Setting, case: Case, slab: Slab) -> KVPayload:
    """Round the KV to the next coarser format."""
    held = _held(lab, slab)
    num_bits = _LOST_BITS[setting.loaded.layout.dtype]
    return KVPayload(held.num_tokens, tuple(_rounded(array, num_bits) for array in held.arrays))


def one_position_zeroed(lab: Lab, setting: Setting, case: Case, slab: Slab) -> KVPayload:
    """Zero the position in the middle, in every layer."""
    held = _held(lab, slab)
    for array in held.arrays:
        array[:, held.num_tokens // 2] = 0
    return held


def stale_tail_token(lab: Lab, setting: Setting, case: Case, slab: Slab) -> KVPayload:
    """Put another token's KV at the last position, as a rollback that trims too little would."""
    held = _held(lab, slab)
    split = split_of(setting, case)
    seen = [*split.prompt, *split.reply][: held.num_tokens]
    seen[-1] = split.prompt[0]
    other = lab.say("eve", [*seen, split.prompt[0]], split.reply[:1])
    stale = _held(lab, lab.recorder.slabs[other.seed])
    last = held.num_tokens - 1
    for array, source in zip(held.arrays, stale.arrays, strict=True):
        array[:, last] = source[:, last]
    return held


def one_bit_flipped(lab: Lab, setting: Setting, case: Case, slab: Slab) -> KVPayload:
    """Move one value in the middle to its neighbour: bounds cannot notice it, and bits can."""
    held = _held(lab, slab)
    held.arrays[len(held.arrays) // 2][0, held.num_tokens // 2, 0] ^= 1
    return held


CANARIES = (
    Canary("KV rounded", rounded),
    Canary("one position zeroed", one_position_zeroed),
    Canary("one stale token in the tail", stale_tail_token),
)

ONE_ULP = Canary("one value moved by one ulp", one_bit_flipped)
"""For the strict form alone."""


def _held(lab: Lab, slab: Slab) -> KVPayload:
    payload = lab.engine.tiers.model.generator.extract(slab, 0, slab.num_tokens)
    return KVPayload(payload.num_tokens, raw_kv(payload))


def _overwrite(lab: Lab, slab: Slab, payload: KVPayload) -> None:
    generator = lab.engine.tiers.model.generator
    generator.trim(slab, 0)
    generator.reconstruct(slab, [payload])


def _rounded(array: RawArray, num_bits: int) -> RawArray:
    half = 1 << (num_bits - 1)
    wide = (array.astype(np.uint64) + half) >> num_bits << num_bits
    return cast("RawArray", wide.astype(array.dtype))
