"""What the engine has told the store and waits to hear about: commits, deletions, bundles."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

from keepwarm.core.agent_store import AgentStore
from keepwarm.core.errors import InvariantBroken
from keepwarm.core.events import Completed
from keepwarm.core.stored import (
    BundleEvent,
    BundleRead,
    BundleStored,
    BundleWritten,
    Committed,
    Fetched,
    Saved,
)
from keepwarm.engine.agents.agent_state import AgentStates
from keepwarm.engine.agents.book import Agent
from keepwarm.engine.jobs import Pause, Steps
from keepwarm.kv.tiers import Tiers

STORE_WAIT_S = 0.05
REFUSED_S = 3.0
"""For how long a disk that refuses KV is asked again, where something waits for it."""

Answer = TypeVar("Answer", BundleWritten, BundleRead, BundleStored)


class Commit:
    """A change of an agent on its way to the disk.

    `durable` is None until a step or `flush` has heard the disk's answer. Where that is False, a
    deletion was not done; any other change is kept in memory and tried again by itself.
    """

    def __init__(self, agent_id: str, *, durable: bool | None = None) -> None:
        self.agent_id = agent_id
        self.durable = durable
        self._listeners: list[Callable[[bool], object]] = []

    def __repr__(self) -> str:
        return f"Commit({self.agent_id!r}, durable={self.durable})"

    def then(self, listener: Callable[[bool], object]) -> None:
        """Call it with the disk's answer, at once where that is known."""
        if self.durable is None:
            self._listeners.append(listener)
        else:
            listener(self.durable)

    def answer(self, *, durable: bool) -> None:
        self.durable = durable
        listeners, self._listeners = self._listeners, []
        for listener in listeners:
            listener(durable)


@dataclass(frozen=True, slots=True)
class _Sent:
    """What was sent to the store; `agent` None: a deletion."""

    commit: Commit
    agent: Agent | None = None
    completed: Completed | None = None


class StoreInbox:
    """Owns the tickets of agents and bundles; hands answers about KV to the tiers.

    `emit` takes a turn's final event when the disk has answered.
    """

    def __init__(
        self,
        store: AgentStore,
        tiers: Tiers,
        keeper: AgentStates,
        *,
        emit: Callable[[Completed], None],
    ) -> None:
        self._store = store
        self._tiers = tiers
        self._keeper = keeper
        self._emit = emit
        self._uncommitted: dict[int, _Sent] = {}
        self._refused: dict[str, Agent] = {}
        self._answers: dict[int, BundleEvent] = {}

    def __repr__(self) -> str:
        return f"StoreInbox({len(self._uncommitted)} commits, {len(self._answers)} answers)"

    @property
    def is_committing(self) -> bool:
        """Whether the disk has changes of agents that it has not answered for."""
        return bool(self._uncommitted)

    def commit(self, agent: Agent, completed: Completed | None = None) -> Commit:
        """Write the agent; the turn's final event is sent when the disk has answered."""
        commit = Commit(agent.agent_id)
        self._uncommitted[self._keeper.commit(agent)] = _Sent(commit, agent, completed)
        return commit

    def settle(self, agent: Agent) -> Commit:
        """Write the agent only where the disk has not taken all of it."""
        if self._store.is_durable(agent.agent_id):
            return Commit(agent.agent_id, durable=True)
        return self.commit(agent)

    def delete(self, agent_id: str) -> Commit:
        """Remove the agent from the disk; where that refuses, nothing has changed there.

        A store that is in memory has answered already, and is heard.
        """
        commit = Commit(agent_id)
        self._uncommitted[self._store.delete_agent(agent_id)] = _Sent(commit)
        self.take_events()
        return commit

    def take_events(self) -> None:
        """Pass on what the store has to say now."""
        for event in self._store.poll():
            if isinstance(event, Saved):
                self._tiers.saves.note(event.record_hash, retry=event.retry)
            elif isinstance(event, Fetched):
                self._tiers.fetches.note(event)
            elif isinstance(event, Committed):
                self._take_committed(event)
            else:
                self._answers[event.ticket] = event
        self._tiers.release_put_away()

    def wait(self) -> None:
        """Until the store has something to say, but not for long."""
        self._store.wait(STORE_WAIT_S)

    def hear(self) -> None:
        self.wait()
        self.take_events()

    def answered(
        self, ticket: int, kind: type[Answer], undo: Callable[[], None] = lambda: None
    ) -> Steps[Answer]:
        """Wait between steps for the store's answer; its error is raised.

        Closed before that, it calls off what the ticket is for, or undoes what is done already.
        """
        try:
            while ticket not in self._answers:
                yield Pause.WAITING
        except GeneratorExit:
            if self._answers.pop(ticket, None) is None:
                self._store.call_off(ticket)
            else:
                undo()
            raise
        answer = self._answers.pop(ticket)
        if not isinstance(answer, kind):
            raise InvariantBroken(f"ticket {ticket} was answered with {answer}")
        if answer.error is not None:
            raise answer.error
        return answer

    def committed(self, agent: Agent) -> Steps[bool]:
        """Commit the agent, and wait between steps. Returns whether the disk took it."""
        commit = self.commit(agent)
        while commit.durable is None:
            yield Pause.WAITING
        return commit.durable

    def flush(self, timeout_s: float) -> bool:
        """Wait until every change so far is committed. Returns whether the disk took them all.

        What it has refused until now is sent once more.
        """
        refused, self._refused = self._refused, {}
        for agent in refused.values():
            if not agent.has_left:
                self.commit(agent)
        until = time.monotonic() + timeout_s
        while self._uncommitted and time.monotonic() < until:
            self.hear()
        return not self._uncommitted and not self._refused

    def save_while(self, is_unsaved: Callable[[], bool], until_s: float) -> None:
        """Hand KV to the store, as fast as it takes it, while there is something of interest.

        A disk that refuses is asked again a few times, and not until then.
        """
        self._store.ask_again()
        gives_up_s = until_s
        while is_unsaved() and time.monotonic() < min(until_s, gives_up_s):
            self._tiers.save_some()
            self.hear()
            if self._store.health().fault is None:
                gives_up_s = until_s
            else:
                gives_up_s = min(gives_up_s, time.monotonic() + REFUSED_S)

    def _take_committed(self, event: Committed) -> None:
        sent = self._uncommitted.pop(event.ticket)
        if event.durable:
            self._refused.pop(sent.commit.agent_id, None)
        elif sent.agent is not None:
            self._refused[sent.commit.agent_id] = sent.agent
        if sent.completed is not None:
            self._emit(replace(sent.completed, durable=event.durable))
        sent.commit.answer(durable=event.durable)
