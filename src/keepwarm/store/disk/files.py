"""Records as files: whole or not there, private to their owner, and within a budget."""

import json
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from keepwarm.core.block import BlockHash
from keepwarm.store.disk.budget import DiskBudget
from keepwarm.store.errors import DamagedRecord, DiskTooFull, OverBudget

BLOCKS_FOLDER = "blocks"
_SUFFIX = ".safetensors"
_RECORD_NAME = re.compile(r"([0-9a-f]{64})\.safetensors")
_ASIDE_NAME = re.compile(r"([0-9a-f]{64}\.[0-9a-f]{8})\.(?:safetensors|json)")
_MAX_PIECES_PER_CALL = 1024  # IOV_MAX of Linux and of macOS
_BYTES_PER_CALL = 1 << 20
_MAX_REASON_CHARS = 1000


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file that has the name of a record. What is in it has not been looked at."""

    record_hash: BlockHash
    path: Path
    size_bytes: int


class RecordFiles:
    """Owns `blocks/`, `tmp/` and `set-aside/` in one folder. For the I/O thread alone: no lock.

    An OSError of the disk passes through as it is, and what is counted stays what is on disk.
    """

    def __init__(
        self,
        root: Path,
        budget: DiskBudget,
        *,
        max_set_aside_bytes: int,
        records_bytes: int = 0,
    ) -> None:
        self._blocks = root / BLOCKS_FOLDER
        self._tmp = root / "tmp"
        self._set_aside = root / "set-aside"
        self._budget = budget
        self._max_set_aside_bytes = max_set_aside_bytes
        for folder in (root, self._blocks, self._tmp, self._set_aside):
            _make_private_folder(folder)
        self.clear_tmp()
        # What is set aside, by the name that its files share, the oldest first.
        self._aside = _measure_set_aside(self._set_aside)
        self._budget.set_aside_bytes = sum(self._aside.values())
        self._shrink_set_aside(0)
        self.set_records_bytes(records_bytes)

    def set_records_bytes(self, nbytes: int) -> None:
        """Tell the budget what all records take, where the catalogue knows it better."""
        self._budget.records_bytes = nbytes

    def clear_tmp(self) -> None:
        """Remove what a process that was killed had not finished writing."""
        for leftover in self._tmp.iterdir():
            leftover.unlink()
        self._budget.temporary_bytes = 0

    def publish(
        self,
        record_hash: BlockHash,
        parts: Sequence[bytes | memoryview],
        between: Callable[[], None] = lambda: None,
    ) -> int:
        """Make the record's file appear whole, replacing one of that name; returns its bytes.

        `between` is called after each part of a megabyte, for what cannot wait.

        Raises OverBudget or DiskTooFull before anything is written. The file is not synced: the
        checksum catches what a power cut tore, and losing a block costs a prefill, not an answer.
        """
        path = self._path(record_hash)
        temporary = self._tmp / path.name
        nbytes = sum(memoryview(part).nbytes for part in parts)
        replaced_bytes = self.size_of(record_hash) or 0
        self._budget.require(nbytes)
        self._budget.temporary_bytes += nbytes
        try:
            _write_file(temporary, parts, between)
            _move_into_place(temporary, path)
        except BaseException:
            self._discard(temporary)
            raise
        self._budget.temporary_bytes -= nbytes
        self._budget.records_bytes += nbytes - replaced_bytes
        return nbytes

    def probe(self, nbytes: int) -> None:
        """Write as many bytes as a record of that size, and remove them. Raises as `publish`."""
        temporary, moved = self._tmp / "probe", self._tmp / "probe.moved"
        self._budget.require(nbytes)
        self._budget.temporary_bytes += nbytes
        try:
            _write_file(temporary, [bytes(nbytes)])
            _move_into_place(temporary, moved)
        finally:
            self._discard(moved)
            self._discard(temporary)

    def read_into(
        self, record_hash: BlockHash, buffer: bytearray | memoryview
    ) -> memoryview | None:
        """Read the whole file into the start of `buffer`; None when there is no such file.

        Raises DamagedRecord when the file is larger than `buffer`, which has room for every sound
        record of its kind.
        """
        try:
            descriptor = os.open(self._path(record_hash), os.O_RDONLY | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        try:
            return _read_whole(descriptor, memoryview(buffer))
        finally:
            os.close(descriptor)

    def size_of(self, record_hash: BlockHash) -> int | None:
        """Return the file's bytes; None when there is no such file."""
        try:
            return self._path(record_hash).lstat().st_size
        except FileNotFoundError:
            return None

    def remove(self, record_hash: BlockHash) -> int:
        """Remove the file. Returns the bytes that this freed; 0 when there was no such file."""
        nbytes = self.size_of(record_hash)
        if nbytes is None:
            return 0
        self._path(record_hash).unlink()
        self._budget.records_bytes -= nbytes
        return nbytes

    def set_aside(self, record_hash: BlockHash, reason: str) -> None:
        """Move a damaged file out of the way, with a note that says why, for people to look at.

        The oldest files set aside are removed for it. A file that alone would exceed the bound is
        removed instead, and the note is left out where budget or disk refuse it.
        """
        nbytes = self.size_of(record_hash)
        if nbytes is None:
            return
        note = _note(record_hash, reason)
        if nbytes + len(note) > self._max_set_aside_bytes:
            self.remove(record_hash)
            return
        self._shrink_set_aside(nbytes + len(note))
        name = f"{record_hash.hex()}.{secrets.token_hex(4)}"
        moved = self._set_aside / f"{name}{_SUFFIX}"
        self._path(record_hash).replace(moved)
        self._budget.records_bytes -= nbytes
        self._count_aside(name, nbytes)
        with suppress(OSError, OverBudget, DiskTooFull):
            os.utime(moved)  # the next start orders what was set aside by time
            self._write_note(name, note)

    def scan(self) -> Iterator[StoredFile]:
        """Yield every file in `blocks/` that has the name of a record, folder by folder."""
        for folder in self._blocks.iterdir():
            if not folder.is_dir():
                continue
            with os.scandir(folder) as entries:
                for entry in entries:
                    stored = _stored_file(entry)
                    if stored is not None and folder.name == entry.name[:2]:
                        yield stored

    def _path(self, record_hash: BlockHash) -> Path:
        name = record_hash.hex()
        return self._blocks / name[:2] / f"{name}{_SUFFIX}"

    def _discard(self, temporary: Path) -> None:
        """Undo a failed write. A file that cannot be removed stays counted."""
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        with suppress(OSError):
            left_bytes = sum(path.lstat().st_size for path in self._tmp.iterdir())
            self._budget.temporary_bytes = left_bytes

    def _write_note(self, name: str, note: bytes) -> None:
        temporary = self._tmp / f"{name}.json"
        self._budget.require(len(note))
        self._budget.temporary_bytes += len(note)
        try:
            _write_file(temporary, [note])
            temporary.replace(self._set_aside / temporary.name)
        except BaseException:
            self._discard(temporary)
            raise
        self._budget.temporary_bytes -= len(note)
        self._count_aside(name, len(note))

    def _count_aside(self, name: str, nbytes: int) -> None:
        self._aside[name] = self._aside.get(name, 0) + nbytes
        self._budget.set_aside_bytes += nbytes

    def _shrink_set_aside(self, needed_bytes: int) -> None:
        """Remove the oldest of what was set aside until `needed_bytes` more are within bounds."""
        while self._budget.set_aside_bytes + needed_bytes > self._max_set_aside_bytes:
            name = next(iter(self._aside))
            for suffix in (_SUFFIX, ".json"):
                (self._set_aside / f"{name}{suffix}").unlink(missing_ok=True)
            self._budget.set_aside_bytes -= self._aside.pop(name)


def _make_private_folder(folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if stat.S_IMODE(folder.stat().st_mode) != 0o700:
        folder.chmod(0o700)  # it was there before, or the umask took more than it should


def _write_file(
    path: Path,
    parts: Sequence[bytes | memoryview],
    between: Callable[[], None] = lambda: None,
) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
    descriptor = os.open(path, flags, 0o600)
    try:
        os.fchmod(descriptor, 0o600)  # whatever the umask is
        _write_all(descriptor, parts, between)
    finally:
        os.close(descriptor)


def _write_all(
    descriptor: int, parts: Sequence[bytes | memoryview], between: Callable[[], None]
) -> None:
    pending = [memoryview(part) for part in parts if memoryview(part).nbytes]
    first = 0
    while first < len(pending):
        written = os.writev(descriptor, _next_pieces(pending, first))
        while first < len(pending) and written >= pending[first].nbytes:
            written -= pending[first].nbytes
            first += 1
        if written:
            pending[first] = pending[first].cast("B")[written:]
        if first < len(pending):
            between()


def _next_pieces(pending: Sequence[memoryview], first: int) -> list[memoryview]:
    """Return what one call writes: about a megabyte."""
    pieces: list[memoryview] = []
    nbytes = 0
    for piece in pending[first : first + _MAX_PIECES_PER_CALL]:
        pieces.append(piece.cast("B")[: _BYTES_PER_CALL - nbytes])
        nbytes += pieces[-1].nbytes
        if nbytes == _BYTES_PER_CALL:
            break
    return pieces


def _move_into_place(temporary: Path, path: Path) -> None:
    try:
        temporary.replace(path)
    except FileNotFoundError:
        _make_private_folder(path.parent)
        temporary.replace(path)


def _read_whole(descriptor: int, buffer: memoryview) -> memoryview:
    nbytes = os.fstat(descriptor).st_size
    if nbytes > len(buffer):
        raise DamagedRecord(f"it has {nbytes:,} bytes where {len(buffer):,} are the most")
    num_read = 0
    while num_read < nbytes:
        count = os.readv(descriptor, [buffer[num_read:nbytes]])
        if count == 0:
            raise DamagedRecord(f"it ended after {num_read:,} of its {nbytes:,} bytes")
        num_read += count
    return buffer[:nbytes]


def _stored_file(entry: os.DirEntry[str]) -> StoredFile | None:
    match = _RECORD_NAME.fullmatch(entry.name)
    if match is None or not entry.is_file(follow_symlinks=False):
        return None
    try:
        size_bytes = entry.stat(follow_symlinks=False).st_size
    except FileNotFoundError:  # removed since the scan began
        return None
    return StoredFile(BlockHash(bytes.fromhex(match[1])), Path(entry.path), size_bytes)


def _measure_set_aside(folder: Path) -> dict[str, int]:
    """Return the bytes under each name that a file and its note share, the oldest first."""
    sizes: dict[str, int] = {}
    times: dict[str, int] = {}
    for path in folder.iterdir():
        match = _ASIDE_NAME.fullmatch(path.name)
        if match is not None:
            status = path.lstat()
            name = match[1]
            sizes[name] = sizes.get(name, 0) + status.st_size
            times[name] = max(times.get(name, 0), status.st_mtime_ns)
    return {name: sizes[name] for name in sorted(sizes, key=lambda name: (times[name], name))}


def _note(record_hash: BlockHash, reason: str) -> bytes:
    note = {"hash": record_hash.hex(), "reason": reason[:_MAX_REASON_CHARS]}
    return (json.dumps(note) + "\n").encode()
