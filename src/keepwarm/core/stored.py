"""What lies on disk: records of KV, and agents as data. Values only; the bytes are elsewhere."""

from dataclasses import dataclass
from functools import cached_property

from keepwarm.core.block import EXACT, BlockHash, root_hash
from keepwarm.core.layout import BLOCK_TOKENS, CacheLayout
from keepwarm.core.ports import Message
from keepwarm.core.transcript import Transcript, Turn


@dataclass(frozen=True)
class KVFamily:
    """What KV must have in common to be interchangeable: the root of a chain of blocks."""

    fingerprint: str
    layout: CacheLayout
    lineage: str = EXACT
    namespace: str = ""

    @cached_property
    def root(self) -> BlockHash:
        return root_hash(
            fingerprint=self.fingerprint, lineage=self.lineage, namespace=self.namespace
        )


@dataclass(frozen=True, slots=True)
class Record:
    """One stored run of tokens within a block: [start, stop) of the block at `depth`.

    A whole block is stored as one record, or as several that follow one another, because a line
    was put away when the block was not full yet. `hash` names everything up to the run's last
    token and so the record; `before` everything before its first one: another record's hash, or
    the root. `parent` is the hash of the block before its own.
    """

    hash: BlockHash
    before: BlockHash
    parent: BlockHash
    depth: int
    start: int
    stop: int

    @property
    def num_tokens(self) -> int:
        return self.stop - self.start

    @property
    def first_position(self) -> int:
        """Of its first token in the line."""
        return self.depth * BLOCK_TOKENS + self.start

    @property
    def end_position(self) -> int:
        """Behind its last token in the line."""
        return self.depth * BLOCK_TOKENS + self.stop


@dataclass(frozen=True, slots=True)
class AgentSettings:
    """What people decide about an agent. `quota_bytes`: of its own blocks on disk, None: any."""

    pinned: bool = False
    priority: int = 0
    quota_bytes: int | None = None
    policy: str = EXACT


DEFAULT_SETTINGS = AgentSettings()


LineKey = tuple[int, str]
"""A line's number and its tokenizer."""


@dataclass(frozen=True, slots=True)
class LineState:
    """A line as it is committed. Line 0 is the agent's main line.

    `tokenizer` names the tokenizer whose ids the transcript holds: the same line may be there once
    for each. `block_hashes` are those of its whole blocks, in order. `last_used` orders lines.
    """

    number: int
    tokenizer: str
    transcript: Transcript
    messages: tuple[Message, ...] | None
    turns: tuple[Turn, ...]
    block_hashes: tuple[BlockHash, ...]
    last_used: int

    @property
    def key(self) -> LineKey:
        """What tells the agent's lines apart."""
        return self.number, self.tokenizer


@dataclass(frozen=True, slots=True)
class AgentState:
    """An agent as it is committed, whole, its lines by their keys; the store writes what is new."""

    agent_id: str
    settings: AgentSettings
    lines: tuple[LineState, ...]


@dataclass(frozen=True, slots=True)
class AgentSummary:
    """An agent as a listing shows it."""

    agent_id: str
    settings: AgentSettings
    num_tokens: int
    num_turns: int
    num_lines: int
    last_used: int


@dataclass(frozen=True, slots=True)
class Saved:
    """A record's bytes are not needed any more: it was written, or given up.

    `retry`: it was not written and should be offered again.
    """

    record_hash: BlockHash
    retry: bool


@dataclass(frozen=True, slots=True)
class Fetched:
    """A record's bytes, checked; None when they were damaged, gone or unreadable.

    `data` lies in the buffer that was handed in.
    """

    ticket: int
    data: memoryview | None


@dataclass(frozen=True, slots=True)
class Committed:
    """An agent's state was written, or the disk refused and it will be tried again."""

    ticket: int
    durable: bool


StoreEvent = Saved | Fetched | Committed


@dataclass(frozen=True, slots=True)
class StoreHealth:
    """The store at one moment, for people and metrics.

    `fault` is what the disk last refused, until a write succeeds again.
    """

    fault: str | None = None
    num_faults: int = 0
    num_damaged: int = 0
    num_records: int = 0
    record_bytes: int = 0
    disk_bytes: int = 0
    budget_bytes: int = 0
    queued_bytes: int = 0
    num_queued: int = 0
    written_bytes: int = 0
    evicted_bytes: int = 0
