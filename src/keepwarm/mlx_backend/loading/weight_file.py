"""A safetensors file's header: which tensors it promises, and whether the file can hold them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_LENGTH_BYTES = 8


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """A tensor as a safetensors header describes it; `dtype` is the format's name, like F16."""

    name: str
    dtype: str
    shape: tuple[int, ...]


def tensors_in(path: Path) -> list[TensorHeader]:
    """Return the tensors of a sound file. Reads its header only."""
    with path.open("rb") as file:
        raw_header = file.read(int.from_bytes(file.read(_LENGTH_BYTES), "little"))
    return [
        TensorHeader(name, entry["dtype"], tuple(entry["shape"]))
        for name, entry in _entries(raw_header)
    ]


def problem_with(path: Path) -> str | None:
    """Return what is wrong with the header, or with the file's size beside what the header
    promises.

    MLX 0.32.4 reads lazily, and would notice only when a tensor is used.
    """
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if not 2 <= header_bytes <= size_bytes - _LENGTH_BYTES:
            return "the file is truncated or damaged: its header does not fit into it"
        raw_header = file.read(header_bytes)
    try:
        ends = [entry["data_offsets"][1] for _, entry in _entries(raw_header)]
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return "the file is damaged: its header cannot be read"
    expected = _LENGTH_BYTES + header_bytes + max(ends, default=0)
    if size_bytes != expected:
        return f"the file is truncated or damaged: {size_bytes:,} bytes instead of {expected:,}"
    return None


def _entries(raw_header: bytes) -> list[tuple[str, dict[str, Any]]]:
    header = json.loads(raw_header)
    return [(name, entry) for name, entry in header.items() if name != "__metadata__"]
