"""What the engine needs of a durable store. Real: `store.AgentCacheStore`; fake: `testing`."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from keepwarm.core.block import BlockHash
from keepwarm.core.errors import DamagedAgent, NoAgentStore
from keepwarm.core.stored import (
    AgentState,
    AgentSummary,
    Bundle,
    BundleTerms,
    Committed,
    Fetched,
    KVFamily,
    Record,
    Saved,
    StoreEvent,
    StoreHealth,
)


class AgentStore(Protocol):
    """Keeps records of KV and agents' states. It may forget a record; it never gives a wrong one.

    Called from the engine's thread only. Nothing here waits for a disk but `load_agent`,
    `summaries`, `models`, `num_stored` and `wait`; what was asked for comes back as events of
    `poll`.
    """

    # -- KV --------------------------------------------------------------------------------------

    def plan(self, family: KVFamily, parent: BlockHash, token_ids: Sequence[int]) -> list[Record]:
        """The records that follow `parent` and hold the first of `token_ids`, in order."""
        ...

    def missing_from(self, parent: BlockHash, token_ids: Sequence[int]) -> int:
        """From which position on one block's tokens are not stored, nor about to be."""
        ...

    def record_bytes(self, family: KVFamily, num_tokens: int) -> int:
        """A size in bytes that a buffer for such a record must have."""
        ...

    def accepts(self, nbytes: int) -> bool:
        """Whether `save` would take so many bytes now: the queue has room and the disk works."""
        ...

    def save(
        self,
        family: KVFamily,
        record: Record,
        token_ids: Sequence[int],
        pieces: Sequence[memoryview],
        maker: str | None,
    ) -> None:
        """Write the record in the background; `pieces` must not change until it is `Saved`.

        `token_ids` are those of its block, up to the run's end. `maker` is the agent it is of.
        """
        ...

    def fetch(self, family: KVFamily, record: Record, buffer: bytearray) -> int:
        """Read the record into `buffer` and check it; a ticket for its `Fetched`."""
        ...

    def drop(self, hashes: Iterable[BlockHash], *, if_unused: bool = False) -> None:
        """Forget these records; with `if_unused` but those that a committed line's table names."""
        ...

    def clock(self) -> int:
        """The last `LineState.last_used` that was committed."""
        ...

    # -- agents ----------------------------------------------------------------------------------

    def commit(self, state: AgentState) -> int:
        """Write what is new of the agent, durably; a ticket for its `Committed`."""
        ...

    def delete_agent(self, agent_id: str) -> int:
        """The agent, and the records that only it used, go for good; a ticket as for `commit`.

        Where the disk refuses, the agent and its records stay as they are, and it is not tried
        again.
        """
        ...

    def is_durable(self, agent_id: str) -> bool:
        """Whether the disk has everything that was committed of the agent."""
        ...

    def load_agent(self, agent_id: str) -> AgentState | None:
        """The agent as it was last committed, or is about to be. Raises DamagedAgent."""
        ...

    def salvage_agent(self, agent_id: str) -> AgentState:
        """What can be read of a damaged agent. Raises DamagedAgent where that is nothing."""
        ...

    def summaries(self) -> list[AgentSummary]:
        """All agents, damaged ones as well."""
        ...

    def models(self) -> dict[str, str]:
        """By agent, the name of the model that it talked to last; empty for the default one."""
        ...

    def num_stored(self, agent_id: str) -> int:
        """How many of the first tokens of the agent's main line have their KV here.

        A few rows are read for it, and not the agent. Of a whole block that is there in part
        nothing is counted.
        """
        ...

    # -- bundles ---------------------------------------------------------------------------------

    def write_bundle(self, family: KVFamily, tokenizer: str, state: AgentState, path: Path) -> int:
        """The agent and the records of its lines in this tokenizer's ids, as one file.

        A line's records are those of `family` in the line's namespace, behind all saves so far.
        A ticket for its `BundleWritten`. Raises NoAgentStore where nothing is stored at all.
        """
        ...

    def read_bundle(self, path: Path, terms: BundleTerms) -> int:
        """Check a file that nobody vouches for; a ticket for its `BundleRead`. Stores nothing."""
        ...

    def store_bundle(self, bundle: Bundle, agent_id: str) -> int:
        """Store the records of a bundle for this agent; a ticket for its `BundleStored`.

        Those that budget, quota or disk refuse are left out. The agent itself is for `commit`.
        """
        ...

    def call_off(self, ticket: int) -> None:
        """Stop working at a bundle: its ticket is not answered.

        What was written of its file, or stored of its records, is removed.
        """
        ...

    def remove_bundle(self, path: Path) -> None:
        """Remove a file that was written and is not wanted any more."""
        ...

    # -- the whole -------------------------------------------------------------------------------

    def poll(self) -> list[StoreEvent]:
        """What has happened since the last call."""
        ...

    def wait(self, timeout_s: float) -> None:
        """Wait until `poll` would return something, at most so long."""
        ...

    def ask_again(self) -> None:
        """Try a disk that has refused again now, and not only after a while."""
        ...

    def health(self) -> StoreHealth: ...

    def check(self) -> None: ...


class NoStore:
    """Implements `AgentStore` by keeping nothing: agents live as long as the process."""

    def __init__(self) -> None:
        self._events: list[StoreEvent] = []
        self._num_tickets = 0

    def plan(self, family: KVFamily, parent: BlockHash, token_ids: Sequence[int]) -> list[Record]:
        return []

    def missing_from(self, parent: BlockHash, token_ids: Sequence[int]) -> int:
        """Nothing is missed by who keeps nothing."""
        return len(token_ids)

    def record_bytes(self, family: KVFamily, num_tokens: int) -> int:
        return 0

    def accepts(self, nbytes: int) -> bool:
        return False

    def save(
        self,
        family: KVFamily,
        record: Record,
        token_ids: Sequence[int],
        pieces: Sequence[memoryview],
        maker: str | None,
    ) -> None:
        self._events.append(Saved(record.hash, retry=False))

    def fetch(self, family: KVFamily, record: Record, buffer: bytearray) -> int:
        ticket = self._next_ticket()
        self._events.append(Fetched(ticket, None))
        return ticket

    def drop(self, hashes: Iterable[BlockHash], *, if_unused: bool = False) -> None:
        return

    def clock(self) -> int:
        return 0

    def commit(self, state: AgentState) -> int:
        ticket = self._next_ticket()
        self._events.append(Committed(ticket, durable=False))
        return ticket

    def delete_agent(self, agent_id: str) -> int:
        """What was never kept cannot come back."""
        ticket = self._next_ticket()
        self._events.append(Committed(ticket, durable=True))
        return ticket

    def is_durable(self, agent_id: str) -> bool:
        return False

    def load_agent(self, agent_id: str) -> AgentState | None:
        return None

    def salvage_agent(self, agent_id: str) -> AgentState:
        raise DamagedAgent(agent_id, "nothing of it is stored")

    def summaries(self) -> list[AgentSummary]:
        return []

    def models(self) -> dict[str, str]:
        return {}

    def num_stored(self, agent_id: str) -> int:
        return 0

    def write_bundle(self, family: KVFamily, tokenizer: str, state: AgentState, path: Path) -> int:
        raise NoAgentStore("exporting an agent")

    def read_bundle(self, path: Path, terms: BundleTerms) -> int:
        raise NoAgentStore("importing an agent")

    def store_bundle(self, bundle: Bundle, agent_id: str) -> int:
        raise NoAgentStore("importing an agent")

    def call_off(self, ticket: int) -> None:
        return

    def remove_bundle(self, path: Path) -> None:
        return

    def poll(self) -> list[StoreEvent]:
        events, self._events = self._events, []
        return events

    def wait(self, timeout_s: float) -> None:
        return

    def ask_again(self) -> None:
        return

    def health(self) -> StoreHealth:
        return StoreHealth()

    def check(self) -> None:
        return

    def _next_ticket(self) -> int:
        self._num_tickets += 1
        return self._num_tickets
