"""Whether a file is a whole shared library for this machine, known without loading it.

The system's loader maps a truncated library, and the process dies where it touches what is missing.
"""

import platform
import struct
from pathlib import Path

_MACHINES = {"x86_64": 62, "aarch64": 183}
_SHARED = 3
# From the start: magic, 64 bits, little-endian; type and machine; where the section headers
# begin, their size and number. Linkers put them last.
_HEADER = struct.Struct("<4sBB10xHH20xQ10xHH2x")


def why_not_loadable(path: Path) -> str:
    """Return what is wrong with the file as a library; empty where nothing is.

    Raises OSError where it cannot be read.
    """
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(_HEADER.size)
    if len(header) < _HEADER.size or not header.startswith(b"\x7fELF\x02\x01"):
        return "it is no 64-bit ELF file"
    _, _, _, kind, machine, sections_at, section_bytes, num_sections = _HEADER.unpack(header)
    if kind != _SHARED or machine != _MACHINES.get(platform.machine()):
        return f"it is no shared library for {platform.machine()}"
    if sections_at + section_bytes * num_sections > size_bytes:
        return f"it is truncated at {size_bytes:,} bytes"
    return ""
