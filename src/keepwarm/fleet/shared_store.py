"""One store for several engines: each hears of what it asked for, and of nothing else."""

from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path

from keepwarm.core.agent_store import AgentStore
from keepwarm.core.block import BlockHash
from keepwarm.core.stored import (
    AgentState,
    AgentSummary,
    Bundle,
    BundleTerms,
    KVFamily,
    Record,
    Saved,
    StoreEvent,
    StoreHealth,
)


class SharedStore:
    """Owns who asked for what. All its shares are used from the one thread of the store's owner."""

    def __init__(self, store: AgentStore) -> None:
        self.store = store
        self._waiting: dict[int | BlockHash, StoreShare] = {}

    def share(self) -> "StoreShare":
        return StoreShare(self)

    def expect(self, key: int | BlockHash, share: "StoreShare") -> None:
        """The event with this ticket, or of this record, is for that share."""
        self._waiting[key] = share

    def forget(self, ticket: int) -> None:
        """No event comes for it any more."""
        self._waiting.pop(ticket, None)

    def sort(self) -> None:
        """Give each share its events."""
        for event in self.store.poll():
            key = event.record_hash if isinstance(event, Saved) else event.ticket
            share = self._waiting.pop(key, None)
            if share is not None:
                share.events.append(event)


class StoreShare:
    """Implements `AgentStore` for one engine."""

    def __init__(self, shared: SharedStore) -> None:
        self.events: deque[StoreEvent] = deque()
        self._shared = shared
        self._store = shared.store

    def plan(self, family: KVFamily, parent: BlockHash, token_ids: Sequence[int]) -> list[Record]:
        return self._store.plan(family, parent, token_ids)

    def missing_from(self, parent: BlockHash, token_ids: Sequence[int]) -> int:
        return self._store.missing_from(parent, token_ids)

    def record_bytes(self, family: KVFamily, num_tokens: int) -> int:
        return self._store.record_bytes(family, num_tokens)

    def accepts(self, nbytes: int) -> bool:
        return self._store.accepts(nbytes)

    def save(
        self,
        family: KVFamily,
        record: Record,
        token_ids: Sequence[int],
        pieces: Sequence[memoryview],
        maker: str | None,
    ) -> None:
        self._shared.expect(record.hash, self)
        self._store.save(family, record, token_ids, pieces, maker)

    def fetch(self, family: KVFamily, record: Record, buffer: bytearray) -> int:
        return self._expected(self._store.fetch(family, record, buffer))

    def drop(self, hashes: Iterable[BlockHash], *, if_unused: bool = False) -> None:
        self._store.drop(hashes, if_unused=if_unused)

    def clock(self) -> int:
        return self._store.clock()

    def commit(self, state: AgentState) -> int:
        return self._expected(self._store.commit(state))

    def delete_agent(self, agent_id: str) -> int:
        return self._expected(self._store.delete_agent(agent_id))

    def is_durable(self, agent_id: str) -> bool:
        return self._store.is_durable(agent_id)

    def load_agent(self, agent_id: str) -> AgentState | None:
        return self._store.load_agent(agent_id)

    def salvage_agent(self, agent_id: str) -> AgentState:
        return self._store.salvage_agent(agent_id)

    def summaries(self) -> list[AgentSummary]:
        return self._store.summaries()

    def models(self) -> dict[str, str]:
        return self._store.models()

    def num_stored(self, agent_id: str) -> int:
        return self._store.num_stored(agent_id)

    def write_bundle(self, family: KVFamily, tokenizer: str, state: AgentState, path: Path) -> int:
        return self._expected(self._store.write_bundle(family, tokenizer, state, path))

    def read_bundle(self, path: Path, terms: BundleTerms) -> int:
        return self._expected(self._store.read_bundle(path, terms))

    def store_bundle(self, bundle: Bundle, agent_id: str) -> int:
        return self._expected(self._store.store_bundle(bundle, agent_id))

    def call_off(self, ticket: int) -> None:
        self._shared.forget(ticket)
        self._store.call_off(ticket)

    def remove_bundle(self, path: Path) -> None:
        self._store.remove_bundle(path)

    def poll(self) -> list[StoreEvent]:
        self._shared.sort()
        events = list(self.events)
        self.events.clear()
        return events

    def wait(self, timeout_s: float) -> None:
        if not self.events:
            self._store.wait(timeout_s)

    def ask_again(self) -> None:
        self._store.ask_again()

    def health(self) -> StoreHealth:
        return self._store.health()

    def check(self) -> None:
        self._store.check()

    def _expected(self, ticket: int) -> int:
        self._shared.expect(ticket, self)
        return ticket
