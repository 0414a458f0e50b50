"""What is committed of an agent, how it comes back, and what changes when it changes models."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from keepwarm.core.block import BlockHash, chain_hashes
from keepwarm.core.layout import BLOCK_TOKENS, whole_blocks
from keepwarm.core.stored import AgentState, LineState
from keepwarm.core.transcript import EMPTY, Turn
from keepwarm.engine.agents.agent import Agent, Line, Place


def state_of(agent: Agent) -> AgentState:
    """Return the agent as it is committed, in the ids of every tokenizer that knows of it.

    A running line is stored as it was before its request; a new one is left out.
    """
    lines = sorted(_states(agent), key=lambda line: line.key)
    return AgentState(
        agent.agent_id,
        agent.settings,
        tuple(lines),
        agent.model,
        has_fixed_main=agent.has_fixed_main,
    )


def agent_of(state: AgentState, place: Place) -> Agent:
    """Return the agent at this place, with what was said last on its lines in any tokenizer's ids.

    What was said in another tokenizer's ids gets its ids here with the next prompt.
    """
    main, *sides = [_line(states, state.agent_id, place) for states in _conversations(state.lines)]
    place.tiers.pin(main.blocks, pinned=state.settings.pinned)
    return Agent(
        state.agent_id,
        place,
        main,
        sides,
        state.settings,
        model=state.model,
        has_fixed_main=state.has_fixed_main,
    )


def line_at(agent: Agent, line: Line, place: Place) -> Line:
    """Return the agent's line in the ids and the memory of that model; the agent does not move.

    KV that is computed for it is found when the agent comes.
    """
    if place is agent.place:
        return line
    transcript, turns = line.transcript, line.turns
    namespace: str | None = line.blocks.namespace
    if place.tokenizer != agent.place.tokenizer:
        known = line.foreign.get(place.tokenizer)
        transcript = known.transcript if known else EMPTY
        turns = _translated(line.turns, known.turns if known else ())
        namespace = known.namespace if known else None
    if place not in line.resting:
        line.resting[place] = place.tiers.new_line(agent.agent_id, namespace)
    return Line(
        line.resting[place],
        transcript,
        line.messages,
        number=line.number,
        opened=line.opened,
        turns=turns,
    )


def move(agent: Agent, place: Place) -> None:
    """Put the agent at this place. Its KV stays where it is, and the line that it is of keeps it.

    It counts as used last there: what the state says last is what is read after a restart.
    """
    former = agent.place
    if place is former:
        return
    place.tiers.catch_up(agent.last_used)
    former.tiers.pin(agent.main.blocks, pinned=False)
    for line in agent.lines:
        there = line_at(agent, line, place)
        if place.tokenizer != former.tokenizer:
            if line is agent.main or line.transcript.num_tokens:
                line.foreign[former.tokenizer] = _state_of_line(line, former)
            line.foreign.pop(place.tokenizer, None)
        line.resting[former] = line.blocks
        line.blocks = line.resting.pop(place)
        place.tiers.touch(line.blocks, as_of=line.resting[former].last_used)
        line.transcript, line.turns = there.transcript, there.turns
    agent.place = place
    place.tiers.pin(agent.main.blocks, pinned=agent.settings.pinned)
    place.tiers.touch(agent.main.blocks)


def _conversations(states: Sequence[LineState]) -> list[list[LineState]]:
    """Group the states of each line, the main line's first.

    Catalogues of earlier versions counted side lines in each tokenizer on its own: two of one
    number may be two conversations. The second gets a number of its own.
    """
    groups: dict[int, list[LineState]] = {}
    strangers: list[LineState] = []
    for state in sorted(states, key=lambda state: state.number):
        group = groups.setdefault(state.number, [])
        if state.number and any(not _are_one(state, other) for other in group):
            strangers.append(state)
        else:
            group.append(state)
    for number, state in enumerate(strangers, 1 + max(groups)):
        groups[number] = [replace(state, number=number)]
    return list(groups.values())


def _are_one(a: LineState, b: LineState) -> bool:
    """Whether one conversation may be the other's beginning; unknown messages may be any."""
    if a.messages is None or b.messages is None:
        return True
    shorter, longer = sorted((a.messages, b.messages), key=len)
    return longer[: len(shorter)] == shorter


def _states(agent: Agent) -> Iterator[LineState]:
    for line in agent.lines:
        if line is agent.main or line.transcript.num_tokens:
            yield _state_of_line(line, agent.place)
        for state in line.foreign.values():
            yield replace(state, number=line.number)  # the main line may be another one by now


def _state_of_line(line: Line, place: Place) -> LineState:
    return LineState(
        number=line.number,
        tokenizer=place.tokenizer,
        transcript=line.transcript,
        messages=line.messages,
        turns=tuple(line.turns),
        block_hashes=_block_hashes(line, place),
        last_used=line.blocks.last_used,
        namespace=line.blocks.namespace,
    )


def _block_hashes(line: Line, place: Place) -> tuple[BlockHash, ...]:
    """Return the names of the transcript's whole blocks, in memory or not."""
    token_ids = line.transcript.token_ids
    blocks = line.blocks.blocks[: whole_blocks(len(token_ids))]
    end = len(blocks) * BLOCK_TOKENS
    if tuple(line.blocks.token_ids[:end]) != token_ids[:end]:
        blocks = []
    known = [block.hash for block in blocks]
    parent = known[-1] if known else place.tiers.root_of(line.blocks)
    return (*known, *chain_hashes(parent, token_ids[len(known) * BLOCK_TOKENS :]))


def _line(states: Sequence[LineState], agent_id: str, place: Place) -> Line:
    """Return the line that has these states, one for each tokenizer."""
    foreign = {state.tokenizer: state for state in states}
    known = foreign.pop(place.tokenizer, None)
    last = max(states, key=lambda state: (state.last_used, len(state.turns)))
    return Line(
        place.tiers.new_line(agent_id, known.namespace if known else None),
        known.transcript if known else EMPTY,
        last.messages,
        number=last.number,
        opened=last.number,
        turns=_translated(last.turns, known.turns if known else ()),
        foreign=foreign,
    )


def _translated(turns: Sequence[Turn], own: Sequence[Turn]) -> list[Turn]:
    """Return the turns with their tokens in this tokenizer, as far as it knows them."""
    known = [*own, *[None] * (len(turns) - len(own))]
    return [
        turn
        if turn == mine
        else replace(turn, num_tokens=mine.num_tokens if mine and _agree(turn, mine) else 0)
        for turn, mine in zip(turns, known, strict=False)
    ]


def _agree(a: Turn, b: Turn) -> bool:
    return a.messages is not None and a.messages == b.messages
