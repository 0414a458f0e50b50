"""KV to be written to disk, KV that is being written, and the memory that this retains."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from keepwarm.core.agent import AgentBlocks
from keepwarm.core.agent_store import RecordStore
from keepwarm.core.block import Block, BlockHash, LineId, child_hash
from keepwarm.core.layout import BLOCK_TOKENS, whole_blocks
from keepwarm.core.pool import Allocation
from keepwarm.core.ports import Payload
from keepwarm.core.stored import KVFamily, Record, Saved
from keepwarm.kv.memory import Memory


@dataclass(frozen=True, slots=True)
class Unsaved:
    """A block, whole or a line's tail, whose KV is to be written: `hash` names its last token.

    `tail_of` is the line when it is a tail; a whole block is found by its hash. `maker` is the
    agent that computed it, whose quota it counts against.
    """

    family: KVFamily
    hash: BlockHash
    parent: BlockHash
    depth: int
    token_ids: tuple[int, ...]
    maker: str | None
    tail_of: AgentBlocks | None = None


@dataclass(frozen=True, slots=True)
class PaidPayload:
    """KV in memory, and the allocation that pays for it."""

    payload: Payload
    allocation: Allocation


@dataclass(frozen=True, slots=True)
class _Saving:
    unsaved: Unsaved
    source: PaidPayload


class SaveQueue:
    """Owns what waits to be saved, and retains the memory of what is on its way to the disk.

    Nothing waits for it: when the store's queue is full, blocks stay where they are and are offered
    again, or are evicted like any others.
    """

    def __init__(self, memory: Memory, store: RecordStore) -> None:
        self._memory = memory
        self._store = store
        self._unsaved: dict[BlockHash, Unsaved] = {}
        self._saving: dict[BlockHash, _Saving] = {}

    def __repr__(self) -> str:
        return f"SaveQueue({len(self._unsaved)} to save, {len(self._saving)} on their way)"

    def __iter__(self) -> Iterator[Unsaved]:
        """Yield what is still to be handed to the store, oldest first; it may be dropped then."""
        return iter(list(self._unsaved.values()))

    def __len__(self) -> int:
        return len(self._unsaved) + len(self._saving)

    @property
    def is_busy(self) -> bool:
        """Whether memory is held only until the disk has taken it."""
        return bool(self._saving)

    # -- what is to be saved ---------------------------------------------------------------------

    def offer_block(self, line: AgentBlocks, block: Block) -> None:
        """Have this block of the line's table saved."""
        start = block.depth * BLOCK_TOKENS
        ids = tuple(line.token_ids[start : start + BLOCK_TOKENS])
        parent = self._memory.lines.parent_of(line, block.depth)
        family = self._memory.lines.family_of(line.namespace)
        self._offer(Unsaved(family, block.hash, parent, block.depth, ids, line.agent_id))

    def offer_whole_blocks(self, line: AgentBlocks) -> None:
        """Name the blocks that have become whole in the slab, and have them saved."""
        for block in self._memory.lines.name_whole_blocks(line):
            self.offer_block(line, block)

    def offer_tail(self, line: AgentBlocks) -> None:
        """Have the line's unfinished block saved, as far as it goes."""
        tail = self._tail_of(line, len(line.blocks), line.num_tokens)
        if tail is not None:
            self._offer(tail)

    def offer_tails(self) -> None:
        """Have every line's unfinished block saved, as before a shutdown."""
        for line in self._memory.lines.values():
            self.offer_tail(line)

    def offer_line(self, line: AgentBlocks) -> None:
        """Have all of the line's KV saved that the store lacks."""
        for block in line.blocks:
            self.offer_block(line, block)
        self.offer_tail(line)

    def offer_first(self, line: AgentBlocks, num_tokens: int) -> list[BlockHash]:
        """Have the KV of the line's first tokens saved that the store lacks, while the line runs.

        Returns the names under which `is_unsaved` knows it until the store has it.
        """
        whole = line.blocks[: whole_blocks(num_tokens)]
        for block in whole:
            self.offer_block(line, block)
        names = [block.hash for block in whole]
        part = self._tail_of(line, len(whole), num_tokens)
        if part is not None:
            self._offer(part)
            names.append(part.hash)
        return names

    def drop(self, unsaved: Unsaved) -> None:
        """Forget it: memory does not have it any more, or the store has all of it."""
        self._unsaved.pop(unsaved.hash, None)

    # -- questions -------------------------------------------------------------------------------

    def is_unsaved(self, block_hash: BlockHash) -> bool:
        """Whether this block waits to be saved, or is on its way."""
        return block_hash in self._unsaved or block_hash in self._saving

    def has_unsaved(self, line: AgentBlocks) -> bool:
        """Whether a part of the line waits to be saved, or is on its way."""
        names = [block.hash for block in line.blocks]
        tail = self._tail_of(line, len(names), line.num_tokens)
        if tail is not None:
            names.append(tail.hash)
        return any(self.is_unsaved(name) for name in names)

    def lines_with_unsaved(self) -> set[LineId]:
        """Return the lines that have KV in memory only."""
        lines: set[LineId] = set()
        for unsaved in self._unsaved.values():
            if unsaved.tail_of is not None:
                lines.add(unsaved.tail_of.line)
            elif (block := self._memory.index.get(unsaved.hash)) is not None:
                lines |= block.owners
        return lines

    def stored_tokens(self, token_ids: Sequence[int], namespace: str = "") -> int:
        """Return how many of the first tokens the store has the KV of."""
        family = self._memory.lines.family_of(namespace)
        records = self._store.plan(family, family.root, token_ids)
        return records[-1].end_position if records else 0

    def num_missing(self, unsaved: Unsaved) -> int:
        """Return how many of its last tokens the store lacks."""
        return len(unsaved.token_ids) - self._num_stored(unsaved)

    def accepts(self, unsaved: Unsaved, num_tokens: int) -> bool:
        """Whether the store's own queue has room for its last `num_tokens` now."""
        return self._store.accepts(self._store.record_bytes(unsaved.family, num_tokens))

    # -- on the way ------------------------------------------------------------------------------

    def save(self, unsaved: Unsaved, source: PaidPayload) -> None:
        """Hand the last tokens to the store: those that the source's payload holds.

        The caller has retained the source's allocation; it is released when the disk has the bytes.
        """
        start = len(unsaved.token_ids) - source.payload.num_tokens
        record = Record.of_run(unsaved.parent, unsaved.depth, unsaved.token_ids, start=start)
        del self._unsaved[unsaved.hash]
        self._saving[unsaved.hash] = saving = _Saving(unsaved, source)
        pieces = self._memory.model.generator.pack(source.payload)
        answer = partial(self._take_saved, saving)
        self._store.save(unsaved.family, record, unsaved.token_ids, pieces, unsaved.maker, answer)

    def _take_saved(self, saving: _Saving, saved: Saved) -> None:
        """Release the memory that the store needs no more; offer the KV again where it refused."""
        del self._saving[saving.unsaved.hash]
        self._memory.pool.release(saving.source.allocation)
        if saved is Saved.REFUSED:
            self._offer(saving.unsaved)

    def holders(self) -> dict[Allocation, tuple[int, int]]:
        """Return what is retained here: how often, and the bytes of each."""
        held: dict[Allocation, tuple[int, int]] = {}
        for saving in self._saving.values():
            count, _ = held.get(saving.source.allocation, (0, 0))
            held[saving.source.allocation] = (count + 1, saving.source.payload.nbytes)
        return held

    # -- inside ----------------------------------------------------------------------------------

    def _offer(self, unsaved: Unsaved) -> None:
        if self.num_missing(unsaved) and unsaved.hash not in self._saving:
            self._unsaved[unsaved.hash] = unsaved

    def _num_stored(self, unsaved: Unsaved) -> int:
        return self._store.missing_from(unsaved.parent, unsaved.token_ids)

    def _tail_of(self, line: AgentBlocks, depth: int, num_tokens: int) -> Unsaved | None:
        """Return the line's ids from the block at `depth` on, up to `num_tokens`; None: there are
        none.
        """
        ids = tuple(line.token_ids[depth * BLOCK_TOKENS : num_tokens])
        if not ids:
            return None
        family, parent = (
            self._memory.lines.family_of(line.namespace),
            self._memory.lines.parent_of(line, depth),
        )
        name = child_hash(parent, ids)
        return Unsaved(family, name, parent, depth, ids, line.agent_id, tail_of=line)
