"""The log of agents on disk: what is committed of them, what is refused, and what is damaged."""

import logging
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from keepwarm.core.errors import DamagedAgent
from keepwarm.core.stored import AgentState, AgentSummary
from keepwarm.store.catalog.errors import CatalogCorrupt, CatalogUnavailable
from keepwarm.store.catalog.load import damaged_summary
from keepwarm.store.catalog.opening import Opened
from keepwarm.store.catalog.reader import CatalogReader
from keepwarm.store.changes import Change, Changes
from keepwarm.store.disk.io_thread import Priority
from keepwarm.store.disk.outcomes import CommitDone, Erased
from keepwarm.store.health import Work
from keepwarm.store.losses import Loss, loss_of
from keepwarm.store.parts import StoreParts

log = logging.getLogger("keepwarm.store")

OVER_BUDGET_BYTES = 1 << 20
"""What is evicted for a commit that had no room in the budget."""
_UNLISTED = (
    "agents that are only on disk cannot be listed: a page of the catalogue is damaged; start the "
    "server again, which takes over those that can be read"
)


class DiskLog:
    """Implements `AgentLog`: the I/O thread writes, and a reader on this thread reads.

    Owns the changes on their way, the damaged agents, and whether deleted ones left traces.
    """

    def __init__(self, parts: StoreParts, reader: CatalogReader, opened: Opened) -> None:
        self._thread = parts.thread
        self._disk = parts.disk
        self._index = parts.index
        self._room = parts.room
        self._health = parts.health
        self._answers = parts.answers
        self._reader = reader
        self._changes = Changes()
        self._is_erasure_due = opened.needs_erasing
        self._notices = opened.notices
        self._damaged: dict[str, str] = {}
        for agent_id, problem in opened.damaged.items():
            self._note_damage(agent_id, problem)

    def __repr__(self) -> str:
        return f"DiskLog({self._changes!r}, {len(self._damaged)} damaged)"

    # -- writing ---------------------------------------------------------------------------------

    def commit(self, state: AgentState, answer: Callable[[bool], object]) -> None:
        self._index.use(state)
        self._post(Change(state.agent_id, state, answer))

    def delete_agent(self, agent_id: str, answer: Callable[[bool], object]) -> None:
        with suppress(DamagedAgent):
            self.load_agent(agent_id)  # whose records are counted then
        self._post(Change(agent_id, None, answer))

    def is_durable(self, agent_id: str) -> bool:
        return self._changes.last_of(agent_id) is None

    def try_again(self) -> None:
        """Ask the disk again for what it has refused."""
        if self._changes.refused:  # every poll comes here
            self.retry_commits()
        if self._is_erasure_due:
            self._is_erasure_due = False
            self._thread.ask(Priority.COMMIT, self._disk.erase, self._take_erased)

    def retry_commits(self) -> None:
        """Write refused states again, whole; that they were refused has been answered."""
        for change in self._changes.take_refused():
            self._post(change)

    def losses(self) -> list[Loss]:
        """Return what is lost when the disk takes no more than it has."""
        return [
            loss_of(change, self._committed(change.agent_id))
            for change in self._changes.not_durable()
        ]

    # -- reading ---------------------------------------------------------------------------------

    def load_agent(self, agent_id: str) -> AgentState | None:
        change = self._changes.last_of(agent_id)
        if change is not None:
            return change.state
        if agent_id in self._damaged:
            raise DamagedAgent(agent_id, self._damaged[agent_id])
        try:
            state = self._reader.load_agent(agent_id)
        except DamagedAgent as error:
            self._note_damage(agent_id, error.problem)
            raise
        if state is not None:
            self._index.usage.know(state)
        return state

    def salvage_agent(self, agent_id: str) -> AgentState:
        return self._reader.salvage_agent(agent_id)

    def summaries(self) -> list[AgentSummary]:
        gone = self._changes.deleted()
        found = {s.agent_id: s for s in self._summaries() if s.agent_id not in gone}
        for name, problem in self._damaged.items():
            if name in found:
                found[name] = damaged_summary(name, problem)
        return list(found.values())

    def models(self) -> dict[str, str]:
        gone = self._changes.deleted()
        try:
            models = self._reader.models()
        except CatalogCorrupt:  # said where agents are listed
            return {}
        models |= dict.fromkeys(self._damaged.keys() & models.keys(), "")
        return {name: model for name, model in models.items() if name not in gone}

    def num_stored(self, agent_id: str) -> int:
        with suppress(DamagedAgent):  # nothing can be served of an agent that cannot be read
            line = self._reader.main_line(agent_id)
            if line is not None:
                return self._index.num_stored(line.block_hashes, line.tail_ids, line.roots)
        return 0

    def notices(self) -> tuple[str, ...]:
        """Return what was lost or damaged, without names: clients may not know all agents."""
        number = len(self._damaged)
        if not number:
            return self._notices
        agents = "1 agent is" if number == 1 else f"{number} agents are"
        damage = f"{agents} damaged and set aside; the log and the list of agents name what is"
        return (*self._notices, damage)

    # -- inside ----------------------------------------------------------------------------------

    def _committed(self, agent_id: str) -> AgentState | None:
        """Return the agent as the catalogue has it, as far as it can be read."""
        try:
            return self._reader.load_agent(agent_id)
        except (DamagedAgent, CatalogUnavailable):
            return None

    def _summaries(self) -> list[AgentSummary]:
        """Return all summaries; none where a page is damaged: the next start rescues the rest."""
        try:
            return self._reader.summaries()
        except CatalogCorrupt as error:
            if _UNLISTED not in self._notices:
                self._notices = (*self._notices, _UNLISTED)
                log.error("%s; %s", error, _UNLISTED)
            return []

    def _note_damage(self, agent_id: str, problem: str) -> None:
        log.error("%s. Other agents are not affected", DamagedAgent(agent_id, problem))
        self._damaged[agent_id] = problem

    def _post(self, change: Change) -> None:
        self._changes.begin(change)
        if change.state is None:
            is_damaged = change.agent_id in self._damaged
            command = partial(self._disk.delete_agent, change.agent_id, is_damaged=is_damaged)
        else:
            command = partial(self._disk.commit, change.state)
        self._thread.ask(
            Priority.COMMIT,
            command,
            partial(self._take_commit, change),
            lost=partial(self._refuse, change),
        )

    def _take_commit(self, change: Change, done: CommitDone) -> None:
        self._room.other_bytes = done.other_bytes
        if done.fault is not None:
            self._refuse(change)
            self._health.note_fault(done.fault, Work.COMMITS)
            if done.is_over_budget:
                self._room.make(OVER_BUDGET_BYTES, None)
            return
        self._changes.note_ended(change)
        if done.refusal is not None:
            log.error("agent %r cannot be stored: %s", change.agent_id, done.refusal)
            self._answer(change, durable=False)
            return
        self._health.note_success(Work.COMMITS)
        self._changes.note_taken(change)
        self._damaged.pop(change.agent_id, None)
        if change.state is None:
            self._erase(change)
        else:
            self._answer(change, durable=True)

    def _refuse(self, change: Change) -> None:
        self._changes.note_ended(change)
        self._changes.note_refused(change)
        self._answer(change, durable=False)

    def _answer(self, change: Change, *, durable: bool) -> None:
        if change.answer is not None:
            self._answers.add(change.answer, durable)

    def _erase(self, change: Change) -> None:
        """Erase what is left of an agent whose rows are gone, before that is answered."""
        own = [entry.record.hash for entry in self._index.disuse(change.agent_id)]
        self._room.remove(own, Priority.COMMIT)
        # The erasing writes all of the catalogue anew beside the old one.
        self._room.make(self._room.other_bytes, None, Priority.COMMIT)

        def take(done: Erased) -> None:
            self._take_erased(done)
            self._answer(change, durable=True)

        lost = partial(self._answer, change, durable=True)
        self._thread.ask(Priority.COMMIT, self._disk.erase, take, lost=lost)

    def _take_erased(self, done: Erased) -> None:
        """Note whether the disk has erased an agent's traces: its deletion stands either way."""
        self._room.other_bytes = done.other_bytes
        self._is_erasure_due = done.fault is not None
        if done.fault is None:
            self._health.note_success(Work.ERASING)
        else:
            log.error("traces of deleted agents are left until the disk permits: %s", done.fault)
            self._health.note_fault(done.fault, Work.ERASING)
