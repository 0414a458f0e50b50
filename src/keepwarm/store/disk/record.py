"""A record as a safetensors file that says what it is of, and can prove it.

8 bytes of header length, a JSON header, then the tensors' bytes end to end from a multiple of 64
on. A record has exactly one encoding: a reader renders the header again from the facts it read and
compares the bytes, so there is nothing in a header that is not checked.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from io import SEEK_END
from typing import Any, BinaryIO, TypeGuard

import xxhash

from keepwarm.core.block import BlockHash, child_hash, root_hash
from keepwarm.core.errors import InvariantBroken
from keepwarm.core.layout import BLOCK_TOKENS
from keepwarm.core.stored import KVFamily, Record
from keepwarm.store.disk.tensors import (
    TensorPlan,
    layout_digest,
    layout_of,
    tensor_plan,
    tensors_json,
    to_json,
    total_bytes,
)
from keepwarm.store.errors import DamagedRecord, ForeignRecord

FORMAT = "keepwarm-record-1"
RAW = "raw"
MAX_HEADER_BYTES = 1 << 20

_LENGTH_BYTES = 8
_ALIGNMENT = 64
_HASH_BYTES = 32
_MAX_UINT32 = 2**32 - 1
_json_decoder = json.JSONDecoder()

# Format and checksum come first in every header, so the checksum's place is a constant.
_OPENING = '{"__metadata__":'
_PREFIX = f'{_OPENING}{{"format":"{FORMAT}","checksum":"'.encode()
_CHECKSUM_START = _LENGTH_BYTES + len(_PREFIX)
_CHECKSUM_STOP = _CHECKSUM_START + 32
_NO_CHECKSUM = "0" * 32
_METADATA_KEYS = (
    *("format", "checksum", "hash", "before", "parent", "depth", "start", "stop", "tokens"),
    *("fingerprint", "lineage", "namespace", "encoding", "layout"),
)


@dataclass(frozen=True, slots=True)
class Identity:
    """A family as a file names it. `layout` is a digest."""

    fingerprint: str
    lineage: str
    namespace: str
    layout: str
    encoding: str = RAW

    @property
    def root(self) -> BlockHash:
        return root_hash(
            fingerprint=self.fingerprint, lineage=self.lineage, namespace=self.namespace
        )


@dataclass(frozen=True, slots=True)
class Header:
    """The facts in a record's header. `token_ids` are the block's, up to `record.stop`."""

    identity: Identity
    record: Record
    token_ids: tuple[int, ...]
    checksum: str
    file_bytes: int
    family: KVFamily


@dataclass(frozen=True, slots=True)
class Decoded:
    """A record that was verified. `data` is a view of what was decoded, not a copy."""

    record: Record
    token_ids: tuple[int, ...]
    data: memoryview


def identity_of(family: KVFamily) -> Identity:
    """Return what the files of this family say about it."""
    return Identity(
        family.fingerprint, family.lineage, family.namespace, layout_digest(family.layout)
    )


@lru_cache(maxsize=512)
def max_file_bytes(family: KVFamily, num_tokens: int) -> int:
    """Return the size that no file of a record of `num_tokens` exceeds, whatever ids it names."""
    any_hash = BlockHash(bytes(_HASH_BYTES))
    record = Record(
        hash=any_hash,
        before=any_hash,
        parent=any_hash,
        depth=_MAX_UINT32,
        start=BLOCK_TOKENS - num_tokens,
        stop=BLOCK_TOKENS,
    )
    plan = tensor_plan(family.layout, num_tokens)
    token_ids = (_MAX_UINT32,) * BLOCK_TOKENS
    head = _render(identity_of(family), record, token_ids, _NO_CHECKSUM, plan.tensors_json)
    return len(head) + plan.data_bytes


def encode(
    family: KVFamily,
    record: Record,
    token_ids: Sequence[int],
    pieces: Sequence[memoryview],
) -> list[bytes | memoryview]:
    """Return the file's parts: the header, then `pieces`, one for each tensor of the layout.

    `token_ids` are the block's, from its first to `record.stop`. Raises InvariantBroken when
    record, ids and pieces contradict one another.
    """
    identity, token_ids = identity_of(family), tuple(token_ids)
    problem = _contradiction(identity, record, token_ids)
    if problem:
        raise InvariantBroken(f"{record!r} cannot be stored: {problem}")
    plan = tensor_plan(family.layout, record.num_tokens)
    _expect_fit(plan, pieces)
    head = _render(identity, record, token_ids, _NO_CHECKSUM, plan.tensors_json)
    if len(head) > _LENGTH_BYTES + MAX_HEADER_BYTES:
        raise InvariantBroken(f"{record!r} cannot be stored: its header has {len(head):,} bytes")
    checksum = _checksum([head, *pieces])
    return [head[:_CHECKSUM_START] + checksum + head[_CHECKSUM_STOP:], *pieces]


def decode(raw: memoryview, family: KVFamily) -> Decoded:
    """Verify `raw`, a whole file's bytes, and return the record that it holds.

    Raises DamagedRecord, or ForeignRecord when it is sound but of another family. Whether it
    is the record that was looked for is for the caller to compare.
    """
    head_bytes = _LENGTH_BYTES + _header_length(raw[:_LENGTH_BYTES])
    if len(raw) < head_bytes:
        raise DamagedRecord(f"it ends after {len(raw):,} bytes, within its header")
    head = bytes(raw[:head_bytes])
    metadata = _parse_metadata(head)
    _verify_checksum(raw)
    identity, record, token_ids = _parse_facts(metadata)
    _refuse_foreign(identity, identity_of(family))
    plan = tensor_plan(family.layout, record.num_tokens)
    if head != _render(identity, record, token_ids, metadata["checksum"], plan.tensors_json):
        raise DamagedRecord(f"its header is not that of {record.num_tokens} tokens of its layout")
    if len(raw) != head_bytes + plan.data_bytes:
        raise DamagedRecord(
            f"it has {len(raw):,} bytes instead of {head_bytes + plan.data_bytes:,}"
        )
    return Decoded(record, token_ids, raw[head_bytes:])


def read_header(file: BinaryIO) -> Header:
    """Read what the record in `file` says about itself, for a catalogue rebuilt from files.

    Reads the header only. Verified are the hashes, the layout and the file's size; not the
    checksum, which covers the data: `decode` does that.
    """
    length = file.read(_LENGTH_BYTES)
    head = length + file.read(_header_length(length))
    metadata = _parse_metadata(head)
    identity, record, token_ids = _parse_facts(metadata)
    tensors = _parse_tensors(head)
    file_bytes = len(head) + total_bytes(tensors)
    rendered = _render(identity, record, token_ids, metadata["checksum"], tensors_json(tensors))
    if head != rendered:
        raise DamagedRecord("its header is not written as Keepwarm writes it")
    if file.seek(0, SEEK_END) != file_bytes:
        raise DamagedRecord(f"it has {file.tell():,} bytes instead of {file_bytes:,}")
    family = _family_of(identity, tensors, record.num_tokens)
    return Header(identity, record, token_ids, metadata["checksum"], file_bytes, family)


def _render(
    identity: Identity,
    record: Record,
    token_ids: Sequence[int],
    checksum: str,
    tensors_json: str,
) -> bytes:
    """Render the length and the header: the only bytes by which these facts are written."""
    metadata = {
        "format": FORMAT,
        "checksum": checksum,
        "hash": record.hash.hex(),
        "before": record.before.hex(),
        "parent": record.parent.hex(),
        "depth": str(record.depth),
        "start": str(record.start),
        "stop": str(record.stop),
        "tokens": to_json(token_ids),
        "fingerprint": identity.fingerprint,
        "lineage": identity.lineage,
        "namespace": identity.namespace,
        "encoding": identity.encoding,
        "layout": identity.layout,
    }
    header = f"{_OPENING}{to_json(metadata)}{tensors_json}}}".encode()
    padding = -(_LENGTH_BYTES + len(header)) % _ALIGNMENT
    length = len(header) + padding
    return length.to_bytes(_LENGTH_BYTES, "little") + header + b" " * padding


def _checksum(parts: Sequence[bytes | memoryview]) -> bytes:
    """Return the checksum of all parts; the one in the first part, the header, counts as zeros."""
    head = memoryview(parts[0])
    digest = xxhash.xxh3_128(head[:_CHECKSUM_START])
    digest.update(_NO_CHECKSUM.encode())
    digest.update(head[_CHECKSUM_STOP:])
    for part in parts[1:]:
        digest.update(part)
    return digest.hexdigest().encode()


def _verify_checksum(raw: memoryview) -> None:
    if raw[_CHECKSUM_START:_CHECKSUM_STOP] != _checksum([raw]):
        raise DamagedRecord(f"its {len(raw):,} bytes do not have the checksum that it names")


def _expect_fit(plan: TensorPlan, pieces: Sequence[memoryview]) -> None:
    sizes = tuple(piece.nbytes for piece in pieces)
    if sizes != plan.piece_bytes:
        raise InvariantBroken(f"pieces of {sizes} bytes for tensors of {plan.piece_bytes}")
    if not all(piece.c_contiguous for piece in pieces):
        raise InvariantBroken("a piece is not contiguous")


def _contradiction(identity: Identity, record: Record, token_ids: Sequence[int]) -> str | None:
    """Return what in these facts cannot be true together."""
    if not 0 <= record.depth <= _MAX_UINT32:
        return f"there is no depth {record.depth}"
    if not 0 <= record.start < record.stop <= BLOCK_TOKENS:
        return f"no block has a run of tokens from {record.start} to {record.stop}"
    if len(token_ids) != record.stop or not _are_token_ids(token_ids):
        return f"it does not name the ids of {record.stop} tokens"
    return _wrong_hash(identity, record, token_ids)


def _wrong_hash(identity: Identity, record: Record, token_ids: Sequence[int]) -> str | None:
    if len(record.parent) != _HASH_BYTES:
        return f"its parent's hash has {len(record.parent)} bytes"
    if record.depth == 0 and record.parent != identity.root:
        return "it is a first block, and its parent is not the root of its family"
    if record.hash != child_hash(record.parent, token_ids):
        return "its hash is not that of its tokens"
    before = child_hash(record.parent, token_ids[: record.start]) if record.start else record.parent
    if record.before != before:
        return "the hash before it is not that of the tokens before it"
    return None


def _are_token_ids(values: Sequence[object]) -> TypeGuard[Sequence[int]]:
    return all(type(value) is int and 0 <= value <= _MAX_UINT32 for value in values)


def _refuse_foreign(found: Identity, expected: Identity) -> None:
    for field in fields(Identity):
        values = getattr(found, field.name), getattr(expected, field.name)
        if values[0] != values[1]:
            raise ForeignRecord(field=field.name, found=values[0], expected=values[1])


def _header_length(length: bytes | memoryview) -> int:
    if len(length) < _LENGTH_BYTES:
        raise DamagedRecord(f"it has {len(length)} bytes")
    num_bytes = int.from_bytes(length, "little")
    if num_bytes > MAX_HEADER_BYTES:
        raise DamagedRecord(f"its header claims {num_bytes:,} bytes; {MAX_HEADER_BYTES:,} may be")
    return num_bytes


def _parse_metadata(head: bytes) -> dict[str, str]:
    """Parse the facts as text: all keys of the format, and values that can be encoded."""
    if head[_LENGTH_BYTES:_CHECKSUM_START] != _PREFIX:
        raise DamagedRecord(f"it does not start as a {FORMAT} file does")
    try:
        metadata, _ = _json_decoder.raw_decode(_header_text(head), len(_OPENING))
    except (ValueError, RecursionError) as error:
        raise DamagedRecord(f"its metadata is not JSON: {error}") from error
    if not isinstance(metadata, dict) or tuple(metadata) != _METADATA_KEYS:
        raise DamagedRecord("its metadata does not have the keys of its format")
    for key, value in metadata.items():
        if not isinstance(value, str) or not _can_be_encoded(value):
            raise DamagedRecord(f"its {key} is not text")
    if not re.fullmatch("[0-9a-f]{32}", metadata["checksum"]):
        raise DamagedRecord("its checksum is not 32 hexadecimal digits")
    return metadata


def _parse_facts(metadata: dict[str, str]) -> tuple[Identity, Record, tuple[int, ...]]:
    """Parse the facts, which must agree with one another."""
    identity = Identity(**{field.name: metadata[field.name] for field in fields(Identity)})
    token_ids = _parse_token_ids(metadata["tokens"])
    try:
        record = Record(
            hash=BlockHash(bytes.fromhex(metadata["hash"])),
            before=BlockHash(bytes.fromhex(metadata["before"])),
            parent=BlockHash(bytes.fromhex(metadata["parent"])),
            depth=int(metadata["depth"]),
            start=int(metadata["start"]),
            stop=int(metadata["stop"]),
        )
    except ValueError as error:
        raise DamagedRecord(f"its metadata names no record: {error}") from error
    problem = _contradiction(identity, record, token_ids)
    if problem:
        raise DamagedRecord(problem)
    return identity, record, token_ids


def _parse_token_ids(text: str) -> tuple[int, ...]:
    try:
        token_ids = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DamagedRecord(f"its tokens are not JSON: {error}") from error
    if not isinstance(token_ids, list) or not _are_token_ids(token_ids):
        raise DamagedRecord("its tokens are not a list of ids")
    return tuple(token_ids)


def _parse_tensors(head: bytes) -> dict[str, Any]:
    try:
        header = json.loads(_header_text(head))
    except (ValueError, RecursionError) as error:
        raise DamagedRecord(f"its header is not JSON: {error}") from error
    # It starts with `{`, so what parses is a dict.
    return {name: spec for name, spec in header.items() if name != "__metadata__"}


def _family_of(identity: Identity, tensors: dict[str, Any], num_tokens: int) -> KVFamily:
    """Return the family whose layout has these tensors: the header has only a layout's digest."""
    layout = layout_of(tensors)
    if layout is None or layout_digest(layout) != identity.layout:
        raise DamagedRecord("its tensors are not those of the layout that it names")
    if tensor_plan(layout, num_tokens).tensors_json != tensors_json(tensors):
        raise DamagedRecord(f"its tensors are not those of {num_tokens} tokens")
    return KVFamily(identity.fingerprint, layout, identity.lineage, identity.namespace)


def _header_text(head: bytes) -> str:
    return head[_LENGTH_BYTES:].decode("ascii")


def _can_be_encoded(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
