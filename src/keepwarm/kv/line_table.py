"""The lines: which blocks each of them names, what tail it has, and how long it has rested."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

from keepwarm.core.agent import AgentBlocks, home_namespace
from keepwarm.core.block import Block, BlockHash, LineId, chain_hashes, child_hash
from keepwarm.core.errors import InvariantBroken
from keepwarm.core.layout import BLOCK_TOKENS, whole_blocks
from keepwarm.core.pool import Allocation, BlockPool, Kind
from keepwarm.core.ports import Payload, Slab
from keepwarm.core.prefix_index import PrefixIndex
from keepwarm.core.stored import KVFamily


class LineTable(Mapping[LineId, AgentBlocks]):
    """Owns the lines' tables and tails, and the index: a line names a block when it owns it there.

    It moves no KV: slabs are filled and emptied by `Tiers`, which tells it.
    """

    def __init__(self, pool: BlockPool, family: KVFamily, *, now: int) -> None:
        self.index = PrefixIndex(pool)
        self._pool = pool
        self._family = family
        self._families = {family.namespace: family}
        self._lines: dict[LineId, AgentBlocks] = {}
        self._next_line = 0
        self._now = now

    def __repr__(self) -> str:
        hot = sum(line.slab is not None for line in self._lines.values())
        return f"{len(self._lines)} lines, {hot} hot, {self.index!r}"

    def __getitem__(self, line: LineId) -> AgentBlocks:
        return self._lines[line]

    def __iter__(self) -> Iterator[LineId]:
        return iter(self._lines)

    def __len__(self) -> int:
        return len(self._lines)

    def new(self, agent_id: str | None = None, namespace: str | None = None) -> AgentBlocks:
        """`namespace` None is the agent's own."""
        self._next_line += 1
        if namespace is None:
            namespace = home_namespace(agent_id)
        line = AgentBlocks(LineId(self._next_line), agent_id, namespace=namespace)
        self._lines[line.line] = line
        self.touch(line)
        return line

    def touch(self, line: AgentBlocks) -> None:
        """The line was used just now."""
        self._now += 1
        line.last_used = self._now

    def catch_up(self, last_used: int) -> None:
        """What is used from now on was used after that."""
        self._now = max(self._now, last_used)

    def remove(self, line: AgentBlocks) -> None:
        """The line goes; it must have nothing any more."""
        del self._lines[line.line]

    @contextmanager
    def guarded(self, run: Sequence[Block]) -> Iterator[None]:
        """Nothing evicts these blocks meanwhile."""
        guard = self.new()
        guard.busy = True
        self.extend(guard, run)
        try:
            yield
        finally:
            for block in guard.blocks:
                self.index.disown(guard.line, block)
            self.remove(guard)

    # -- names -----------------------------------------------------------------------------------

    def family_of(self, namespace: str) -> KVFamily:
        """The model's KV in that namespace, which is a line's."""
        family = self._families.get(namespace)
        if family is None:
            family = self._families[namespace] = replace(self._family, namespace=namespace)
        return family

    def parent_of(self, line: AgentBlocks, depth: int) -> BlockHash:
        """The name of what comes before the line's block at this depth."""
        return line.blocks[depth - 1].hash if depth else self.family_of(line.namespace).root

    def end_of_table(self, line: AgentBlocks) -> BlockHash:
        """The name of what the line's table ends with."""
        return self.parent_of(line, len(line.blocks))

    def hashes_behind(self, line: AgentBlocks, token_ids: Sequence[int]) -> Iterator[BlockHash]:
        """The names of the whole blocks of `token_ids` that the line's table lacks."""
        start = len(line.blocks) * BLOCK_TOKENS
        return chain_hashes(self.end_of_table(line), token_ids[start:])

    # -- tables ----------------------------------------------------------------------------------

    def extend(self, line: AgentBlocks, run: Iterable[Block]) -> None:
        """The line's table names these blocks as well, which come next."""
        for block in run:
            self.index.retain(line.line, block)
            line.blocks.append(block)

    def name_whole_blocks(self, line: AgentBlocks) -> list[Block]:
        """The table names what has become whole in the slab, where others may find it."""
        named: list[Block] = []
        for start in range(len(line.blocks) * BLOCK_TOKENS, line.num_tokens, BLOCK_TOKENS):
            ids = line.token_ids[start : start + BLOCK_TOKENS]
            if len(ids) == BLOCK_TOKENS:
                name = child_hash(self.end_of_table(line), ids)
                block = self.index.enter_slab(line.line, len(line.blocks), name)
                line.blocks.append(block)
                named.append(block)
        return named

    def cut(self, line: AgentBlocks, depth: int) -> None:
        """The table ends before the block at `depth`, whatever the slab holds; the tail is gone.

        The ids are the caller's affair.
        """
        self.drop_tail(line)
        for block in line.blocks[depth:]:
            self.index.disown(line.line, block)
        del line.blocks[depth:]

    def cut_to_slab(self, line: AgentBlocks, depth: int) -> None:
        """The table ends before the block at `depth`, unless the slab holds that one."""
        self.cut(line, max(depth, whole_blocks(line.num_in_slab)))
        del line.token_ids[max(len(line.blocks) * BLOCK_TOKENS, line.num_in_slab) :]

    # -- tails -----------------------------------------------------------------------------------

    def set_tail(self, line: AgentBlocks, payload: Payload) -> None:
        line.tail_allocation = self._pool.allocate(Kind.TAIL, payload.nbytes)
        line.tail = payload

    def release_tail(self, line: AgentBlocks) -> None:
        """Its KV is in the slab now, or nobody's; the line's ids stay as they are."""
        if line.tail_allocation is not None:
            self._pool.release(line.tail_allocation)
            line.tail = line.tail_allocation = None

    def drop_tail(self, line: AgentBlocks) -> None:
        self.release_tail(line)
        del line.token_ids[line.num_tokens :]

    # -- the whole -------------------------------------------------------------------------------

    def slab_with(self, block: Block) -> Slab:
        """Some line's slab that holds the block."""
        return slab_of(self._lines[next(iter(block.slabs))])[0]

    def holders(self) -> dict[Allocation, tuple[int, int]]:
        """What is allocated for blocks, slabs and tails: how often, and the bytes of each."""
        holders = self.index.holders()
        for line in self._lines.values():
            if line.slab is not None and line.slab_allocation is not None:
                holders[line.slab_allocation] = (1, line.slab.nbytes)
            if line.tail is not None and line.tail_allocation is not None:
                holders[line.tail_allocation] = (1, line.tail.nbytes)
        return holders

    def check(self) -> None:
        """Every block in its places, and owners as the tables say."""
        self.index.check()
        for line in self._lines.values():
            line.check()
        named = {(line.line, block.hash) for line in self._lines.values() for block in line.blocks}
        owned = {(owner, block.hash) for block in self.index for owner in block.owners}
        if named != owned:
            raise InvariantBroken(f"{self!r}: tables and owners differ by {named ^ owned}")


def slab_of(line: AgentBlocks) -> tuple[Slab, Allocation]:
    if line.slab is None or line.slab_allocation is None:
        raise InvariantBroken(f"line {line.line} has no slab")
    return line.slab, line.slab_allocation


def lives_only_in(block: Block, line: AgentBlocks) -> bool:
    """Whether the line's slab is the only place of the block's KV."""
    return block.payload is None and block.slabs == {line.line}


@contextmanager
def busy(line: AgentBlocks) -> Iterator[None]:
    """Nothing demotes or evicts this line meanwhile."""
    was_busy, line.busy = line.busy, True
    try:
        yield
    finally:
        line.busy = was_busy


@contextmanager
def unpinned(line: AgentBlocks) -> Iterator[None]:
    """The line may be evicted meanwhile."""
    was_pinned, line.pinned = line.pinned, False
    try:
        yield
    finally:
        line.pinned = was_pinned
