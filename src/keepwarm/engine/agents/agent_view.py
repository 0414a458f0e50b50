"""AgentView: an agent as people see it, in memory or on the disk."""

from dataclasses import dataclass, replace

from keepwarm.core.agent import Tier
from keepwarm.core.stored import AgentSummary
from keepwarm.engine.agents.agent import Agent


@dataclass(frozen=True, slots=True)
class AgentView:
    """An agent as people see it, where it is. `num_tokens` is its context in that model's ids.

    `held_tokens` need no prefill. `slab_bytes` is 0 unless it is hot; bytes of shared blocks are
    the pool's affair. `is_here`: it is in memory; of an agent that is on the disk only, what the
    disk holds is still to be counted. `is_private`: it was imported, and its KV is not verified
    yet. `model`: as an agent's. `damage`: why it cannot be read; what else is said of it means
    nothing then.
    """

    agent_id: str
    tier: Tier
    num_tokens: int
    held_tokens: int
    slab_bytes: int
    num_turns: int
    num_side_lines: int
    in_use: bool
    pinned: bool
    is_private: bool = False
    model: str = ""
    damage: str = ""
    is_here: bool = True

    def holding(self, num_stored: int) -> "AgentView":
        """Return the view with how many tokens of the main line the disk holds."""
        tier = Tier.COLD if num_stored else Tier.NONE
        return replace(self, tier=tier, held_tokens=num_stored)


def view_of(agent: Agent) -> AgentView:
    """Return the view of an agent that is in memory."""
    blocks = agent.main.blocks
    token_ids = agent.main.transcript.token_ids
    num_held = blocks.num_tokens
    stored_tokens = agent.place.tiers.saves.stored_tokens
    is_all_held = num_held >= len(token_ids) - 1
    num_stored = 0 if is_all_held else stored_tokens(token_ids, blocks.namespace)
    return AgentView(
        agent_id=agent.agent_id,
        tier=Tier.COLD if num_stored > num_held else blocks.tier,
        num_tokens=len(token_ids),
        held_tokens=max(num_held, num_stored),
        slab_bytes=blocks.slab.nbytes if blocks.slab else 0,
        num_turns=len(agent.turns),
        num_side_lines=len(agent.sides),
        in_use=agent.in_use,
        pinned=blocks.pinned,
        is_private=blocks.is_private,
        model=agent.model,
    )


def view_of_summary(summary: AgentSummary) -> AgentView:
    """Return the view of an agent that is on the disk only."""
    return AgentView(
        agent_id=summary.agent_id,
        tier=Tier.COLD,
        num_tokens=summary.num_tokens,
        held_tokens=0,
        slab_bytes=0,
        num_turns=summary.num_turns,
        num_side_lines=summary.num_lines - 1,
        in_use=False,
        pinned=summary.settings.pinned,
        is_private=summary.is_private,
        model=summary.model,
        is_here=False,
        damage=summary.damage,
    )
