"""Cold KV on its way into a slab: records read ahead, in order, through a few buffers."""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

from keepwarm.core.agent_store import RecordStore
from keepwarm.core.block import BlockHash, LineId, common_prefix
from keepwarm.core.errors import PoolExhausted
from keepwarm.core.layout import BLOCK_TOKENS
from keepwarm.core.pool import Allocation, BlockPool, Kind
from keepwarm.core.ports import Payload
from keepwarm.core.stored import KVFamily, Record
from keepwarm.kv.generator_source import GeneratorSource

MAX_AHEAD = 3
"""How many records of a line are read ahead, the one that is copied into the slab included."""


@dataclass(slots=True, eq=False)
class _Buffer:
    """Memory to read into, allocated once and used again."""

    data: bytearray
    allocation: Allocation


@dataclass(slots=True, eq=False)
class _Reading:
    record: Record
    buffer: _Buffer
    line: LineId
    data: memoryview | None = None
    has_arrived: bool = False


@dataclass(slots=True, eq=False)
class _Fetch:
    """A line's records that are still to be asked for, and those that were asked for.

    `end` is the first position that is not wanted.
    """

    family: KVFamily
    to_read: deque[Record]
    end: int
    reading: deque[_Reading] = field(default_factory=deque)


@dataclass(frozen=True, slots=True)
class FetchPlan:
    """Records to fetch, in order, and the first position that they cannot serve."""

    records: list[Record]
    end: int


@dataclass(frozen=True, slots=True)
class Arrival:
    """The next run of tokens, as a payload in a buffer that is used again after `done`."""

    record: Record
    payload: Payload


class FetchQueue:
    """Owns the read buffers and, for each line that is being restored, what it still waits for."""

    def __init__(self, store: RecordStore, pool: BlockPool, model: GeneratorSource) -> None:
        self._store = store
        self._pool = pool
        self._model = model
        self._fetches: dict[LineId, _Fetch] = {}
        self._under_way: set[_Reading] = set()
        self._idle: list[_Buffer] = []

    def __repr__(self) -> str:
        return f"FetchQueue({len(self._fetches)} lines, {len(self._under_way)} reads)"

    def plan(
        self,
        family: KVFamily,
        parent: BlockHash,
        depth: int,
        token_ids: Sequence[int],
        known_ids: Sequence[int],
    ) -> FetchPlan:
        """Find the records behind `parent`, from the block at `depth` on, that serve `token_ids`.

        `known_ids` are those of the line's conversation, under which the store has it: where they
        lead further than `token_ids`, the last record goes on in another way than was asked for,
        and its beginning serves.
        """
        start = depth * BLOCK_TOKENS
        wanted = self._store.plan(family, parent, token_ids[start:])
        end = wanted[-1].end_position if wanted else start
        num_common = common_prefix(token_ids, known_ids)
        if num_common > end:
            known = self._store.plan(family, parent, known_ids[start:])
            useful = [record for record in known if record.first_position < num_common]
            if useful and min(useful[-1].end_position, num_common) > end:
                return FetchPlan(useful, min(useful[-1].end_position, num_common))
        return FetchPlan(wanted, end)

    def begin(self, line: LineId, family: KVFamily, records: Iterable[Record], end: int) -> None:
        """Read the records into memory; `next_arrival` hands them out in order, up to `end`."""
        self._fetches[line] = _Fetch(family, deque(records), end)
        self.read_ahead(line)

    def is_fetching(self, line: LineId) -> bool:
        return line in self._fetches

    def is_waiting(self, line: LineId) -> bool:
        """Whether the line's next record has not arrived yet."""
        fetch = self._fetches.get(line)
        return fetch is not None and bool(fetch.reading) and not fetch.reading[0].has_arrived

    def next_depth(self, line: LineId) -> int | None:
        """Return the depth of the block whose record comes next; None when nothing comes."""
        fetch = self._fetches.get(line)
        if fetch is None or not fetch.reading:
            return None
        return fetch.reading[0].record.depth

    def read_ahead(self, line: LineId) -> None:
        """Ask for the next records while there are buffers; without a single one, give up."""
        fetch = self._fetches[line]
        while fetch.to_read and len(fetch.reading) < MAX_AHEAD:
            buffer = self._take_buffer(fetch.family, fetch.to_read[0])
            if buffer is None:
                if not fetch.reading:
                    self._end(line)
                return
            record = fetch.to_read.popleft()
            reading = _Reading(record, buffer, line)
            fetch.reading.append(reading)
            self._under_way.add(reading)
            self._store.fetch(fetch.family, record, buffer.data, partial(self._take, reading))

    def _take(self, reading: _Reading, data: memoryview | None) -> None:
        """Take the store's answer; the line may want nothing any more."""
        self._under_way.remove(reading)
        reading.data, reading.has_arrived = data, True
        fetch = self._fetches.get(reading.line)
        if fetch is None or reading not in fetch.reading:
            self._give_back(reading)

    def next_arrival(self, line: LineId) -> Arrival | None:
        """Return the line's next run of tokens; None when it has not come, or nothing follows.

        A record that could not be read ends the fetch: what is missing must be computed.
        """
        fetch = self._fetches.get(line)
        if fetch is None or not fetch.reading or not fetch.reading[0].has_arrived:
            return None
        reading = fetch.reading[0]
        if reading.data is None:
            self._end(line)
            return None
        record, generator = reading.record, self._model.generator
        payload = generator.unpack(record.num_tokens, reading.data)
        if record.end_position > fetch.end:
            payload = generator.cut(payload, 0, fetch.end - record.first_position)
        return Arrival(record, payload)

    def done(self, line: LineId) -> None:
        """Note that the last arrival was copied, and use its buffer for the next read."""
        self._give_back(self._fetches[line].reading.popleft())
        self.read_ahead(line)
        fetch = self._fetches.get(line)
        if fetch is not None and not fetch.reading and not fetch.to_read:
            self._end(line)

    def cancel(self, line: LineId) -> None:
        """End the line's fetch; what is still being read is dropped when it comes."""
        if line in self._fetches:
            self._end(line)

    def free_buffers(self) -> None:
        """Give the memory of idle buffers back to the pool."""
        while self._idle:
            self._pool.release(self._idle.pop().allocation)

    def holders(self) -> dict[Allocation, tuple[int, int]]:
        """Return what is allocated for buffers, read into or idle, for the pool's check."""
        waiting = {id(r.buffer): r.buffer for f in self._fetches.values() for r in f.reading}
        reading = {id(r.buffer): r.buffer for r in self._under_way}
        idle = {id(buffer): buffer for buffer in self._idle}
        buffers = {**waiting, **reading, **idle}
        return {b.allocation: (1, len(b.data)) for b in buffers.values()}

    def _end(self, line: LineId) -> None:
        for reading in self._fetches.pop(line).reading:
            if reading.has_arrived:
                self._give_back(reading)

    def _give_back(self, reading: _Reading) -> None:
        reading.data = None
        self._idle.append(reading.buffer)

    def _take_buffer(self, family: KVFamily, record: Record) -> _Buffer | None:
        nbytes = self._store.record_bytes(family, record.num_tokens)
        for buffer in self._idle:
            if len(buffer.data) >= nbytes:
                self._idle.remove(buffer)
                return buffer
        self.free_buffers()
        try:
            allocation = self._pool.allocate(Kind.READING, nbytes)
        except PoolExhausted:
            return None
        return _Buffer(bytearray(nbytes), allocation)
