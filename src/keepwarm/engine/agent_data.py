"""An agent as data: into a file, and out of a file."""

import time
from dataclasses import replace
from pathlib import Path

from keepwarm.core.agent import in_namespace
from keepwarm.core.agent_store import AgentStore
from keepwarm.core.errors import InvariantBroken
from keepwarm.core.ports import LoadedModel
from keepwarm.core.stored import BundleRead, BundleStored, BundleWritten, KVFamily, LineState
from keepwarm.engine.agents import Agent, AgentBook, Line
from keepwarm.engine.bundles import (
    ExportSummary,
    ImportSummary,
    imported_state,
    name_of,
    private_terms,
)
from keepwarm.engine.keeper import AgentKeeper
from keepwarm.engine.requests import valid_agent_id
from keepwarm.engine.store_link import StoreLink
from keepwarm.engine.tiers import Tiers


class AgentPorter:
    """Exports and imports agents. Both wait for the disk, so nothing else runs meanwhile."""

    def __init__(
        self,
        loaded: LoadedModel,
        family: KVFamily,
        tiers: Tiers,
        *,
        store: AgentStore,
        link: StoreLink,
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

    def export(self, agent: Agent, path: Path, *, timeout_s: float) -> ExportSummary:
        """What the disk has not taken within `timeout_s` is left out and counted."""
        self._save_lines(agent, timeout_s)
        # A bundle does not say which line was used last: it is the one that knows the most.
        foreign = tuple(line for line in agent.foreign if _is_part_of(agent.main, line))
        state = self._keeper.state_of(replace(agent, foreign=foreign))
        ticket = self._store.write_bundle(self._family, self._tokenizer.fingerprint, state, path)
        written = self._link.answer(ticket, BundleWritten)
        stored = [self._num_stored(line) for line in agent.lines]
        missing = map(self.num_unsaved, agent.lines)
        return ExportSummary(
            agent.agent_id, path, written.file_bytes, written.num_records, sum(stored), sum(missing)
        )

    def import_agent(self, path: Path, agent_id: str | None, namespace: str) -> ImportSummary:
        """Nobody else finds its KV before it was verified. None keeps its name."""
        self._book.check_is_new(valid_agent_id(agent_id))
        terms = private_terms(self._family, self._tokenizer.fingerprint, self._vocab_size)
        bundle = self._link.answer(self._store.read_bundle(path, terms), BundleRead).bundle
        if bundle is None:
            raise InvariantBroken(f"the store answered for {path} without a bundle")
        name = agent_id or in_namespace(namespace, name_of(bundle))
        self._book.check_is_new(name)
        stored = self._link.answer(self._store.store_bundle(bundle, name), BundleStored)
        state = imported_state(bundle, name, stored.num_records, self._tokenizer)
        agent = self._book.add(self._keeper.agent_of(state))
        self._link.commit(agent)
        return ImportSummary(
            agent_id=name,
            num_tokens=agent.main.transcript.num_tokens,
            num_turns=len(agent.turns),
            num_records=stored.num_records,
            num_dropped=bundle.num_dropped,
            num_left_out=len(bundle.records) - stored.num_records,
            is_durable=self._link.flush(timeout_s=10.0),
        )

    def _save_lines(self, agent: Agent, timeout_s: float) -> None:
        """Wait until the disk has taken the agent and its KV, as far as it does in time."""
        saver, until = self._tiers.saver, time.monotonic() + timeout_s
        lines = [line.blocks for line in agent.lines]
        for blocks in lines:
            saver.offer_line(blocks)
        self._link.save_while(lambda: any(map(saver.is_unsaved, lines)), until)
        self._link.flush(max(until - time.monotonic(), 0.0))

    def num_unsaved(self, line: Line) -> int:
        """Of how many of the line's tokens the KV is in memory only."""
        return max(line.num_held() - self._num_stored(line), 0)

    def _num_stored(self, line: Line) -> int:
        return self._tiers.saver.stored_tokens(line.transcript.token_ids, line.blocks.namespace)


def _is_part_of(main: Line, other: LineState) -> bool:
    """Whether the other line, of another tokenizer, knows nothing that was taken back here."""
    if other.number or other.messages is None or main.messages is None:
        return True
    return main.messages[: len(other.messages)] == other.messages
