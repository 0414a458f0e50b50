"""The tensors of a record file: its header's account of them, by the layout, and back."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from keepwarm.core.layout import CacheLayout, LayerLayout
from keepwarm.store.errors import DamagedRecord

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
to_json = json.JSONEncoder(separators=(",", ":")).encode


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """The tensors that a layout gives for a number of tokens, and the header's JSON of them."""

    piece_bytes: tuple[int, ...]
    data_bytes: int
    tensors_json: str


@lru_cache(maxsize=64)
def layout_digest(layout: CacheLayout) -> str:
    """Return a name for the layout: equal layouts have equal digests."""
    canonical = json.dumps(asdict(layout), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


# 64 plans of a large model are a megabyte; whole blocks need one for each layout.
@lru_cache(maxsize=64)
def tensor_plan(layout: CacheLayout, num_tokens: int) -> TensorPlan:
    described: dict[str, Any] = {}
    offset = 0
    for tensor in layout.tensors(num_tokens):
        described[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": (offset, offset + tensor.nbytes),
        }
        offset += tensor.nbytes
    piece_bytes = tuple(tensor.nbytes for tensor in layout.tensors(num_tokens))
    return TensorPlan(piece_bytes, offset, tensors_json(described))


def tensors_json(tensors: dict[str, Any]) -> str:
    return "".join(f",{to_json(name)}:{to_json(spec)}" for name, spec in tensors.items())


def total_bytes(tensors: dict[str, Any]) -> int:
    """Return the bytes of all tensors, which must follow one another from 0 on."""
    end = 0
    for name, spec in tensors.items():
        match spec:
            case {
                "dtype": str(),
                "shape": list(shape),
                "data_offsets": [begin, stop],
                **others,
            } if not others and _are_counts([*shape, begin, stop]) and begin == end <= stop:
                end = stop
            case _:
                raise DamagedRecord(f"its tensor {name!r} is not one that follows the last")
    return end


def layout_of(tensors: dict[str, Any]) -> CacheLayout | None:
    """Return the only layout that could have these tensors, if there is one."""
    specs = list(tensors.values())
    if not specs or len(specs) % 2 or any(len(spec["shape"]) != 3 for spec in specs):
        return None
    dtype = _DTYPES.get(specs[0]["dtype"])
    if dtype is None:
        return None
    layers = tuple(
        LayerLayout(keys["shape"][0], keys["shape"][2], values["shape"][2])
        for keys, values in zip(specs[::2], specs[1::2], strict=True)
    )
    return CacheLayout(layers, dtype)


def _are_counts(values: Sequence[object]) -> bool:
    return all(type(value) is int and value >= 0 for value in values)
