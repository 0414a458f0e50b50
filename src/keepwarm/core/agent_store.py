"""What an engine asks of a durable store, as three ports: records of KV, agents, bundles.

`store.AgentCacheStore` and `testing.MemoryAgentStore` implement all three, `NoStore` by keeping
nothing. Every call comes from the engines' one thread and returns at once, but for those that read
an agent (`load_agent` to `num_stored`) and `wait`. A call that the disk has to answer is given the
function to answer to, or returns a ticket; `poll` answers, in the order in which answers came.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from keepwarm.core.block import BlockHash
from keepwarm.core.errors import DamagedAgent, NoAgentStore
from keepwarm.core.stored import (
    AgentState,
    AgentSummary,
    Bundle,
    BundleRead,
    BundleStored,
    BundleTerms,
    BundleWritten,
    KVFamily,
    Record,
    Saved,
    StoreHealth,
)

T = TypeVar("T")
BundleAnswer = TypeVar("BundleAnswer", BundleWritten, BundleRead, BundleStored)


class RecordStore(Protocol):
    """Keeps records of KV. It may forget a record; it never gives a wrong one."""

    def plan(self, family: KVFamily, parent: BlockHash, token_ids: Sequence[int]) -> list[Record]:
        """Return the records that follow `parent` and hold the first of `token_ids`, in order."""
        ...

    def missing_from(self, parent: BlockHash, token_ids: Sequence[int]) -> int:
        """Return how many of one block's first tokens are stored, or about to be."""
        ...

    def record_bytes(self, family: KVFamily, num_tokens: int) -> int:
        """Return how large a buffer for such a record must be."""
        ...

    def accepts(self, nbytes: int) -> bool:
        """Whether `save` would take `nbytes` now: the queue has room and the disk works."""
        ...

    def save(
        self,
        family: KVFamily,
        record: Record,
        token_ids: Sequence[int],
        pieces: Sequence[memoryview],
        maker: str | None,
        answer: Callable[[Saved], object],
    ) -> None:
        """Write the record in the background; `pieces` must not change until that is answered.

        `token_ids` are its block's, up to the run's end. Its bytes count against the agent `maker`.
        """
        ...

    def fetch(
        self,
        family: KVFamily,
        record: Record,
        buffer: bytearray,
        answer: Callable[[memoryview | None], object],
    ) -> None:
        """Read the record into `buffer`, check it, and answer with the part that holds its data.

        None where the record was damaged, gone or unreadable.
        """
        ...

    def drop(self, hashes: Iterable[BlockHash], *, if_unused: bool = False) -> None:
        """Forget these records; with `if_unused` only those that no committed line names."""
        ...

    def clock(self) -> int:
        """Return the highest `LineState.last_used` that was ever committed."""
        ...


class AgentLog(Protocol):
    """Keeps what was said to agents and decided about them, one `AgentState` each."""

    def commit(self, state: AgentState, answer: Callable[[bool], object]) -> None:
        """Write what is new of the agent, and answer whether it is durable.

        A state that the disk refused is tried again until the disk takes it or a newer one comes.
        """
        ...

    def delete_agent(self, agent_id: str, answer: Callable[[bool], object]) -> None:
        """Remove the agent and the records that only it used; answer whether they are gone.

        Where the disk refuses, the agent stays as it is, and its deletion is not tried again.
        """
        ...

    def is_durable(self, agent_id: str) -> bool:
        """Whether the disk has everything that was committed of the agent."""
        ...

    def load_agent(self, agent_id: str) -> AgentState | None:
        """Return the agent as it was last committed, or is about to be. Raises DamagedAgent."""
        ...

    def salvage_agent(self, agent_id: str) -> AgentState:
        """Return what can be read of a damaged agent. Raises DamagedAgent where that is nothing."""
        ...

    def summaries(self) -> list[AgentSummary]:
        """Return a summary of every agent, damaged ones included."""
        ...

    def models(self) -> dict[str, str]:
        """Return the model that each agent talked to last, by name; empty for the default one."""
        ...

    def num_stored(self, agent_id: str) -> int:
        """Return how many of the first tokens of the agent's main line have their KV here.

        Reads a few rows and not the agent. A whole block that is stored in part counts nothing.
        """
        ...


class BundleTicket(Generic[BundleAnswer]):
    """One bundle that the store is asked to write, read or store. `answer` is None until `poll`."""

    def __init__(self, cancel: Callable[[], object]) -> None:
        """`cancel` stops the work, and undoes what it has done."""
        self.answer: BundleAnswer | None = None
        self.is_cancelled = False
        self._cancel = cancel

    def put(self, answer: BundleAnswer) -> None:
        """Answer the ticket, unless it was cancelled."""
        if not self.is_cancelled:
            self.answer = answer

    def end(self, undo: Callable[[], object]) -> None:
        """Note that the work has ended: cancelling undoes it from now on, or now if it was
        cancelled.
        """
        self._cancel = undo
        if self.is_cancelled:
            undo()

    def cancel(self) -> None:
        """Remove what was written of the file, or stored of the records; no answer follows."""
        if not self.is_cancelled:
            self.is_cancelled, self.answer = True, None
            self._cancel()


class BundleStore(Protocol):
    """Moves agents with their KV into files and out of files."""

    def write_bundle(
        self, family: KVFamily, tokenizer: str, state: AgentState, path: Path
    ) -> BundleTicket[BundleWritten]:
        """Write the agent and the records of its lines in this tokenizer's ids into one file.

        A line's records are those of `family` in the line's namespace; saves that were asked for
        before are in it. Raises NoAgentStore where nothing is stored at all.
        """
        ...

    def read_bundle(self, path: Path, terms: BundleTerms) -> BundleTicket[BundleRead]:
        """Check a file, which may be hostile. Stores nothing. Raises NoAgentStore."""
        ...

    def store_bundle(self, bundle: Bundle, agent_id: str) -> BundleTicket[BundleStored]:
        """Store the records of a bundle for this agent, which a `commit` adds later.

        Records that budget, quota or disk refuse are left out. Raises NoAgentStore.
        """
        ...


class AgentStore(RecordStore, AgentLog, BundleStore, Protocol):
    """One store behind the three ports, and what concerns it as a whole."""

    def poll(self) -> None:
        """Answer what the disk has done since the last call."""
        ...

    def wait(self, timeout_s: float) -> None:
        """Wait until `poll` has something to answer, or has had since the last wait."""
        ...

    def ask_again(self) -> None:
        """Try a disk that has refused now, and not only after its pause."""
        ...

    def health(self) -> StoreHealth:
        """Return what people and metrics want to know of the store."""
        ...

    def check(self) -> None:
        """Raise InvariantBroken where the bookkeeping contradicts itself."""
        ...


class Answers:
    """Owns a store's answers until its `poll` delivers them, in order.

    What is called with an answer may ask or poll the store again: the order stays the same.
    """

    def __init__(self) -> None:
        self._due: deque[Callable[[], object]] = deque()
        self._is_news = False

    def add(self, answer: Callable[[T], object], value: T) -> None:
        self._due.append(partial(answer, value))
        self._is_news = True

    def deliver(self) -> None:
        while self._due:
            self._due.popleft()()

    def take_news(self) -> bool:
        """Whether an answer was added since the last call.

        Several engines poll one store, and any of them delivers the answers of all: so the engine
        that waits next has perhaps been answered already.
        """
        is_news, self._is_news = self._is_news, False
        return is_news


class NoStore:
    """Implements `AgentStore` by keeping nothing: agents live as long as the process."""

    def __init__(self) -> None:
        self._answers = Answers()

    def plan(self, family: KVFamily, parent: BlockHash, token_ids: Sequence[int]) -> list[Record]:
        return []

    def missing_from(self, parent: BlockHash, token_ids: Sequence[int]) -> int:
        """Return that all is stored: nothing is offered then to a store that keeps nothing."""
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
        answer: Callable[[Saved], object],
    ) -> None:
        self._answers.add(answer, Saved.GIVEN_UP)

    def fetch(
        self,
        family: KVFamily,
        record: Record,
        buffer: bytearray,
        answer: Callable[[memoryview | None], object],
    ) -> None:
        self._answers.add(answer, None)

    def drop(self, hashes: Iterable[BlockHash], *, if_unused: bool = False) -> None:
        return

    def clock(self) -> int:
        return 0

    def commit(self, state: AgentState, answer: Callable[[bool], object]) -> None:
        self._answers.add(answer, False)

    def delete_agent(self, agent_id: str, answer: Callable[[bool], object]) -> None:
        """Answer that it is gone: an agent that was never kept cannot come back."""
        self._answers.add(answer, True)

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

    def write_bundle(
        self, family: KVFamily, tokenizer: str, state: AgentState, path: Path
    ) -> BundleTicket[BundleWritten]:
        raise NoAgentStore("exporting an agent")

    def read_bundle(self, path: Path, terms: BundleTerms) -> BundleTicket[BundleRead]:
        raise NoAgentStore("importing an agent")

    def store_bundle(self, bundle: Bundle, agent_id: str) -> BundleTicket[BundleStored]:
        raise NoAgentStore("importing an agent")

    def poll(self) -> None:
        self._answers.deliver()

    def wait(self, timeout_s: float) -> None:
        return

    def ask_again(self) -> None:
        return

    def health(self) -> StoreHealth:
        return StoreHealth()

    def check(self) -> None:
        return
