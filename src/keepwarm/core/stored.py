"""Records of KV, agents as data and bundles: the values that engines and store exchange."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum, StrEnum, auto
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from keepwarm.core.block import EXACT, BlockHash, child_hash, root_hash
from keepwarm.core.errors import KeepwarmError
from keepwarm.core.layout import BLOCK_TOKENS, CacheLayout
from keepwarm.core.ports import Message
from keepwarm.core.transcript import Transcript, Turn


@dataclass(frozen=True)
class KVFamily:
    """The facts that KV must share to be interchangeable: they name the root of its blocks."""

    fingerprint: str
    layout: CacheLayout
    lineage: str = EXACT
    namespace: str = ""

    @cached_property
    def root(self) -> BlockHash:
        return root_hash(
            fingerprint=self.fingerprint, lineage=self.lineage, namespace=self.namespace
        )


class Record(NamedTuple):
    """One stored run of tokens within a block: [start, stop) of the block at `depth`.

    A whole block is stored as one record, or as several that follow one another, because a line
    was put away when the block was not full yet. `hash` names everything up to the run's last
    token and so the record; `before` everything before its first one: another record's hash, or
    the root. `parent` is the hash of the block before its own. A tuple, because a store that is
    opened makes one for each of its records.
    """

    hash: BlockHash
    before: BlockHash
    parent: BlockHash
    depth: int
    start: int
    stop: int

    @classmethod
    def of_run(
        cls, parent: BlockHash, depth: int, token_ids: Sequence[int], *, start: int = 0
    ) -> "Record":
        """Return the run from `start` on of the block behind `parent` that holds `token_ids`."""
        before = child_hash(parent, token_ids[:start]) if start else parent
        return cls(child_hash(parent, token_ids), before, parent, depth, start, len(token_ids))

    @property
    def num_tokens(self) -> int:
        return self.stop - self.start

    @property
    def first_position(self) -> int:
        """The position of its first token in the line."""
        return self.depth * BLOCK_TOKENS + self.start

    @property
    def end_position(self) -> int:
        """The position behind its last token in the line."""
        return self.depth * BLOCK_TOKENS + self.stop


class Overflow(StrEnum):
    """What an agent does when its conversation outgrows the context.

    It refuses the message, or forgets its oldest turns and keeps its system prompt.
    """

    ERROR = "error"
    DROP_OLDEST = "drop_oldest"


MAX_QUOTA_BYTES = 1 << 62


@dataclass(frozen=True, slots=True)
class AgentSettings:
    """The settings of an agent.

    `quota_bytes` bounds what its own blocks take on disk; None: nothing does. `overflow`: what
    happens when its conversation outgrows the model's context.
    """

    pinned: bool = False
    priority: int = 0
    quota_bytes: int | None = None
    policy: str = EXACT
    overflow: Overflow = Overflow.ERROR

    def of_fork(self) -> "AgentSettings":
        """Return a fork's settings: its parent's, but pins are decided for each agent."""
        return replace(self, pinned=False)


DEFAULT_SETTINGS = AgentSettings()


LineKey = tuple[int, str]
"""A line's number and its tokenizer."""


@dataclass(frozen=True, slots=True)
class LineState:
    """A line as it is committed. Line 0 is the agent's main line.

    `tokenizer` names the tokenizer whose ids the transcript holds: the same line may be there once
    for each. `block_hashes` name its whole blocks, in order. `last_used` orders lines.
    `namespace` is its KV's; a line that came in a bundle has one of its own until it is verified.
    """

    number: int
    tokenizer: str
    transcript: Transcript
    messages: tuple[Message, ...] | None
    turns: tuple[Turn, ...]
    block_hashes: tuple[BlockHash, ...]
    last_used: int
    namespace: str = ""

    @property
    def key(self) -> LineKey:
        """The key that tells the agent's lines apart."""
        return self.number, self.tokenizer


@dataclass(frozen=True, slots=True)
class AgentState:
    """An agent as it is committed, whole, its lines by their keys; the store writes what is new.

    `model` is the name of the model that it talked to last; empty for the server's default one.
    `has_fixed_main`: messages were appended to its main line, which therefore stays the main line.
    """

    agent_id: str
    settings: AgentSettings
    lines: tuple[LineState, ...]
    model: str = ""
    has_fixed_main: bool = False

    @property
    def mains(self) -> tuple[LineState, ...]:
        """The main line, once for each tokenizer that has it."""
        return tuple(line for line in self.lines if line.number == 0)

    @property
    def last_used(self) -> int:
        return max(line.last_used for line in self.lines)


@dataclass(frozen=True, slots=True)
class AgentSummary:
    """An agent as a listing shows it. `is_private`: its main line is not verified yet.

    `damage`: why it cannot be read; all else but its name means nothing then.
    """

    agent_id: str
    settings: AgentSettings
    num_tokens: int
    num_turns: int
    num_lines: int
    last_used: int
    is_private: bool = False
    model: str = ""
    damage: str = ""


@dataclass(frozen=True, slots=True)
class BundleTerms:
    """What an engine can use of a bundle: KV of this family, and lines of this tokenizer.

    `family` has the namespace that the bundle's KV gets; its other facts must be the bundle's own.
    """

    family: KVFamily
    tokenizer: str
    vocab_size: int


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle that was read and checked to its end; nothing of it is stored yet.

    `records` are named as they will be stored, each behind the one before it; `num_dropped` more
    are of another family. Lines of the terms' tokenizer have the terms' namespace where there are
    records; the engine sets `last_used` and `block_hashes`.
    """

    path: Path
    terms: BundleTerms
    state: AgentState
    records: tuple[Record, ...]
    num_dropped: int
    file_bytes: int


class Saved(Enum):
    """What has become of a record that was to be saved: its bytes are not needed any more."""

    WRITTEN = auto()
    GIVEN_UP = auto()
    """Budget or quota have no room for it: it is not worth another try."""
    REFUSED = auto()
    """The disk has not taken it: it should be offered again."""


@dataclass(frozen=True, slots=True)
class BundleWritten:
    """An agent is in one file; or `error` says why not, and there is no file."""

    file_bytes: int = 0
    num_records: int = 0
    error: KeepwarmError | None = None


@dataclass(frozen=True, slots=True)
class BundleRead:
    """A bundle is sound; or `error` says what is wrong with it."""

    bundle: Bundle | None = None
    error: KeepwarmError | None = None


@dataclass(frozen=True, slots=True)
class BundleStored:
    """The first `num_records` of a bundle's records were stored; after a BadBundle none was."""

    num_records: int = 0
    error: KeepwarmError | None = None


@dataclass(frozen=True, slots=True)
class StoreHealth:
    """The store at one moment, for people and metrics.

    `fault` says what the disk last refused, until a write succeeds again. `notices` say what was
    lost or damaged, as long as that matters.
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
    notices: tuple[str, ...] = ()
