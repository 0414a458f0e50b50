"""Which records lie on disk, how they follow one another, and which may be evicted first."""

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

from keepwarm.core.block import BlockHash, child_hash
from keepwarm.core.errors import InvariantBroken
from keepwarm.core.layout import BLOCK_TOKENS
from keepwarm.core.stored import AgentState, Record
from keepwarm.store.bulk import without_gc
from keepwarm.store.usage import Usage


@dataclass(slots=True, eq=False)
class Entry:
    """A record on disk, or on its way there; its bytes count against the agent `maker`."""

    record: Record
    file_bytes: int
    maker: str | None
    last_used: int
    is_saved: bool = True
    num_readers: int = 0


class RecordIndex:
    """Owns all records by hash, as a tree through `Record.before`. For the engines' thread.

    A record stays when the one before it is lost: it can be reached again once that is saved anew.
    """

    def __init__(self) -> None:
        self._entries: dict[BlockHash, Entry] = {}
        self._num_followers: Counter[BlockHash] = Counter()
        self._partial_stops: defaultdict[BlockHash, Counter[int]] = defaultdict(Counter)
        self._leaves: list[tuple[int, bytes]] | None = None
        self._made_bytes: Counter[str] = Counter()
        self.usage = Usage()
        self.num_bytes = 0
        self.clock = 0
        """The highest `last_used` that was ever committed."""

    def __repr__(self) -> str:
        return f"RecordIndex({len(self._entries)} records, {self.num_bytes:,} bytes)"

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def get(self, record_hash: BlockHash) -> Entry | None:
        return self._entries.get(record_hash)

    # -- finding ---------------------------------------------------------------------------------

    def plan(self, parent: BlockHash, token_ids: Sequence[int]) -> list[Entry]:
        """Return the records that follow `parent` and hold the first of `token_ids`, in order."""
        found: list[Entry] = []
        for start in range(0, len(token_ids), BLOCK_TOKENS):
            ids = token_ids[start : start + BLOCK_TOKENS]
            runs = self.runs_of_block(parent, ids)
            found += runs
            if not runs or runs[-1].record.stop < BLOCK_TOKENS:
                break
            parent = runs[-1].record.hash
        return found

    def num_stored(
        self,
        block_hashes: Sequence[BlockHash],
        tail_ids: Sequence[int],
        roots: Sequence[BlockHash],
    ) -> int:
        """Return how many of a line's first tokens are stored.

        The line is known by its whole blocks, and the ids behind them; `roots` are where it may
        begin.
        """
        whole = list(takewhile(self._chain, block_hashes))
        num_tokens = len(whole) * BLOCK_TOKENS
        if len(whole) < len(block_hashes):
            return num_tokens
        runs = (self.runs_of_block(parent, tail_ids) for parent in whole[-1:] or roots)
        return num_tokens + max((run[-1].record.stop for run in runs if run), default=0)

    def runs_of_block(self, parent: BlockHash, token_ids: Sequence[int]) -> list[Entry]:
        """Return the records that hold the most of one block's first tokens, in order."""
        if len(token_ids) == BLOCK_TOKENS:
            runs = self._chain(child_hash(parent, token_ids))
            if runs:
                return runs
        stops = self._partial_stops.get(parent, ())
        for stop in sorted((stop for stop in stops if stop <= len(token_ids)), reverse=True):
            runs = self._chain(child_hash(parent, token_ids[:stop]))
            if runs:
                return runs
        return []

    def _chain(self, record_hash: BlockHash) -> list[Entry]:
        """Return the record and those before it in its block; empty where one is missing."""
        runs: list[Entry] = []
        entry = self._entries.get(record_hash)
        while entry is not None:
            runs.append(entry)
            if entry.record.start == 0:
                return runs[::-1]
            entry = self._entries.get(entry.record.before)
        return []

    # -- changing --------------------------------------------------------------------------------

    def load(self, entries: Iterable[Entry]) -> None:
        """Enter the records of a store that is being opened."""
        with without_gc():
            for entry in entries:
                self._enter(entry)

    def use(self, state: AgentState) -> None:
        """Take an agent that was committed: its blocks were used when its lines were."""
        for line in state.lines:
            self.clock = max(self.clock, line.last_used)
            for block_hash in line.block_hashes:
                self.touch(block_hash, line.last_used)
        if self.usage.change(state):
            self._leaves = None  # what is no longer pinned may be anywhere in the tree

    def disuse(self, agent_id: str) -> list[Entry]:
        """Forget the records of a deleted agent: those that it made or used, and no other uses.

        What others use of it stays without a maker. Returns the forgotten ones.
        """
        hashes = self.usage.forget(agent_id)
        self._leaves = None  # what it had pinned may be anywhere in the tree
        made = [entry for entry in self if entry.maker == agent_id]
        for entry in made:
            self._disown(entry)
        used = [found for block_hash in hashes if (found := self.get(block_hash)) is not None]
        own = [e for e in {*made, *used} if not self.usage.is_used(e.record.hash)]
        own.sort(key=lambda entry: entry.record.stop, reverse=True)
        # No table names the beginning of a block that another agent went on with: followers do.
        return [
            entry
            for entry in own
            if entry.record.stop == BLOCK_TOKENS or entry.record.hash not in self._num_followers
            if self.forget(entry.record.hash)
        ]

    def _disown(self, entry: Entry) -> None:
        self._count(entry, -entry.file_bytes)
        entry.maker = None
        self._count(entry, entry.file_bytes)

    def add(self, entry: Entry) -> None:
        if entry.record.hash in self._entries:
            raise InvariantBroken(f"{entry.record} is stored already")
        self._enter(entry)
        self._offer(entry)

    def _enter(self, entry: Entry) -> None:
        record = entry.record
        self._entries[record.hash] = entry
        self._num_followers[record.before] += 1
        if record.stop < BLOCK_TOKENS:
            self._partial_stops[record.parent][record.stop] += 1
        self._count(entry, entry.file_bytes)

    def confirm(self, entry: Entry, file_bytes: int) -> None:
        """Note that the record is on disk, and what its file takes."""
        self._count(entry, file_bytes - entry.file_bytes)
        entry.file_bytes = file_bytes
        entry.is_saved = True
        self._offer(entry)

    def bytes_of(self, maker: str) -> int:
        """Return the bytes of the records that this agent made."""
        return self._made_bytes[maker]

    def _count(self, entry: Entry, nbytes: int) -> None:
        self.num_bytes += nbytes
        if entry.maker is not None:
            self._made_bytes[entry.maker] += nbytes

    def forget(self, record_hash: BlockHash) -> Entry | None:
        """Forget a record that is gone, or about to go. None: it was not known."""
        entry = self._entries.pop(record_hash, None)
        if entry is None:
            return None
        record = entry.record
        self._count(entry, -entry.file_bytes)
        self._num_followers[record.before] -= 1
        if not self._num_followers[record.before]:
            del self._num_followers[record.before]
            if (before := self._entries.get(record.before)) is not None:
                self._offer(before)
        if record.stop < BLOCK_TOKENS:
            self._forget_stop(record)
        return entry

    def _forget_stop(self, record: Record) -> None:
        stops = self._partial_stops[record.parent]
        stops[record.stop] -= 1
        if not stops[record.stop]:
            del stops[record.stop]
        if not stops:
            del self._partial_stops[record.parent]

    def touch(self, record_hash: BlockHash, last_used: int) -> None:
        entry = self._entries.get(record_hash)
        if entry is not None:
            entry.last_used = max(entry.last_used, last_used)

    def offer(self, record_hash: BlockHash) -> None:
        """Note that a reader, a user or a pin has gone: the record may be evicted now."""
        entry = self._entries.get(record_hash)
        if entry is not None:
            self._offer(entry)

    # -- evicting --------------------------------------------------------------------------------

    def choose_victims(self, needed_bytes: int) -> list[Entry]:
        """Forget records of `needed_bytes`: least recently used first, leaf before prefix.

        What is pinned, being read or being written stays, so it may be fewer bytes.
        """
        if self._leaves is None:
            self._leaves = [(e.last_used, e.record.hash) for e in self if self._is_evictable(e)]
            heapq.heapify(self._leaves)
        victims: list[Entry] = []
        freed = 0
        while freed < needed_bytes and self._leaves:
            last_used, record_hash = heapq.heappop(self._leaves)
            entry = self._entries.get(BlockHash(record_hash))
            if entry is None or not self._is_evictable(entry):
                continue
            if entry.last_used > last_used:
                self._offer(entry)
                continue
            self.forget(entry.record.hash)
            victims.append(entry)
            freed += entry.file_bytes
        return victims

    def choose_victims_of(self, maker: str, needed_bytes: int) -> list[Entry]:
        """Forget records of `needed_bytes` among those that one agent made, as `choose_victims`."""
        victims: list[Entry] = []
        freed = 0
        while freed < needed_bytes:
            own = [e for e in self if e.maker == maker and self._is_evictable(e)]
            if not own:
                break
            for entry in sorted(own, key=lambda e: e.last_used):
                if freed >= needed_bytes:
                    break
                self.forget(entry.record.hash)
                victims.append(entry)
                freed += entry.file_bytes
        return victims

    def _is_evictable(self, entry: Entry) -> bool:
        is_leaf = entry.record.hash not in self._num_followers
        is_idle = entry.is_saved and not entry.num_readers
        return is_leaf and is_idle and not self.usage.is_pinned(entry.record.hash, entry.maker)

    def _offer(self, entry: Entry) -> None:
        if self._leaves is not None and self._is_evictable(entry):
            heapq.heappush(self._leaves, (entry.last_used, entry.record.hash))

    def check(self) -> None:
        """Raise InvariantBroken unless sums and counts agree with the records."""
        entries = list(self)
        partial = Counter(
            (e.record.parent, e.record.stop) for e in entries if e.record.stop < BLOCK_TOKENS
        )
        made: Counter[str] = Counter()
        for entry in entries:
            made.update({entry.maker: entry.file_bytes} if entry.maker is not None else {})
        problems = {
            "the records' bytes": sum(e.file_bytes for e in entries) != self.num_bytes,
            "the makers' bytes": made != +self._made_bytes,
            "followers": Counter(e.record.before for e in entries) != self._num_followers,
            "unfinished blocks": partial != self._flat_stops(),
            "readers": any(e.num_readers < 0 for e in entries),
            "names": any(key != e.record.hash for key, e in self._entries.items()),
        }
        wrong = [name for name, is_wrong in problems.items() if is_wrong]
        if wrong:
            raise InvariantBroken(f"{self!r}: miscounted: {', '.join(wrong)}")
        self.usage.check()

    def _flat_stops(self) -> dict[tuple[BlockHash, int], int]:
        return {
            (parent, stop): count
            for parent, counts in self._partial_stops.items()
            for stop, count in counts.items()
        }
