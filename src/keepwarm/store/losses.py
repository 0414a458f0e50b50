"""What an agent loses when the disk never takes its last changes."""

from dataclasses import dataclass

from keepwarm.core.block import common_prefix
from keepwarm.core.errors import InvariantBroken
from keepwarm.core.stored import AgentState, LineState
from keepwarm.store.catalog.plan import common_start
from keepwarm.store.changes import Change


@dataclass(frozen=True, slots=True)
class Loss:
    """The turns, and tokens of the main line, that the disk does not have of an agent.

    Neither: its settings changed, or turns were taken back. `is_whole`: the disk has nothing of it.
    """

    agent_id: str
    num_turns: int
    num_tokens: int
    is_whole: bool

    def __str__(self) -> str:
        turns = "1 turn" if self.num_turns == 1 else f"{self.num_turns} turns"
        what = f"{turns} and {self.num_tokens:,} tokens"
        if self.is_whole:
            what = f"all of it, {what}"
        elif not (self.num_turns or self.num_tokens):
            what = "its last change (of settings, or a rollback)"
        return f"agent {self.agent_id!r}: {what}"


def loss_of(change: Change, committed: AgentState | None) -> Loss:
    """Return what the change has and the committed state, if there is one, does not."""
    if change.state is None:
        raise InvariantBroken(f"a deletion of {change.agent_id!r} is nothing to lose")
    main = _last_main(change.state)
    if committed is None:
        return Loss(change.agent_id, len(main.turns), main.transcript.num_tokens, is_whole=True)
    former = _last_main(committed)
    num_turns = len(main.turns) - common_start(main.turns, former.turns)
    ids = main.transcript.token_ids
    num_kept = 0
    if main.tokenizer == former.tokenizer:
        num_kept = common_prefix(ids, former.transcript.token_ids)
    return Loss(change.agent_id, num_turns, len(ids) - num_kept, is_whole=False)


def _last_main(state: AgentState) -> LineState:
    """Return the main line in the tokenizer that it was used with last."""
    return max(state.mains, key=lambda line: (line.last_used, len(line.turns)))
