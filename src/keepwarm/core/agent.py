"""AgentBlocks: what a line holds of its KV, and where."""

from collections.abc import Sequence
from enum import StrEnum
from typing import Protocol

from keepwarm.core.block import Block, LineId
from keepwarm.core.errors import InvariantBroken
from keepwarm.core.layout import BLOCK_TOKENS
from keepwarm.core.pool import Allocation
from keepwarm.core.ports import Payload, Slab

PRIVATE = "import:"
"""How the namespace of an imported line begins, which no other line shares until it is verified."""


def home_namespace(agent_id: str | None) -> str:
    """Return the namespace of an agent's KV: what stands before the slash in its name, if any."""
    owner, slash, _ = (agent_id or "").partition("/")
    return owner if slash else ""


def in_namespace(namespace: str, agent_id: str) -> str:
    """Return the agent's name in that namespace, whatever namespace it had."""
    bare = agent_id.rpartition("/")[2]
    return f"{namespace}/{bare}" if namespace else bare


class Tier(StrEnum):
    """Where a line's KV is: in a slab, in blocks in RAM, in records on disk, or nowhere.

    KV that is nowhere must be prefilled. A line itself knows only of slab and RAM: records on disk
    are found there by content.
    """

    HOT = "hot"
    WARM = "warm"
    COLD = "cold"
    NONE = "none"


class AgentBlocks(Protocol):
    """A line's block table: ordered blocks, tail and the exact token ids that they hold.

    Hot: `slab` holds the KV of all `token_ids`, and `blocks` names its whole blocks. Warm: `blocks`
    and then `tail` hold it. A hot line that is being restored still has in blocks and tail what
    lies behind its slab. Lines share blocks with lines of the same `namespace` only.

    Only the `LineTable` that made it (kv/line_table.py) writes it; for all others it is read-only.
    """

    @property
    def line(self) -> LineId: ...

    @property
    def agent_id(self) -> str | None: ...

    @property
    def namespace(self) -> str: ...

    @property
    def token_ids(self) -> Sequence[int]: ...

    @property
    def blocks(self) -> Sequence[Block]: ...

    @property
    def slab(self) -> Slab | None: ...

    @property
    def slab_allocation(self) -> Allocation | None: ...

    @property
    def tail(self) -> Payload | None: ...

    @property
    def tail_allocation(self) -> Allocation | None: ...

    @property
    def last_used(self) -> int:
        """The table's count of uses when this line was used last: it orders lines by age."""
        ...

    @property
    def pinned(self) -> bool:
        """Whether its blocks may not be evicted; its slab may still become blocks."""
        ...

    @property
    def is_held(self) -> bool:
        """Whether its KV must stay where it is: a row, a cold run or a move is using it."""
        ...

    @property
    def is_private(self) -> bool:
        """Whether its KV was imported and is not verified yet."""
        return self.namespace.startswith(PRIVATE)

    @property
    def tier(self) -> Tier:
        if self.slab is not None:
            return Tier.HOT
        return Tier.WARM if self.blocks or self.tail is not None else Tier.NONE

    @property
    def num_tokens(self) -> int:
        """How many leading tokens have KV here, in the slab or in blocks and tail."""
        in_blocks = len(self.blocks) * BLOCK_TOKENS + (self.tail.num_tokens if self.tail else 0)
        return max(self.num_in_slab, in_blocks)

    @property
    def num_in_slab(self) -> int:
        return self.slab.num_tokens if self.slab is not None else 0

    @property
    def num_to_restore(self) -> int:
        """How many tokens of a hot line are in blocks and tail, and not in the slab yet."""
        return self.num_tokens - self.num_in_slab if self.slab is not None else 0

    @property
    def is_resting(self) -> bool:
        """Whether it has a slab that nothing uses: one that may become blocks."""
        return self.slab is not None and not self.is_held

    @property
    def evictable(self) -> bool:
        return not (self.is_held or self.pinned)

    def check(self) -> None:
        """Raise InvariantBroken unless the table agrees with itself."""
        if len(self.token_ids) != self.num_tokens:
            raise InvariantBroken(
                f"line {self.line}: {len(self.token_ids)} ids for {self.num_tokens} tokens of KV"
            )
        if (self.slab is None) != (self.slab_allocation is None):
            raise InvariantBroken(f"line {self.line}: a slab without bytes, or the reverse")
        if (self.tail is None) != (self.tail_allocation is None):
            raise InvariantBroken(f"line {self.line}: a tail without bytes, or the reverse")
        if self.num_to_restore and not self.is_held:
            raise InvariantBroken(f"line {self.line}: rests with {self.num_to_restore} to restore")
        self._check_table()

    def _check_table(self) -> None:
        for depth, block in enumerate(self.blocks):
            if block.depth != depth or self.line not in block.owners:
                raise InvariantBroken(f"line {self.line}: {block} is not its block {depth}")
        if self.slab is not None:
            in_slab = self.slab.num_tokens // BLOCK_TOKENS
            held = [block for block in self.blocks if self.line in block.slabs]
            if held != list(self.blocks[:in_slab]):
                raise InvariantBroken(
                    f"line {self.line}: its slab holds {in_slab} blocks, the index says {len(held)}"
                )
