"""What is to be written to disk, what is being written, and the memory that this holds."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from keepwarm.core.agent import AgentBlocks
from keepwarm.core.agent_store import RecordStore
from keepwarm.core.block import BlockHash, child_hash
from keepwarm.core.pool import Allocation, BlockPool, Kind
from keepwarm.core.ports import Payload
from keepwarm.core.stored import KVFamily, Record, Saved
from keepwarm.kv.generator_source import GeneratorSource


@dataclass(frozen=True, slots=True)
class Unsaved:
    """A block, whole or a line's tail, whose KV is to be written: `hash` names its last token.

    `tail_of` is the line when it is a tail; a whole block is found by its hash.
    """

    family: KVFamily
    hash: BlockHash
    parent: BlockHash
    depth: int
    token_ids: tuple[int, ...]
    maker: str | None
    tail_of: AgentBlocks | None = None


@dataclass(frozen=True, slots=True)
class Source:
    """Where an unsaved block's KV is: in memory that is paid for by `allocation`."""

    payload: Payload
    allocation: Allocation


@dataclass(frozen=True, slots=True)
class _Saving:
    unsaved: Unsaved
    source: Source


class SaveQueue:
    """Owns what waits to be saved, and retains the memory of what is on its way to the disk.

    Nothing waits for it: when the store's queue is full, blocks stay where they are and are offered
    again, or are evicted like any others.
    """

    def __init__(self, store: RecordStore, pool: BlockPool, model: GeneratorSource) -> None:
        self._store = store
        self._pool = pool
        self._model = model
        self._unsaved: dict[BlockHash, Unsaved] = {}
        self._saving: dict[BlockHash, _Saving] = {}

    def __repr__(self) -> str:
        return f"SaveQueue({len(self._unsaved)} to save, {len(self._saving)} on their way)"

    def __iter__(self) -> Iterator[Unsaved]:
        """What is still to be handed to the store, oldest first; may be dropped meanwhile."""
        return iter(list(self._unsaved.values()))

    @property
    def is_busy(self) -> bool:
        """Whether memory is held only until the disk has taken it."""
        return bool(self._saving)

    def __len__(self) -> int:
        return len(self._unsaved) + len(self._saving)

    def offer(self, unsaved: Unsaved) -> None:
        """Remember to save it, unless the store has it all."""
        is_stored = self._num_stored(unsaved) == len(unsaved.token_ids)
        if not is_stored and unsaved.hash not in self._saving:
            self._unsaved[unsaved.hash] = unsaved

    def drop(self, unsaved: Unsaved) -> None:
        """There is nothing to save any more."""
        self._unsaved.pop(unsaved.hash, None)

    def is_unsaved(self, block_hash: BlockHash) -> bool:
        """Whether memory is the only place of this block."""
        return block_hash in self._unsaved or block_hash in self._saving

    def num_missing(self, unsaved: Unsaved) -> int:
        """How many of its last tokens the store lacks."""
        return len(unsaved.token_ids) - self._num_stored(unsaved)

    def accepts(self, unsaved: Unsaved, num_tokens: int) -> bool:
        return self._store.accepts(self._store.record_bytes(unsaved.family, num_tokens))

    def save(self, unsaved: Unsaved, source: Source) -> None:
        """Hand over the last tokens, which the source's payload ends with.

        The source's allocation is released when the disk has it: it must have been retained for
        this.
        """
        start = len(unsaved.token_ids) - source.payload.num_tokens
        record = Record.of_run(unsaved.parent, unsaved.depth, unsaved.token_ids, start=start)
        del self._unsaved[unsaved.hash]
        self._saving[unsaved.hash] = saving = _Saving(unsaved, source)
        pieces = self._model.generator.pack(source.payload)
        answer = partial(self._take_saved, saving)
        self._store.save(unsaved.family, record, unsaved.token_ids, pieces, unsaved.maker, answer)

    def _take_saved(self, saving: _Saving, saved: Saved) -> None:
        """Release the memory that the store needs no more."""
        del self._saving[saving.unsaved.hash]
        self._pool.release(saving.source.allocation)
        if saved is Saved.REFUSED:
            self.offer(saving.unsaved)

    def holders(self) -> dict[Allocation, tuple[int, int]]:
        """What is retained here: how often, and the bytes of each."""
        held: dict[Allocation, tuple[int, int]] = {}
        for saving in self._saving.values():
            count, _ = held.get(saving.source.allocation, (0, 0))
            held[saving.source.allocation] = (count + 1, saving.source.payload.nbytes)
        return held

    def _num_stored(self, unsaved: Unsaved) -> int:
        return self._store.missing_from(unsaved.parent, unsaved.token_ids)


def staging(pool: BlockPool, nbytes: int) -> Allocation | None:
    """Memory for a copy out of a slab, if the pool has it to spare."""
    return pool.allocate(Kind.SAVING, nbytes) if pool.free_bytes >= nbytes else None


def tail_of(
    line: AgentBlocks, family: KVFamily, parent: BlockHash, token_ids: Sequence[int]
) -> Unsaved:
    """The line's last, unfinished block."""
    ids = tuple(token_ids)
    name = child_hash(parent, ids)
    return Unsaved(family, name, parent, len(line.blocks), ids, line.agent_id, line)
