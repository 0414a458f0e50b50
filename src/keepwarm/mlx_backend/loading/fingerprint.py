"""A model's fingerprint: the identity of everything that shapes its KV, never its name."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from keepwarm.mlx_backend.loading.files import read_json_object, sha256_of, write_json

LOADER_VERSION = 1
"""Raise it when the loader changes what it computes from the same files."""

_NAMING_KEYS = frozenset({"_name_or_path"})
"""The keys of config.json that say where a copy came from, not what it computes."""


@dataclass(frozen=True, slots=True)
class KVIdentity:
    """What the fingerprint is a hash of."""

    weight_digests: tuple[str, ...]
    config: dict[str, Any]
    compute_dtype: str
    kv_dtype: str
    dequantised: bool
    mlx_lm_version: str
    adapter_digests: tuple[str, ...] = ()
    loader_version: int = LOADER_VERSION

    def fingerprint(self) -> str:
        facts = asdict(self)
        facts["config"] = {k: v for k, v in self.config.items() if k not in _NAMING_KEYS}
        canonical = json.dumps(facts, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class DigestCache:
    """SHA-256 of files, remembered by path, size and time of change.

    Two processes that write at once may lose each other's entries; the file is then hashed again.
    """

    path: Path

    def digest(self, file: Path) -> str:
        """Return the file's SHA-256 in hex, computed only where size or time have changed."""
        file = file.resolve()
        stat = file.stat()
        stamp = [stat.st_size, stat.st_mtime_ns]
        entry = self._entries().get(str(file))
        if isinstance(entry, dict) and entry.get("stamp") == stamp:
            return str(entry["sha256"])
        digest = sha256_of(file)
        self._remember(str(file), {"stamp": stamp, "sha256": digest})
        return digest

    def _remember(self, key: str, entry: dict[str, Any]) -> None:
        living = {name: old for name, old in self._entries().items() if Path(name).exists()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, {**living, key: entry})

    def _entries(self) -> dict[str, Any]:
        """Return the cache's entries; none where it is missing or damaged."""
        try:
            return read_json_object(self.path)
        except (FileNotFoundError, ValueError):
            return {}
