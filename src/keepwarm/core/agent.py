"""AgentBlocks: what a line holds of its KV, and where."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from keepwarm.core.block import Block, LineId
from keepwarm.core.errors import InvariantBroken
from keepwarm.core.layout import BLOCK_TOKENS
from keepwarm.core.pool import Allocation
from keepwarm.core.ports import Payload, Slab

PRIVATE = "import:"
"""How the namespace of an imported line begins, which nobody shares until it is verified."""


def home_namespace(agent_id: str | None) -> str:
    """Where an agent's KV belongs: what stands before the slash in its name, if there is one."""
    owner, slash, _ = (agent_id or "").partition("/")
    return owner if slash else ""


def in_namespace(namespace: str, agent_id: str) -> str:
    """The same agent's name in that namespace, whatever namespace it had."""
    bare = agent_id.rpartition("/")[2]
    return f"{namespace}/{bare}" if namespace else bare


class Tier(StrEnum):
    """Where a line's KV is: in a slab, in blocks in RAM, in records on disk, or nowhere.

    What is nowhere must be prefilled. A line itself knows only of slab and RAM: what lies on disk
    is found there by content.
    """

    HOT = "hot"
    WARM = "warm"
    COLD = "cold"
    NONE = "none"


@dataclass(slots=True, eq=False)
class AgentBlocks:
    """A line's block table: ordered blocks, tail and the exact token ids that they hold.

    Hot: `slab` holds the KV of all `token_ids`, and `blocks` names its whole blocks. Warm: `blocks`
    and then `tail` hold it. A hot line that is being restored still has in blocks and tail what
    lies behind its slab. Lines share blocks with lines of the same `namespace` only.
    """

    line: LineId
    agent_id: str | None = None
    token_ids: list[int] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    slab: Slab | None = None
    slab_allocation: Allocation | None = None
    tail: Payload | None = None
    tail_allocation: Allocation | None = None
    last_used: int = 0
    busy: bool = False
    pinned: bool = False
    namespace: str = ""

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
    def evictable(self) -> bool:
        return not (self.busy or self.pinned)

    def check(self) -> None:
        """The table agrees with itself."""
        if len(self.token_ids) != self.num_tokens:
            raise InvariantBroken(
                f"line {self.line}: {len(self.token_ids)} ids for {self.num_tokens} tokens of KV"
            )
        if (self.slab is None) != (self.slab_allocation is None):
            raise InvariantBroken(f"line {self.line}: a slab without bytes, or the reverse")
        if (self.tail is None) != (self.tail_allocation is None):
            raise InvariantBroken(f"line {self.line}: a tail without bytes, or the reverse")
        if self.num_to_restore and not self.busy:
            raise InvariantBroken(f"line {self.line}: rests with {self.num_to_restore} to restore")
        self._check_table(self.blocks)

    def _check_table(self, blocks: Sequence[Block]) -> None:
        for depth, block in enumerate(blocks):
            if block.depth != depth or self.line not in block.owners:
                raise InvariantBroken(f"line {self.line}: {block} is not its block {depth}")
        if self.slab is not None:
            in_slab = self.slab.num_tokens // BLOCK_TOKENS
            held = [block for block in blocks if self.line in block.slabs]
            if held != blocks[:in_slab]:
                raise InvariantBroken(
                    f"line {self.line}: its slab holds {in_slab} blocks, the index says {len(held)}"
                )
