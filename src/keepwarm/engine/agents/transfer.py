"""An agent as data: into a file, and out of a file."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from keepwarm.core.agent import in_namespace
from keepwarm.core.agent_store import AgentStore
from keepwarm.core.errors import AgentExists, DamagedAgent, InvalidRequest, InvariantBroken
from keepwarm.core.ports import LoadedModel
from keepwarm.core.stored import (
    AgentState,
    Bundle,
    BundleRead,
    BundleStored,
    BundleWritten,
    KVFamily,
    LineState,
)
from keepwarm.engine.agents.agent_keeper import AgentKeeper
from keepwarm.engine.agents.book import Agent, AgentBook, Line
from keepwarm.engine.agents.bundles import (
    ExportSummary,
    ImportSummary,
    imported_state,
    name_of,
    private_terms,
    vouched_for,
)
from keepwarm.engine.agents.store_inbox import StoreInbox
from keepwarm.engine.jobs import Pause, Steps
from keepwarm.engine.requests import valid_agent_id
from keepwarm.kv.tiers import Tiers

NAMELESS = "damaged"
"""An agent's name in a bundle where its own is none any more."""


class AgentPorter:
    """Exports and imports agents, between the engine's steps: the store's thread does the work."""

    def __init__(
        self,
        loaded: LoadedModel,
        family: KVFamily,
        tiers: Tiers,
        *,
        store: AgentStore,
        link: StoreInbox,
        keeper: AgentKeeper,
        book: AgentBook,
    ) -> None:
        self._tokenizer = loaded.tokenizer
        self._vocab_size = loaded.vocab_size
        self._family = family
        self._tiers = tiers
        self._store = store
        self._link = link
        self._keeper = keeper
        self._book = book
        self._arriving: set[str] = set()

    def exporting(self, agent_id: str, path: Path, timeout_s: float) -> Steps[ExportSummary]:
        """The agent as its last turn left it, whatever it does meanwhile.

        What the disk has not taken within `timeout_s` is left out and counted; of a damaged agent,
        what cannot be read.
        """
        try:
            agent = self._book.get_staying(agent_id)
        except DamagedAgent as error:
            return (yield from self._exporting_rest(agent_id, path, error.problem))
        # A bundle does not say which line was used last: it is the one that knows the most.
        foreign = tuple(line for line in agent.foreign if _is_part_of(agent.main, line))
        state = self._keeper.state_of(replace(agent, foreign=foreign))
        held = {line.number: line.num_held() for line in agent.lines}
        yield from self._saving(agent, timeout_s)
        written = yield from self._writing(state, path)
        own = [line for line in state.lines if line.tokenizer == self._tokenizer.fingerprint]
        stored = {line.number: self._num_stored(line) for line in own}
        missing = (max(held[number] - num, 0) for number, num in stored.items())
        return ExportSummary(
            agent_id,
            path,
            written.file_bytes,
            written.num_records,
            sum(stored.values()),
            sum(missing),
        )

    def importing(
        self,
        path: Path,
        agent_id: str | None,
        namespace: str,
        is_taken: Callable[[str], bool],
    ) -> Steps[ImportSummary]:
        """Nobody else finds its KV before it was verified. None keeps its name.

        `is_taken` says of a name whether another engine has such an agent.
        """
        valid_agent_id(agent_id)
        if agent_id is not None:
            self._check_is_new(agent_id, is_taken)
        terms = private_terms(self._family, self._tokenizer.fingerprint, self._vocab_size)
        ticket = self._store.read_bundle(path, terms)
        bundle = (yield from self._link.answered(ticket, BundleRead)).bundle
        if bundle is None:
            raise InvariantBroken(f"the store answered for {path} without a bundle")
        name = agent_id or in_namespace(namespace, name_of(bundle))
        self._check_is_new(name, is_taken)
        self._arriving.add(name)
        try:
            bundle = yield from vouched_for(bundle, self._tokenizer)
            agent, stored = yield from self._taking_in(bundle, name, is_taken)
        finally:
            self._arriving.remove(name)
        return ImportSummary(
            agent_id=name,
            num_tokens=agent.main.transcript.num_tokens,
            num_turns=len(agent.turns),
            num_records=stored.num_records,
            num_dropped=bundle.num_dropped,
            num_left_out=len(bundle.records) - stored.num_records,
            is_durable=(yield from self._link.committed(agent)),
        )

    def num_unsaved(self, line: Line) -> int:
        """Of how many of the line's tokens the KV is in memory only."""
        stored = self._tiers.saver.stored_tokens
        return max(line.num_held() - stored(line.transcript.token_ids, line.blocks.namespace), 0)

    # -- inside ----------------------------------------------------------------------------------

    def _exporting_rest(self, agent_id: str, path: Path, damage: str) -> Steps[ExportSummary]:
        """Raises DamagedAgent where nothing can be read."""
        state = self._store.salvage_agent(agent_id)
        try:
            valid_agent_id(agent_id)
        except InvalidRequest:  # the name is what was damaged
            state = replace(state, agent_id=NAMELESS)
        written = yield from self._writing(state, path)
        stored = self._tiers.saver.stored_tokens
        own = [line for line in state.lines if line.tokenizer == self._tokenizer.fingerprint]
        num_stored = sum(stored(line.transcript.token_ids, line.namespace) for line in own)
        return ExportSummary(
            agent_id, path, written.file_bytes, written.num_records, num_stored, 0, damage
        )

    def _writing(self, state: AgentState, path: Path) -> Steps[BundleWritten]:
        ticket = self._store.write_bundle(self._family, self._tokenizer.fingerprint, state, path)
        return (
            yield from self._link.answered(
                ticket, BundleWritten, undo=lambda: self._store.remove_bundle(path)
            )
        )

    def _saving(self, agent: Agent, timeout_s: float) -> Steps[None]:
        """Wait until the disk has taken the KV of what was said, unless it refuses or is slow."""
        saver, until = self._tiers.saver, time.monotonic() + timeout_s
        names = [
            name for line in agent.lines for name in saver.offer_first(line.blocks, line.num_held())
        ]
        while any(map(saver.queue.is_unsaved, names)) and time.monotonic() < until:
            if self._store.health().fault is not None:
                return
            yield Pause.WAITING

    def _taking_in(
        self, bundle: Bundle, name: str, is_taken: Callable[[str], bool]
    ) -> Steps[tuple[Agent, BundleStored]]:
        """Its KV, and then the agent itself, unless somebody has taken its name meanwhile."""
        ticket = self._store.store_bundle(bundle, name)

        def undo() -> None:
            self._store.drop([record.hash for record in bundle.records])

        stored = yield from self._link.answered(ticket, BundleStored, undo)
        try:
            self._check_is_new(name, is_taken, is_own=True)
        except AgentExists:
            undo()
            raise
        state = imported_state(bundle, name, stored.num_records)
        return self._book.add(self._keeper.agent_of(state)), stored

    def _check_is_new(
        self, name: str, is_taken: Callable[[str], bool], *, is_own: bool = False
    ) -> None:
        self._book.check_is_new(name)
        if is_taken(name) or (name in self._arriving and not is_own):
            raise AgentExists(name)

    def _num_stored(self, line: LineState) -> int:
        return self._tiers.saver.stored_tokens(line.transcript.token_ids, line.namespace)


def _is_part_of(main: Line, other: LineState) -> bool:
    """Whether the other line, of another tokenizer, knows nothing that was taken back here."""
    if other.number or other.messages is None or main.messages is None:
        return True
    return main.messages[: len(other.messages)] == other.messages
