"""Exporting an agent: its state, and the records that are sound when they are read.

A record that is gone or damaged is left out with all that follows it, and the file begun anew.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from keepwarm.core.block import BlockHash
from keepwarm.core.errors import BundleFailed
from keepwarm.core.stored import AgentState, KVFamily, Record
from keepwarm.store.bundle.agent_json import Unsound, decode_agent, encode_agent
from keepwarm.store.bundle.archive import write_bundle
from keepwarm.store.bundle.manifest import Exported
from keepwarm.store.disk.files import RecordFiles
from keepwarm.store.disk.io_thread import Units
from keepwarm.store.disk.record import decode, max_file_bytes
from keepwarm.store.errors import BadRecord


@dataclass(frozen=True, slots=True)
class Export:
    """An agent to export, and its records with their families, each line's in order.

    `family` is the model's, whatever namespaces the lines have.
    """

    family: KVFamily
    tokenizer: str
    state: AgentState
    records: tuple[tuple[Record, KVFamily], ...]


class _Lost(Exception):
    """A record that cannot go into the bundle."""

    def __init__(self, record_hash: BlockHash, reason: str) -> None:
        super().__init__(reason)
        self.record_hash = record_hash
        self.reason = reason


def export_agent(
    path: Path,
    export: Export,
    files: RecordFiles,
    lost: dict[BlockHash, str],
    check_room: Callable[[int], None],
) -> Units[tuple[int, int]]:
    """Write the bundle. Returns the number of its records, and its bytes.

    Adds to `lost` what could not be used, and why. `check_room` may raise for the bytes that will
    be written, which passes through. Raises BundleFailed for an agent that no import would take,
    and OSError.
    """
    agent = yield from _encoded(path, export.state)
    while True:
        try:
            return (yield from _write(path, export, agent, files, lost, check_room))
        except _Lost as error:
            lost[error.record_hash] = error.reason


def _write(
    path: Path,
    export: Export,
    agent: bytes,
    files: RecordFiles,
    lost: dict[BlockHash, str],
    check_room: Callable[[int], None],
) -> Units[tuple[int, int]]:
    families = {record.hash: family for record, family in export.records}
    sizes = {record.hash: files.size_of(record.hash) for record, _ in export.records}
    lost.update({name: "its file is gone" for name, nbytes in sizes.items() if nbytes is None})
    records = tuple((r, sizes[r.hash] or 0) for r in _reachable(export, lost.keys()))
    content = Exported(export.family, export.tokenizer, export.state.agent_id, agent, records)
    largest = [max_file_bytes(families[r.hash], r.num_tokens) for r, _ in records]
    buffer = bytearray(max(largest, default=0))
    check_room(content.manifest().file_bytes())

    def read(record_hash: BlockHash) -> memoryview:
        raw = _read_sound(files, families[record_hash], record_hash, buffer)
        if len(raw) != sizes[record_hash]:
            raise _Lost(record_hash, "its size has changed")
        return raw

    file_bytes = yield from write_bundle(path, content, read)
    return len(records), file_bytes


def _reachable(export: Export, missing: Collection[BlockHash]) -> Iterator[Record]:
    """Yield the records that follow one another from a root on."""
    known = {family.root for _, family in export.records}
    for record, _ in export.records:
        if record.before in known and record.hash not in missing:
            known.add(record.hash)
            yield record


def _read_sound(
    files: RecordFiles, family: KVFamily, record_hash: BlockHash, buffer: bytearray
) -> memoryview:
    try:
        raw = files.read_into(record_hash, buffer)
        if raw is None:
            raise BadRecord("its file is gone")
        if decode(raw, family).record.hash != record_hash:
            raise BadRecord("it is another record than its name says")
    except BadRecord as error:
        raise _Lost(record_hash, str(error)) from error
    return raw


def _encoded(path: Path, state: AgentState) -> Units[bytes]:
    """Encode the agent, and check that an import will take it."""
    try:
        data = encode_agent(state)
        yield
        same = decode_agent(data) == _plain(state)
    except (TypeError, ValueError, RecursionError, Unsound) as error:
        raise BundleFailed(path, f"the agent fits into no bundle: {error}") from error
    if not same:
        raise BundleFailed(path, "the agent would come back changed: a message is no plain JSON")
    yield
    return data


def _plain(state: AgentState) -> AgentState:
    """Return the agent without what means nothing on another machine."""
    lines = (replace(line, block_hashes=(), last_used=0) for line in state.lines)
    return replace(state, lines=tuple(lines), model="", has_fixed_main=False)
