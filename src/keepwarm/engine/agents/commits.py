"""Changes of agents on their way to the disk, and waiting for the store's answers."""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from keepwarm.core.agent_store import AgentStore
from keepwarm.core.events import Completed
from keepwarm.core.steps import Pause, Steps
from keepwarm.engine.agents.agent import Agent
from keepwarm.engine.agents.agent_state import state_of
from keepwarm.kv.tiers import Tiers

STORE_WAIT_S = 0.05
"""How many seconds a step waits for the store at most, where there is nothing else to do."""
REFUSED_S = 3.0
"""How many seconds a disk that refuses KV is asked again, while something waits for it."""


class Commit:
    """One change of an agent on its way to the disk.

    `durable` is None until a step or `flush` has the disk's answer. Where that is False, a deletion
    was not done; any other change is kept in memory and tried again by itself.
    """

    def __init__(self, agent_id: str, *, durable: bool | None = None) -> None:
        self.agent_id = agent_id
        self.durable = durable
        self._listeners: list[Callable[[bool], object]] = []

    def __repr__(self) -> str:
        return f"Commit({self.agent_id!r}, durable={self.durable})"

    def then(self, listener: Callable[[bool], object]) -> None:
        """Call `listener` with the disk's answer, at once where that is known."""
        if self.durable is None:
            self._listeners.append(listener)
        else:
            listener(self.durable)

    def answer(self, *, durable: bool) -> None:
        self.durable = durable
        listeners, self._listeners = self._listeners, []
        for listener in listeners:
            listener(durable)


class Commits:
    """Owns one engine's changes of agents on their way to the disk, and polls the store for it.

    `emit` takes a turn's final event when the disk has answered. Another engine's poll may deliver
    these answers as well: all engines run on one thread.
    """

    def __init__(
        self,
        store: AgentStore,
        tiers: Tiers,
        *,
        emit: Callable[[Completed], None],
    ) -> None:
        self._store = store
        self._tiers = tiers
        self._emit = emit
        self._uncommitted: set[Commit] = set()
        self._refused: dict[str, Agent] = {}

    def __repr__(self) -> str:
        return f"Commits({len(self._uncommitted)} on their way)"

    @property
    def is_committing(self) -> bool:
        """Whether the disk has changes of agents that it has not answered for."""
        return bool(self._uncommitted)

    @property
    def is_settled(self) -> bool:
        """Whether the disk has taken every change."""
        return not self._uncommitted and not self._refused

    def commit(self, agent: Agent, completed: Completed | None = None) -> Commit:
        """Write the agent, and emit the turn's final event when the disk has answered."""
        commit = Commit(agent.agent_id)
        answer = partial(self._take, commit, agent, completed)
        self._store.commit(state_of(agent), answer)
        self._uncommitted.add(commit)  # the answer comes by a poll, never within the call
        return commit

    def settle(self, agent: Agent) -> Commit:
        """Write the agent only where the disk has not taken all of it."""
        if self._store.is_durable(agent.agent_id):
            return Commit(agent.agent_id, durable=True)
        return self.commit(agent)

    def delete(self, agent_id: str) -> Commit:
        """Remove the agent from the disk; where that refuses, nothing has changed there.

        A store that is in memory has its answer ready, and is asked for it.
        """
        commit = Commit(agent_id)
        self._store.delete_agent(agent_id, partial(self._take, commit, None, None))
        self._uncommitted.add(commit)
        self.poll()
        return commit

    def poll(self) -> None:
        """Let the store answer what it can answer now."""
        self._store.poll()
        self._tiers.release_put_away()

    def wait(self) -> None:
        """Wait until the store has an answer, but not for long."""
        self._store.wait(STORE_WAIT_S)

    def hear(self) -> None:
        """Wait for an answer, and take it."""
        self.wait()
        self.poll()

    def committed(self, agent: Agent) -> Steps[bool]:
        """Commit the agent, and wait between steps. Returns whether the disk took it."""
        commit = self.commit(agent)
        while commit.durable is None:
            yield Pause.WAITING
        return commit.durable

    def flush(self, timeout_s: float) -> bool:
        """Wait until every change so far is committed. Returns whether the disk took them all.

        What it has refused until now is sent to it once more.
        """
        refused, self._refused = self._refused, {}
        for agent in refused.values():
            if agent.is_leaving:  # written again behind its deletion, it would come back
                self._refused[agent.agent_id] = agent
            elif not agent.is_deleted:
                self.commit(agent)
        until = time.monotonic() + timeout_s
        while self._uncommitted and time.monotonic() < until:
            self.hear()
        return self.is_settled

    def save_while(self, is_unsaved: Callable[[], bool], until_s: float) -> None:
        """Hand KV to the store, as fast as it takes it, while `is_unsaved`, until `until_s`.

        A disk that refuses is asked again for REFUSED_S, and given up then.
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

    def _take(
        self, commit: Commit, agent: Agent | None, completed: Completed | None, durable: bool
    ) -> None:
        """Pass the disk's answer on; `agent` is None for a deletion, which is not tried again."""
        if durable:
            self._refused.pop(commit.agent_id, None)
        elif agent is not None:
            self._refused[commit.agent_id] = agent
        if completed is not None:
            self._emit(replace(completed, durable=durable))
        self._uncommitted.remove(commit)
        commit.answer(durable=durable)
