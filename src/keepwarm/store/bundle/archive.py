"""An agent in one file, for another machine: a tar that has exactly one encoding.

`manifest.json`, `agent.json`, then the record files as they are on disk, each behind the one before
it. A reader renders every tar header, and the manifest, again from the facts it expects and
compares the bytes: no name, link, device or extension of the tar format is ever interpreted. A
bundle comes from anyone, so nothing is allocated by what it claims, and its records are named anew,
in a namespace that no other agent has.
"""

import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from io import SEEK_CUR
from itertools import zip_longest
from pathlib import Path
from typing import BinaryIO

from keepwarm.core.block import BlockHash, child_hash
from keepwarm.core.errors import BadBundle
from keepwarm.core.layout import BLOCK_TOKENS
from keepwarm.core.stored import AgentState, Bundle, BundleTerms, KVFamily, LineState, Record
from keepwarm.store.bundle.agent_json import (
    Unsound,
    are_token_ids,
    decode_agent,
    parse_json,
    require,
)
from keepwarm.store.bundle.manifest import (
    MANIFEST_MEMBER,
    MAX_RECORD_BYTES,
    Exported,
    Manifest,
    manifest_of,
)
from keepwarm.store.bundle.tar import SIZE_FIELD, TAR_BLOCK, end_bytes, padding, tar_header
from keepwarm.store.disk.io_thread import Units
from keepwarm.store.disk.record import Decoded, decode, encode, max_file_bytes
from keepwarm.store.disk.tensors import layout_digest
from keepwarm.store.errors import BadRecord, ForeignRecord

MAX_MANIFEST_BYTES = 1 << 20
MAX_BUNDLE_BYTES = 256 << 30
_OCTAL = re.compile(rb"[0-7]{11}")


# -- writing ---------------------------------------------------------------------------------------


def write_bundle(
    path: Path, exported: Exported, read: Callable[[BlockHash], bytes | memoryview]
) -> Units[int]:
    """Make the file appear whole, private and synced, replacing one of that name.

    Returns its bytes. Errors of `read` and OSErrors pass through, and nothing is left then. Each
    member is a unit and synced by itself, or the last would wait for the disk to take them all.
    """
    manifest = exported.manifest()
    with _appearing(path) as file:
        _write_member(file, MANIFEST_MEMBER, manifest.render())
        members = manifest.members()
        _write_member(file, next(members)[0], exported.agent)
        for (name, _), (record, _) in zip(members, exported.records, strict=True):
            _sync(file)
            yield
            _write_member(file, name, read(record.hash))
        file.write(bytes(end_bytes(file.tell())))
    return manifest.file_bytes()


def _write_member(file: BinaryIO, name: str, data: bytes | memoryview) -> None:
    file.write(tar_header(name, len(data)))
    file.write(data)
    file.write(bytes(padding(len(data))))


@contextmanager
def _appearing(path: Path) -> Iterator[BinaryIO]:
    """Open a new file beside `path` that takes its place, synced, when the block ends well."""
    temporary = path.parent / f".keepwarm-{secrets.token_hex(8)}.tmp"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(temporary, flags, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            _sync(file)
        temporary.replace(path)
        # The data was synced before the rename, and the folder after it: a power cut in between
        # leaves the old file or the new one, and the answer comes when it is the new one for good.
        _sync_folder(path.parent)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -- reading ---------------------------------------------------------------------------------------


def read_bundle(path: Path, terms: BundleTerms) -> Units[Bundle]:
    """Check the file to its end, and keep nothing of it. Raises BadBundle and OSError."""
    with _reading(path, terms) as reader:
        records: list[Record] = []
        for moved in reader.records():
            yield
            records.append(moved.record)
        return Bundle(
            path=path,
            terms=terms,
            state=reader.state(has_records=bool(records)),
            records=tuple(records),
            num_dropped=0 if reader.is_own else len(reader.manifest.record_bytes),
            file_bytes=reader.manifest.file_bytes(),
        )


def read_records(bundle: Bundle) -> Iterator["Moved"]:
    """Yield the records of a bundle that was read, checked again. Raises BadBundle and OSError.

    Their data lies in a buffer that the next one is read into.
    """
    with _reading(bundle.path, bundle.terms) as reader:
        for expected, moved in zip_longest(bundle.records, reader.records()):
            is_same = moved is not None and moved.record == expected
            require(is_same, "it was changed while it was read")
            yield moved


@contextmanager
def _reading(path: Path, terms: BundleTerms) -> Iterator["_BundleReader"]:
    # A pipe, which O_NONBLOCK does not wait for, or a device is refused before it is read.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        try:
            yield _BundleReader(file, terms)
        except Unsound as error:
            raise BadBundle(path, str(error)) from error


@dataclass(frozen=True, slots=True)
class Moved:
    """A record of a bundle under the name that it has in the importer's family."""

    record: Record
    token_ids: tuple[int, ...]
    data: memoryview

    def parts(self, family: KVFamily) -> list[bytes | memoryview]:
        """Return the parts of the record's file in that family."""
        pieces, start = [], 0
        for tensor in family.layout.tensors(self.record.num_tokens):
            pieces.append(self.data[start : start + tensor.nbytes])
            start += tensor.nbytes
        return encode(family, self.record, self.token_ids, pieces)


@dataclass(frozen=True, slots=True)
class _Place:
    """A block of a line: its parent's hash in the importer's family, and the line's ids there."""

    parent: BlockHash
    token_ids: tuple[int, ...]


class _BundleReader:
    """Reads a bundle from its start to its end, once. Raises Unsound."""

    def __init__(self, file: BinaryIO, terms: BundleTerms) -> None:
        status = os.fstat(file.fileno())
        require(stat.S_ISREG(status.st_mode), "it is no file")
        require(status.st_size <= MAX_BUNDLE_BYTES, f"it has {status.st_size:,} bytes")
        self._file = file
        self._terms = terms
        self.manifest = self._read_manifest()
        expected = self.manifest.file_bytes()
        require(status.st_size == expected, f"it has {status.st_size:,} bytes, not {expected:,}")
        self._members = self.manifest.members()
        self._agent = self._read_agent()

    @property
    def is_own(self) -> bool:
        """Whether its KV can be used here."""
        family, manifest = self._terms.family, self.manifest
        return (
            manifest.fingerprint == family.fingerprint
            and manifest.lineage == family.lineage
            and manifest.layout == layout_digest(family.layout)
            and manifest.tokenizer == self._terms.tokenizer
        )

    def state(self, *, has_records: bool) -> AgentState:
        """Return the agent, its own lines in the importer's namespace where it has KV."""
        namespace = self._terms.family.namespace if has_records else ""
        lines = (
            replace(line, namespace=namespace if self._is_own_line(line) else "")
            for line in self._agent.lines
        )
        return replace(self._agent, lines=tuple(lines))

    def records(self) -> Iterator[Moved]:
        """Yield each record of the importer's family once; then check the end of the file."""
        seen: set[BlockHash] = set(self._roots())
        names: set[BlockHash] = set()
        for decoded in self._own_records() if self.is_own else self._skipped_records():
            record = decoded.record
            require(record.before in seen, "a record does not follow another")
            require(record.hash not in seen, "a record comes twice")
            seen.add(record.hash)
            moved = self._moved(decoded)
            if moved.record.hash not in names:  # lines of two namespaces may share it now
                names.add(moved.record.hash)
                yield moved
        self._expect_zeros(end_bytes(self._file.tell()))

    # -- inside ----------------------------------------------------------------------------------

    def _read_manifest(self) -> Manifest:
        header = self._file.read(TAR_BLOCK)
        digits = _OCTAL.fullmatch(header[SIZE_FIELD])
        nbytes = int(digits[0], 8) if digits else MAX_MANIFEST_BYTES + 1
        require(nbytes <= MAX_MANIFEST_BYTES, "it does not begin with a manifest, or a small one")
        require(header == tar_header(MANIFEST_MEMBER, nbytes), "it is no bundle")
        data = self._file.read(nbytes)
        manifest = manifest_of(parse_json(data, "its manifest"))
        require(data == manifest.render(), "its manifest is not written as Keepwarm writes it")
        self._expect_zeros(padding(nbytes))
        return manifest

    def _read_agent(self) -> AgentState:
        data = self._next_member(bytearray(self.manifest.agent_bytes))
        manifest = self.manifest
        require(manifest == manifest.sealed(bytes(data)), "its checksum is not that of its agent")
        state = decode_agent(bytes(data))
        require(state.agent_id == manifest.agent_id, "its manifest names another agent")
        largest = self._terms.vocab_size - 1
        for line in filter(self._is_own_line, state.lines):
            ids = line.transcript.token_ids
            require(are_token_ids(ids, largest), "a token id is outside the vocabulary")
        return state

    def _is_own_line(self, line: LineState) -> bool:
        return line.tokenizer == self._terms.tokenizer

    def _next_member(self, buffer: bytearray) -> memoryview:
        """Read the next member into a buffer that has room for what the manifest says of it."""
        nbytes = self._enter_member(len(buffer))
        view = memoryview(buffer)[:nbytes]
        num_read = self._file.readinto(view)  # type: ignore[attr-defined]
        require(num_read == nbytes, "it ends too early")
        self._expect_zeros(padding(nbytes))
        return view

    def _enter_member(self, max_bytes: int) -> int:
        name, nbytes = next(self._members)
        require(nbytes <= max_bytes, f"{name} has {nbytes:,} bytes; {max_bytes:,} may be")
        header = self._file.read(TAR_BLOCK)
        require(header == tar_header(name, nbytes), f"{name} is not where the manifest says")
        return nbytes

    def _expect_zeros(self, nbytes: int) -> None:
        require(self._file.read(nbytes) == bytes(nbytes), "there is something between its parts")

    def _skipped_records(self) -> Iterator[Decoded]:
        """Yield nothing: the records cannot be used here, and only their places are checked."""
        for _ in self.manifest.record_bytes:
            nbytes = self._enter_member(MAX_RECORD_BYTES)
            self._file.seek(nbytes, SEEK_CUR)
            self._expect_zeros(padding(nbytes))
        yield from ()

    def _own_records(self) -> Iterator[Decoded]:
        families = self._families()
        buffer = bytearray(
            max(max_file_bytes(family, BLOCK_TOKENS) for family in families.values())
        )
        for _ in self.manifest.record_bytes:
            raw = self._next_member(buffer)
            try:
                yield _decode(raw, families)
            except BadRecord as error:
                raise Unsound(f"a record in it cannot be used: {error}") from error

    def _families(self) -> dict[str, KVFamily]:
        """Return the families that its lines' records may be of, by namespace."""
        names = {line.namespace for line in self._agent.lines if self._is_own_line(line)}
        return {name: replace(self._terms.family, namespace=name) for name in {"", *names}}

    def _roots(self) -> list[BlockHash]:
        return [family.root for family in self._families().values()]

    def _moved(self, decoded: Decoded) -> Moved:
        record, ids = decoded.record, decoded.token_ids
        for place in self._places.get((record.depth, record.parent), ()):
            if place.token_ids[: record.stop] == ids:
                moved = Record.of_run(place.parent, record.depth, ids, start=record.start)
                return Moved(moved, ids, decoded.data)
        raise Unsound("a record is of no line of the agent")

    @cached_property
    def _places(self) -> dict[tuple[int, BlockHash], list[_Place]]:
        """Return all blocks of the agent's own lines, by depth and parent's hash."""
        places: dict[tuple[int, BlockHash], list[_Place]] = {}
        families = self._families()
        for line in filter(self._is_own_line, self._agent.lines):
            old, new = families[line.namespace].root, self._terms.family.root
            ids = line.transcript.token_ids
            for depth, start in enumerate(range(0, len(ids), BLOCK_TOKENS)):
                block = ids[start : start + BLOCK_TOKENS]
                places.setdefault((depth, old), []).append(_Place(new, block))
                old, new = child_hash(old, block), child_hash(new, block)
        return places


def _decode(raw: memoryview, families: dict[str, KVFamily]) -> Decoded:
    """Decode a record of one of these families, which differ by namespace. Raises BadRecord."""
    first = next(iter(families.values()))
    try:
        return decode(raw, first)
    except ForeignRecord as error:
        if error.field != "namespace" or error.found not in families:
            raise
        return decode(raw, families[error.found])
