"""The lines of one model: the blocks that each names, its slab, tail and ids, its age and pin."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from keepwarm.core.agent import AgentBlocks, home_namespace
from keepwarm.core.block import Block, BlockHash, LineId, chain_hashes, child_hash
from keepwarm.core.errors import InvariantBroken
from keepwarm.core.layout import BLOCK_TOKENS, whole_blocks
from keepwarm.core.pool import Allocation, BlockPool, Kind
from keepwarm.core.ports import Payload, Slab
from keepwarm.core.prefix_index import PrefixIndex
from keepwarm.core.stored import KVFamily
from keepwarm.kv.spare_slabs import PaidSlab


@dataclass(slots=True, eq=False)
class LineBlocks(AgentBlocks):
    """A line's blocks as the table writes them; others know them as `AgentBlocks`, to be read."""

    line: LineId = field()
    agent_id: str | None = None
    namespace: str = ""
    token_ids: list[int] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    slab: Slab | None = None
    slab_allocation: Allocation | None = None
    tail: Payload | None = None
    tail_allocation: Allocation | None = None
    last_used: int = 0
    pinned: bool = False
    is_held: bool = False


class LineTable(Mapping[LineId, AgentBlocks]):
    """Owns the lines: the only writer of their blocks, slabs, tails, ids, age, pin and hold.

    It moves no KV: `Tiers` and its parts fill and empty slabs, and tell it. A line names a block in
    its table exactly where the index has it as the block's owner.
    """

    def __init__(self, pool: BlockPool, index: PrefixIndex, family: KVFamily, *, now: int) -> None:
        self._pool = pool
        self._index = index
        self._family = family
        self._families = {family.namespace: family}
        self._lines: dict[LineId, LineBlocks] = {}
        self._next_line = 0
        self._now = now

    def __repr__(self) -> str:
        hot = sum(line.slab is not None for line in self._lines.values())
        return f"{len(self._lines)} lines, {hot} hot, {self._index!r}"

    def __getitem__(self, line: LineId) -> AgentBlocks:
        return self._lines[line]

    def __iter__(self) -> Iterator[LineId]:
        return iter(self._lines)

    def __len__(self) -> int:
        return len(self._lines)

    def new(self, agent_id: str | None = None, namespace: str | None = None) -> AgentBlocks:
        """Add an empty line. `namespace` None is the agent's own."""
        self._next_line += 1
        if namespace is None:
            namespace = home_namespace(agent_id)
        line = LineBlocks(LineId(self._next_line), agent_id, namespace)
        self._lines[line.line] = line
        self.touch(line)
        return line

    def remove(self, line: AgentBlocks) -> None:
        """Drop a line that holds nothing any more."""
        del self._lines[line.line]

    # -- age, pin and hold -----------------------------------------------------------------------

    def touch(self, line: AgentBlocks, *, as_of: int | None = None) -> None:
        """Note that the line was used just now, or give it back the age that it had before."""
        if as_of is None:
            self._now += 1
            as_of = self._now
        self._lines[line.line].last_used = as_of

    def catch_up(self, last_used: int) -> None:
        """Count on from another table's age: a line used from now on is younger than that."""
        self._now = max(self._now, last_used)

    def pin(self, line: AgentBlocks, *, pinned: bool = True) -> None:
        """Keep the line's blocks from being evicted, or let them be."""
        self._lines[line.line].pinned = pinned

    def hold(self, line: AgentBlocks) -> None:
        """Keep the line's KV where it is until `let_go`: it is not demoted and not evicted."""
        self._lines[line.line].is_held = True

    def let_go(self, line: AgentBlocks) -> None:
        self._lines[line.line].is_held = False

    @contextmanager
    def held(self, line: AgentBlocks) -> Iterator[None]:
        """Hold the line meanwhile, also where it is held already."""
        was_held = line.is_held
        self.hold(line)
        try:
            yield
        finally:
            self._lines[line.line].is_held = was_held

    @contextmanager
    def unpinned(self, line: AgentBlocks) -> Iterator[None]:
        """Let the line be evicted meanwhile."""
        was_pinned = line.pinned
        self.pin(line, pinned=False)
        try:
            yield
        finally:
            self.pin(line, pinned=was_pinned)

    @contextmanager
    def guarded(self, run: Sequence[Block]) -> Iterator[None]:
        """Keep these blocks from being evicted meanwhile: a line that is held names them, too."""
        guard = self.new()
        self.hold(guard)
        self.extend(guard, run, ())
        try:
            yield
        finally:
            self._cut(self._lines[guard.line], 0)
            self.remove(guard)

    # -- names -----------------------------------------------------------------------------------

    def family_of(self, namespace: str) -> KVFamily:
        """Return the family that the model's KV in this namespace belongs to."""
        family = self._families.get(namespace)
        if family is None:
            family = self._families[namespace] = replace(self._family, namespace=namespace)
        return family

    def parent_of(self, line: AgentBlocks, depth: int) -> BlockHash:
        """Return the name of what precedes the line's block at this depth."""
        return line.blocks[depth - 1].hash if depth else self.family_of(line.namespace).root

    def end_of_table(self, line: AgentBlocks) -> BlockHash:
        """Return the name of what the line's table ends with."""
        return self.parent_of(line, len(line.blocks))

    def longest_run(self, line: AgentBlocks, token_ids: Sequence[int]) -> list[Block]:
        """Return the blocks in memory that a line of this namespace with these ids would name."""
        return self._index.longest_run(chain_hashes(self.parent_of(line, 0), token_ids))

    def run_behind(self, line: AgentBlocks, token_ids: Sequence[int]) -> list[Block]:
        """Return the blocks of `longest_run` that follow the line's table."""
        start = len(line.blocks) * BLOCK_TOKENS
        return self._index.longest_run(chain_hashes(self.end_of_table(line), token_ids[start:]))

    # -- tables and ids --------------------------------------------------------------------------

    def extend(self, line: AgentBlocks, run: Iterable[Block], token_ids: Sequence[int]) -> None:
        """Let the line's table name these blocks, which come next; `token_ids` are the line's."""
        own = self._lines[line.line]
        for block in run:
            self._index.retain(line.line, block)
            own.blocks.append(block)
        own.token_ids = list(token_ids[: line.num_tokens])

    def append(self, line: AgentBlocks, token_ids: Sequence[int]) -> None:
        """Note that the slab holds the KV of these ids as well now."""
        self._lines[line.line].token_ids.extend(token_ids)

    def name_whole_blocks(self, line: AgentBlocks) -> list[Block]:
        """Name the blocks that have become whole in the slab, where others may find them."""
        own, named = self._lines[line.line], []
        # Asked for every token of every row: nearly always the answer is no.
        while len(own.token_ids) >= (len(own.blocks) + 1) * BLOCK_TOKENS:
            start = len(own.blocks) * BLOCK_TOKENS
            name = child_hash(self.end_of_table(own), own.token_ids[start : start + BLOCK_TOKENS])
            block = self._index.enter_slab(own.line, len(own.blocks), name)
            own.blocks.append(block)
            named.append(block)
        return named

    def cut(self, line: AgentBlocks, depth: int) -> None:
        """End the table before the block at `depth`, whatever the slab holds; drop the tail.

        The ids stay until the slab was trimmed as well: see `trim_ids`.
        """
        self._cut(self._lines[line.line], depth)

    def cut_to_slab(self, line: AgentBlocks, depth: int) -> None:
        """End the table before the block at `depth`, but keep what the slab holds."""
        own = self._lines[line.line]
        self._cut(own, max(depth, whole_blocks(own.num_in_slab)))
        del own.token_ids[max(len(own.blocks) * BLOCK_TOKENS, own.num_in_slab) :]

    def trim_ids(self, line: AgentBlocks) -> None:
        """Forget the ids that have no KV any more."""
        del self._lines[line.line].token_ids[line.num_tokens :]

    def _cut(self, own: LineBlocks, depth: int) -> None:
        self.drop_tail(own)
        for block in own.blocks[depth:]:
            self._index.disown(own.line, block)
        del own.blocks[depth:]

    # -- slabs -----------------------------------------------------------------------------------

    def put_slab(self, line: AgentBlocks, slab: PaidSlab) -> None:
        """Give a line without a slab this one, which is empty."""
        own = self._lines[line.line]
        own.slab, own.slab_allocation = slab.slab, slab.allocation

    def replace_slab(self, line: AgentBlocks, slab: Slab) -> None:
        """Give the line a larger slab with the KV of its old one, paid for by the same bytes."""
        self._lines[line.line].slab = slab

    def enter_slab(self, line: AgentBlocks, blocks: Iterable[Block]) -> None:
        """Note that the line's slab holds copies of these blocks of its table now."""
        for block in blocks:
            block.slabs.add(line.line)

    def take_slab(self, line: AgentBlocks) -> PaidSlab:
        """Take the line's slab away; its table still names the blocks that were in it."""
        own, paid = self._lines[line.line], paid_slab_of(line)
        own.slab = own.slab_allocation = None
        for block in own.blocks:
            if line.line in block.slabs:
                self._index.leave_slab(line.line, block)
        return paid

    def slab_with(self, block: Block) -> Slab:
        """Return some line's slab that holds the block."""
        return slab_of(self._lines[next(iter(block.slabs))])

    # -- tails -----------------------------------------------------------------------------------

    def set_tail(self, line: AgentBlocks, payload: Payload, token_ids: Sequence[int]) -> None:
        """Give the line a tail; `token_ids` are the line's, those of the tail last.

        Raises PoolExhausted; nothing has changed then.
        """
        own = self._lines[line.line]
        own.tail_allocation = self._pool.allocate(Kind.TAIL, payload.nbytes)
        own.tail = payload
        own.token_ids = list(token_ids[: own.num_tokens])

    def release_tail(self, line: AgentBlocks) -> None:
        """Free the tail, whose KV is in the slab now; the line's ids stay as they are."""
        own = self._lines[line.line]
        if own.tail_allocation is not None:
            self._pool.release(own.tail_allocation)
            own.tail = own.tail_allocation = None

    def drop_tail(self, line: AgentBlocks) -> None:
        """Forget the tail and its ids."""
        self.release_tail(line)
        self.trim_ids(line)

    # -- the whole -------------------------------------------------------------------------------

    def holders(self) -> dict[Allocation, tuple[int, int]]:
        """Return what is allocated for blocks, slabs and tails: how often, and the bytes."""
        holders = self._index.holders()
        for line in self._lines.values():
            if line.slab is not None and line.slab_allocation is not None:
                holders[line.slab_allocation] = (1, line.slab.nbytes)
            if line.tail is not None and line.tail_allocation is not None:
                holders[line.tail_allocation] = (1, line.tail.nbytes)
        return holders

    def check(self) -> None:
        """Raise InvariantBroken unless blocks are in their places and tables and owners agree."""
        self._index.check()
        for line in self._lines.values():
            line.check()
        named = {(line.line, block.hash) for line in self._lines.values() for block in line.blocks}
        owned = {(owner, block.hash) for block in self._index for owner in block.owners}
        if named != owned:
            raise InvariantBroken(f"{self!r}: tables and owners differ by {named ^ owned}")


def slab_of(line: AgentBlocks) -> Slab:
    """Return the slab of a line that must have one. Raises InvariantBroken."""
    return paid_slab_of(line).slab


def paid_slab_of(line: AgentBlocks) -> PaidSlab:
    """Return a line's slab with the bytes that it occupies. Raises InvariantBroken."""
    if line.slab is None or line.slab_allocation is None:
        raise InvariantBroken(f"line {line.line} has no slab")
    return PaidSlab(line.slab, line.slab_allocation)


def lives_only_in(block: Block, line: AgentBlocks) -> bool:
    """Whether the line's slab is the only place of the block's KV."""
    return block.payload is None and block.slabs == {line.line}
