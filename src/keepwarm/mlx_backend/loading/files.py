"""File habits that the loader and the converter share."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

_LENGTH_BYTES = 8


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Make `path` appear whole."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_json_object(path: Path) -> dict[str, Any]:
    """Raise ValueError when the file is not one JSON object in UTF-8."""
    value = json.loads(path.read_text("utf-8"))
    if not isinstance(value, dict):
        raise ValueError("it is not a JSON object")
    return value


def safetensors_problem(path: Path) -> str | None:
    """What is wrong with the file's frame: header, and the size that the header promises.

    MLX reads lazily and would notice only when a tensor is used.
    """
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if not 2 <= header_bytes <= size_bytes - _LENGTH_BYTES:
            return "the file is truncated or damaged: its header does not fit into it"
        raw_header = file.read(header_bytes)
    try:
        ends = [entry["data_offsets"][1] for entry in _tensor_entries(raw_header)]
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return "the file is damaged: its header cannot be read"
    expected = _LENGTH_BYTES + header_bytes + max(ends, default=0)
    if size_bytes != expected:
        return f"the file is truncated or damaged: {size_bytes:,} bytes instead of {expected:,}"
    return None


def _tensor_entries(raw_header: bytes) -> list[dict[str, Any]]:
    header = json.loads(raw_header)
    return [entry for name, entry in header.items() if name != "__metadata__"]
