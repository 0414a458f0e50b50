"""What people ask of agents: to look at them, make, change, fork, rest and delete them."""

from dataclasses import replace
from functools import partial

from keepwarm.core.agent_store import AgentStore
from keepwarm.core.errors import AgentBusy, DamagedAgent, InvalidRequest
from keepwarm.core.ports import Message
from keepwarm.core.stored import DEFAULT_SETTINGS, AgentSettings, Overflow
from keepwarm.core.transcript import Turn
from keepwarm.engine.agents.agent import Agent, Line, Place
from keepwarm.engine.agents.agent_view import AgentView, view_of, view_of_summary
from keepwarm.engine.agents.book import AgentBook
from keepwarm.engine.agents.commits import Commit, Commits
from keepwarm.engine.prompt.messages import opening, validate_messages
from keepwarm.engine.requests import valid_agent_id, valid_settings
from keepwarm.engine.turn.prefetcher import Prefetcher


class AgentCommands:
    """Carries out what people ask of agents; a change returns its `Commit`.

    New agents are at this `place`, and what moves KV brings the agent here.
    """

    def __init__(
        self,
        book: AgentBook,
        place: Place,
        *,
        store: AgentStore,
        commits: Commits,
        prefetches: Prefetcher,
    ) -> None:
        self._book = book
        self._place = place
        self._tiers = place.tiers
        self._store = store
        self._commits = commits
        self._prefetches = prefetches

    # -- looking ---------------------------------------------------------------------------------

    def agents(self) -> tuple[AgentView, ...]:
        """Return all agents, those that are only on disk as well."""
        there = [
            view_of_summary(summary).holding(self._store.num_stored(summary.agent_id))
            for summary in self._store.summaries()
            if self._book.here(summary.agent_id) is None
        ]
        return (*map(view_of, self._book), *there)

    def agent(self, agent_id: str) -> AgentView:
        """Return the agent as people see it. Raises UnknownAgent."""
        return view_of(self._book.get(agent_id))

    def knows(self, agent_id: str) -> bool:
        """Whether there is such an agent, here or on disk."""
        return agent_id in self._book

    def turns(self, agent_id: str) -> tuple[Turn, ...]:
        """Return what the agent's main line has said and heard so far. Raises UnknownAgent."""
        return tuple(self._book.get(agent_id).turns)

    def settings(self, agent_id: str) -> AgentSettings:
        """Return the agent's settings. Raises UnknownAgent."""
        return self._book.get(agent_id).settings

    def system(self, agent_id: str) -> str | None:
        """Return the system prompt of the agent's conversation. Raises UnknownAgent."""
        messages = opening(self._book.get(agent_id).main.messages)
        return "\n".join(str(message["content"]) for message in messages) or None

    def receipt(self, agent_id: str, key: str) -> Turn | None:
        """Return the turn of a request with this key, in this run or an earlier one."""
        agent = self._book.find(agent_id)
        turns = reversed(agent.turns) if agent is not None else ()
        return next((turn for turn in turns if turn.receipt and turn.receipt.key == key), None)

    def is_durable(self, agent_id: str) -> bool:
        """Whether the disk has everything that was said to the agent and decided about it."""
        return self._store.is_durable(agent_id)

    # -- changing --------------------------------------------------------------------------------

    def create(
        self,
        agent_id: str,
        *,
        system: str | None = None,
        settings: AgentSettings = DEFAULT_SETTINGS,
    ) -> Commit:
        """Create an agent that has said nothing yet. Raises InvalidRequest and AgentExists."""
        if valid_agent_id(agent_id) is None:
            raise InvalidRequest("agent_id", "an agent needs a name")
        valid_settings(settings)
        self._book.check_is_new(agent_id)
        messages: tuple[Message, ...] = ()
        if system is not None:
            messages = validate_messages([{"role": "system", "content": system}])
        line = Line(self._tiers.new_line(agent_id), messages=messages)
        self._tiers.pin(line.blocks, pinned=settings.pinned)
        recorded_as = self._place.recorded_as
        agent = Agent(agent_id, self._place, line, settings=settings, model=recorded_as)
        return self._commits.commit(self._book.add(agent))

    def fork(self, agent_id: str, new_id: str, *, at_turn: int | None = None) -> Commit:
        """Create an agent that knows what this one knew after `at_turn` turns (None: after all).

        It has the parent's settings but for the pin, and none of its receipts: a key is of one
        agent's request. Whole blocks are shared by reference. Raises UnknownAgent, AgentBusy,
        AgentExists and InvalidRequest.
        """
        parent = self._bring(agent_id, "fork it")
        if valid_agent_id(new_id) is None:
            raise InvalidRequest("new_id", "a fork needs a name")
        self._book.check_is_new(new_id)
        num_tokens, messages = parent.after_turn(at_turn)
        main = parent.main
        child = Line(
            self._tiers.fork(main.blocks, main.num_held(num_tokens), new_id),
            main.transcript.truncated(num_tokens),
            messages,
            turns=[turn.without_receipt() for turn in parent.turns[:at_turn]],
        )
        settings = parent.settings.of_fork()
        model = parent.model
        fork = Agent(
            new_id, self._place, child, settings=settings, model=model, has_fixed_main=True
        )
        return self._commits.commit(self._book.add(fork))

    def rollback(self, agent_id: str, *, turn: int) -> Commit:
        """Forget everything after `turn` turns. Raises UnknownAgent, AgentBusy, InvalidRequest."""
        agent = self._bring(agent_id, "roll it back")
        num_tokens, messages = agent.after_turn(turn)
        main = agent.main
        main.transcript = main.transcript.truncated(num_tokens)
        main.messages = messages
        del agent.turns[turn:]
        agent.has_fixed_main = True
        self._tiers.truncate(main.blocks, main.num_held(num_tokens))
        return self._commits.commit(agent)

    def pin(self, agent_id: str, *, pinned: bool = True) -> Commit:
        """Never evict the agent's blocks (its slab may still become blocks)."""
        return self.configure(agent_id, pinned=pinned)

    def configure(
        self,
        agent_id: str,
        *,
        pinned: bool | None = None,
        priority: int | None = None,
        quota_bytes: int | None = None,
        overflow: Overflow | None = None,
    ) -> Commit:
        """Change the agent's settings; None leaves one as it is.

        Raises UnknownAgent, AgentLeaving and InvalidRequest.
        """
        agent = self._book.get_staying(agent_id)
        old = agent.settings
        settings = valid_settings(
            replace(
                old,
                pinned=old.pinned if pinned is None else pinned,
                priority=old.priority if priority is None else priority,
                quota_bytes=old.quota_bytes if quota_bytes is None else quota_bytes,
                overflow=old.overflow if overflow is None else overflow,
            )
        )
        return self._decide(agent, settings)

    def lift_quota(self, agent_id: str) -> Commit:
        """Let the agent's own blocks take what they need on disk.

        Raises UnknownAgent and AgentLeaving.
        """
        agent = self._book.get_staying(agent_id)
        return self._decide(agent, replace(agent.settings, quota_bytes=None))

    def delete(self, agent_id: str) -> Commit:
        """Delete the agent and what only it owned: from memory when the disk has let it go.

        Until then it is busy. Where the disk refuses, it is as it was, in memory as well. One that
        is damaged can be deleted. Raises UnknownAgent, AgentBusy.
        """
        try:
            agent = self._book.get_idle(agent_id, "delete it")
        except DamagedAgent:
            return self._commits.delete(agent_id)
        commit = self._commits.delete(agent_id)
        agent.is_leaving = True
        commit.then(partial(self._end_deletion, agent))
        return commit

    # -- where its KV is -------------------------------------------------------------------------

    def demote(self, agent_id: str) -> None:
        """Turn the agent's slab into blocks now, as memory pressure would. Raises AgentBusy."""
        blocks = self._bring(agent_id, "demote it").main.blocks
        if blocks.slab is not None:
            self._tiers.demote(blocks)

    def park(self, agent_id: str) -> Commit:
        """Save the agent and free its memory when the disk has it. Raises AgentBusy.

        What the disk does not take stays in memory. The commit is of what was said; KV is saved in
        the background.
        """
        agent = self._bring(agent_id, "park it")
        for line in agent.lines:
            self._tiers.saver.put_away(line.blocks)
        return self._commits.settle(agent)

    def prefetch(self, agent_id: str) -> None:
        """Bring the agent's KV into a slab, so that its next turn resumes hot; in the background.

        Whatever is asked of the agent meanwhile calls it off, and what is there by then stays.
        Raises UnknownAgent, and AgentBusy while its main line runs.
        """
        agent = self._book.get_staying(agent_id)
        if agent.main.in_use:
            raise AgentBusy(agent_id, "prefetch it")
        if agent.place is not self._place:
            self._bring(agent_id, "prefetch it")
        self._place.give_way(agent_id)
        self._prefetches.begin(agent.main, agent.main.transcript.token_ids)

    def forget_cache(self, agent_id: str) -> None:
        """Drop the agent's KV and keep what it said: its next turn is prefilled from the start.

        What lies on disk stays there and is found again by content.
        """
        self._tiers.truncate(self._bring(agent_id, "empty its cache").main.blocks, 0)

    # -- inside ----------------------------------------------------------------------------------

    def _bring(self, agent_id: str, action: str) -> Agent:
        return self._book.bring(agent_id, self._place, action)

    def _decide(self, agent: Agent, settings: AgentSettings) -> Commit:
        if settings == agent.settings:
            return self._commits.settle(agent)
        agent.settings = settings
        agent.place.tiers.pin(agent.main.blocks, pinned=settings.pinned)
        return self._commits.commit(agent)

    def _end_deletion(self, agent: Agent, is_done: bool) -> None:
        agent.is_leaving = False
        if is_done:
            self._book.remove(agent)
