"""A bundle's manifest: what the file says about itself, and how large that makes it."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace

from keepwarm.core.stored import KVFamily, Record
from keepwarm.store.bundle.agent_json import (
    MAX_AGENT_BYTES,
    MAX_NAME_CHARS,
    Unsound,
    are_token_ids,
    require,
)
from keepwarm.store.bundle.tar import TAR_BLOCK, end_bytes, padding
from keepwarm.store.disk.tensors import layout_digest

FORMAT = "keepwarm-agent"
VERSION = 2
"""Version 1 had no receipts; it is still read."""
_READABLE = range(1, VERSION + 1)

MAX_RECORDS = 1 << 16
MAX_RECORD_BYTES = 1 << 30

MANIFEST_MEMBER = "manifest.json"
AGENT_MEMBER = "agent.json"
_NO_CHECKSUM = "0" * 64


@dataclass(frozen=True, slots=True)
class Manifest:
    """The facts about a bundle. `checksum` covers the agent and these facts without itself."""

    agent_id: str
    fingerprint: str
    lineage: str
    layout: str
    tokenizer: str
    agent_bytes: int
    record_bytes: tuple[int, ...]
    checksum: str = _NO_CHECKSUM
    version: int = VERSION

    def render(self) -> bytes:
        document = {"format": FORMAT, "version": self.version, **asdict(self)}
        return json.dumps(document, indent=1).encode()

    def sealed(self, agent: bytes) -> "Manifest":
        """Return it with the checksum that it must have beside this agent."""
        digest = hashlib.sha256(replace(self, checksum=_NO_CHECKSUM).render() + agent)
        return replace(self, checksum=digest.hexdigest())

    def members(self) -> Iterator[tuple[str, int]]:
        """Yield the names and sizes of the members behind the manifest."""
        yield AGENT_MEMBER, self.agent_bytes
        for number, nbytes in enumerate(self.record_bytes):
            yield f"records/{number:05}.safetensors", nbytes

    def file_bytes(self) -> int:
        sizes = [len(self.render()), self.agent_bytes, *self.record_bytes]
        end = sum(TAR_BLOCK + nbytes + padding(nbytes) for nbytes in sizes)
        return end + end_bytes(end)


@dataclass(frozen=True, slots=True)
class Exported:
    """The content of a bundle; `records` with their sizes, each behind the one before it."""

    family: KVFamily
    tokenizer: str
    agent_id: str
    agent: bytes
    records: tuple[tuple[Record, int], ...]

    def manifest(self) -> Manifest:
        family = self.family
        return Manifest(
            agent_id=self.agent_id,
            fingerprint=family.fingerprint,
            lineage=family.lineage,
            layout=layout_digest(family.layout),
            tokenizer=self.tokenizer,
            agent_bytes=len(self.agent),
            record_bytes=tuple(nbytes for _, nbytes in self.records),
        ).sealed(self.agent)


def manifest_of(document: object) -> Manifest:
    names = [field.name for field in fields(Manifest) if field.name != "version"]
    if not isinstance(document, dict) or list(document) != ["format", "version", *names]:
        raise Unsound("its manifest does not have the keys of its format")
    version = document["version"]
    if document["format"] != FORMAT or type(version) is not int or version not in _READABLE:
        raise Unsound(f"this Keepwarm reads versions 1 to {VERSION} of {FORMAT!r}")
    sizes = document["record_bytes"]
    for name in names:
        if name not in ("agent_bytes", "record_bytes"):
            value = document[name]
            require(isinstance(value, str) and len(value) <= MAX_NAME_CHARS, f"{name} is no name")
    require(isinstance(sizes, list) and len(sizes) <= MAX_RECORDS, "it has too many records")
    require(are_token_ids(sizes, MAX_RECORD_BYTES), "a record's size is none")
    require(are_token_ids([document["agent_bytes"]], MAX_AGENT_BYTES), "its agent is too large")
    values = {name: document[name] for name in names if name != "record_bytes"}
    return Manifest(**values, record_bytes=tuple(sizes), version=version)
