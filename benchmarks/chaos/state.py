"""An agent in plain values, as the process that is killed and the one that verifies speak of it."""

from typing import Any

from keepwarm.core.events import Completed
from keepwarm.core.ports import Detokenizer
from keepwarm.core.stored import AgentState
from keepwarm.engine.agents import agent_state
from keepwarm.engine.batch_engine import BlockPoolBatchEngine

State = dict[str, Any]
"""An agent's main line: `ids`, `messages` (None for one that is told ids) and `turns`."""


def state_of(engine: BlockPoolBatchEngine, name: str) -> State:
    """Return an agent as it would be stored now."""
    return plain_state(agent_state.state_of(engine.book.get(name)))


def submitted(engine: BlockPoolBatchEngine, request_id: str) -> tuple[list[int], int]:
    """Return the prompt's ids of a request that was just submitted, and its `max_tokens`."""
    sequence = engine._turns.active[request_id].sequence
    return list(sequence.prompt_ids), sequence.max_tokens


def plain_state(state: AgentState) -> State:
    """Return the main line. A turn is its tokens and the number of its messages."""
    main = next(line for line in state.lines if line.number == 0)
    return {
        "ids": list(main.transcript.token_ids),
        "messages": None if main.messages is None else [dict(m) for m in main.messages],
        "turns": [
            [turn.num_tokens, None if turn.messages is None else len(turn.messages)]
            for turn in main.turns
        ],
    }


def kept_ids(completed: Completed, detokenizer: Detokenizer, *, is_of_ids: bool) -> tuple[int, ...]:
    """Return the reply's ids as its line remembers them: after messages, the ids of its text."""
    if is_of_ids:
        return completed.token_ids
    text, num_kept = "", 0
    while text != completed.text:
        text += detokenizer.push(completed.token_ids[num_kept])
        num_kept += 1
    return completed.token_ids[:num_kept]


def after_turns(state: State, num_turns: int) -> State:
    """Return the agent as it was after the first `num_turns` of its turns."""
    if num_turns == 0:
        return {"ids": [], "messages": [], "turns": []}
    num_tokens, num_messages = state["turns"][num_turns - 1]
    return {
        "ids": state["ids"][:num_tokens],
        "messages": None if num_messages is None else state["messages"][:num_messages],
        "turns": state["turns"][:num_turns],
    }
