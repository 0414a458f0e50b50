"""Which lines use which blocks, and what was decided about their agents: pins and quotas."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from keepwarm.core.block import BlockHash
from keepwarm.core.errors import InvariantBroken
from keepwarm.core.stored import DEFAULT_SETTINGS, AgentSettings, AgentState, LineKey


@dataclass(frozen=True, slots=True)
class _Tables:
    """An agent's block tables as they were committed last."""

    settings: AgentSettings
    hashes_of: dict[LineKey, tuple[BlockHash, ...]]

    @classmethod
    def of(cls, state: AgentState) -> "_Tables":
        tables = {line.key: line.block_hashes for line in state.lines}
        return cls(state.settings, tables)

    def hashes(self) -> Iterator[BlockHash]:
        for hashes in self.hashes_of.values():
            yield from hashes


class Usage:
    """Counts the users of blocks, stored or not. An agent's tables are known once it is used."""

    def __init__(self) -> None:
        self._num_users: Counter[BlockHash] = Counter()
        self._num_pins: Counter[BlockHash] = Counter()
        self._agents: dict[str, _Tables] = {}

    def load(self, num_users: Counter[BlockHash]) -> None:
        """Take the counts of all committed lines, whose agents `know` brings one by one."""
        self._num_users = num_users

    def know(self, state: AgentState) -> None:
        """Take the tables of an agent whose lines were counted by `load`."""
        if state.agent_id not in self._agents:
            tables = self._agents[state.agent_id] = _Tables.of(state)
            if tables.settings.pinned:
                self._num_pins.update(tables.hashes())

    def change(self, state: AgentState) -> bool:
        """Take the agent's new tables. Returns whether anything stopped being pinned."""
        old = self._agents.get(state.agent_id, _Tables(DEFAULT_SETTINGS, {}))
        new = self._agents[state.agent_id] = _Tables.of(state)
        added, removed = _differences(old, new)
        self._num_users.update(added)
        if new.settings.pinned:
            self._num_pins.update(added if old.settings.pinned else new.hashes())
        self._take(self._num_users, removed)
        if old.settings.pinned:
            unpinned = removed if new.settings.pinned else list(old.hashes())
            self._take(self._num_pins, unpinned)
        return old.settings.pinned and (bool(removed) or not new.settings.pinned)

    def forget(self, agent_id: str) -> list[BlockHash]:
        """Forget an agent that is gone. Returns the blocks of its tables."""
        old = self._agents.pop(agent_id, None)
        if old is None:
            return []
        hashes = list(old.hashes())
        self._take(self._num_users, hashes)
        if old.settings.pinned:
            self._take(self._num_pins, hashes)
        return hashes

    def is_used(self, block_hash: BlockHash) -> bool:
        return block_hash in self._num_users

    def is_pinned(self, block_hash: BlockHash, maker: str | None) -> bool:
        """Whether a pinned agent uses the block, or made it."""
        if block_hash in self._num_pins:
            return True
        tables = self._agents.get(maker) if maker is not None else None
        return tables is not None and tables.settings.pinned

    def quota_of(self, agent_id: str | None) -> int | None:
        tables = self._agents.get(agent_id) if agent_id is not None else None
        return None if tables is None else tables.settings.quota_bytes

    def check(self) -> None:
        """Raise InvariantBroken unless pins and counts agree with the agents' tables."""
        pins = Counter(
            block_hash
            for tables in self._agents.values()
            if tables.settings.pinned
            for block_hash in tables.hashes()
        )
        if pins != self._num_pins:
            raise InvariantBroken("the pins are not those of the pinned agents' tables")
        if any(count < 1 for count in self._num_users.values()):
            raise InvariantBroken("a block is counted with no user")

    def _take(self, counts: Counter[BlockHash], hashes: list[BlockHash]) -> None:
        """Count each of the hashes down by one."""
        counts.subtract(hashes)
        for block_hash in set(hashes):
            if counts[block_hash] == 0:
                del counts[block_hash]


def _differences(old: _Tables, new: _Tables) -> tuple[list[BlockHash], list[BlockHash]]:
    """Return the blocks that only the new tables name, and those that only the old ones do."""
    added: list[BlockHash] = []
    removed: list[BlockHash] = []
    for key in old.hashes_of.keys() | new.hashes_of.keys():
        before, after = old.hashes_of.get(key, ()), new.hashes_of.get(key, ())
        num_shared = _num_shared(before, after)
        added += after[num_shared:]
        removed += before[num_shared:]
    return added, removed


def _num_shared(a: tuple[BlockHash, ...], b: tuple[BlockHash, ...]) -> int:
    """Return how many leading hashes are equal: chains with one hash in common share all before."""
    length = min(len(a), len(b))
    while length and a[length - 1] != b[length - 1]:
        length -= 1
    return length
