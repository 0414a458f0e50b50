"""A store that keeps everything in memory and answers with the next `poll`."""

from collections.abc import Sequence
from dataclasses import dataclass

from keepwarm.core.block import BlockHash, child_hash
from keepwarm.core.layout import BLOCK_TOKENS
from keepwarm.core.stored import (
    AgentState,
    AgentSummary,
    Committed,
    Fetched,
    KVFamily,
    Record,
    Saved,
    StoreEvent,
    StoreHealth,
)


@dataclass(frozen=True, slots=True)
class _Kept:
    record: Record
    data: bytes
    maker: str | None


class MemoryAgentStore:
    """Implements `AgentStore`. An engine that is given it again finds what another one left.

    `refuses` plays a disk that takes nothing; `unreadable` holds records that cannot be read.
    """

    def __init__(self) -> None:
        self.refuses = False
        self.unreadable: set[BlockHash] = set()
        self.num_written_bytes = 0
        self._kept: dict[BlockHash, _Kept] = {}
        self._agents: dict[str, AgentState] = {}
        self._events: list[StoreEvent] = []
        self._num_tickets = 0

    def plan(self, family: KVFamily, parent: BlockHash, token_ids: Sequence[int]) -> list[Record]:
        found: list[Record] = []
        for start in range(0, len(token_ids), BLOCK_TOKENS):
            ids = token_ids[start : start + BLOCK_TOKENS]
            runs = self._runs_of_block(parent, ids)
            found += runs
            if not runs or runs[-1].stop < BLOCK_TOKENS:
                break
            parent = runs[-1].hash
        return found

    def missing_from(self, parent: BlockHash, token_ids: Sequence[int]) -> int:
        runs = self._runs_of_block(parent, token_ids)
        return runs[-1].stop if runs else 0

    def record_bytes(self, family: KVFamily, num_tokens: int) -> int:
        return family.layout.token_bytes * num_tokens

    def accepts(self, nbytes: int) -> bool:
        return not self.refuses

    def save(
        self,
        family: KVFamily,
        record: Record,
        token_ids: Sequence[int],
        pieces: Sequence[memoryview],
        maker: str | None,
    ) -> None:
        if not self.refuses:
            data = b"".join(pieces)
            self._kept[record.hash] = _Kept(record, data, maker)
            self.num_written_bytes += len(data)
        self._events.append(Saved(record.hash, retry=self.refuses))

    def fetch(self, family: KVFamily, record: Record, buffer: bytearray) -> int:
        ticket = self._next_ticket()
        kept = self._kept.get(record.hash)
        if kept is None or record.hash in self.unreadable:
            self._kept.pop(record.hash, None)
            self._events.append(Fetched(ticket, None))
            return ticket
        buffer[: len(kept.data)] = kept.data
        self._events.append(Fetched(ticket, memoryview(buffer)[: len(kept.data)]))
        return ticket

    def clock(self) -> int:
        lines = [line.last_used for state in self._agents.values() for line in state.lines]
        return max(lines, default=0)

    def commit(self, state: AgentState) -> int:
        ticket = self._next_ticket()
        if not self.refuses:
            self._agents[state.agent_id] = state
        self._events.append(Committed(ticket, durable=not self.refuses))
        return ticket

    def delete_agent(self, agent_id: str) -> int:
        ticket = self._next_ticket()
        self._agents.pop(agent_id, None)
        used = {
            block_hash
            for state in self._agents.values()
            for line in state.lines
            for block_hash in line.block_hashes
        }
        self._kept = {
            h: kept for h, kept in self._kept.items() if h in used or kept.maker != agent_id
        }
        self._events.append(Committed(ticket, durable=True))
        return ticket

    def load_agent(self, agent_id: str) -> AgentState | None:
        return self._agents.get(agent_id)

    def summaries(self) -> list[AgentSummary]:
        return [
            AgentSummary(
                agent_id=state.agent_id,
                settings=state.settings,
                num_tokens=state.lines[0].transcript.num_tokens if state.lines else 0,
                num_turns=len(state.lines[0].turns) if state.lines else 0,
                num_lines=len(state.lines),
                last_used=max((line.last_used for line in state.lines), default=0),
            )
            for _, state in sorted(self._agents.items())
        ]

    def poll(self) -> list[StoreEvent]:
        events, self._events = self._events, []
        return events

    def wait(self, timeout_s: float) -> None:
        """There is never anything to wait for."""

    def health(self) -> StoreHealth:
        return StoreHealth(num_records=len(self._kept), written_bytes=self.num_written_bytes)

    def check(self) -> None:
        """A dictionary contradicts itself in no way."""

    def _runs_of_block(self, parent: BlockHash, token_ids: Sequence[int]) -> list[Record]:
        for stop in range(len(token_ids), 0, -1):
            runs = self._chain(child_hash(parent, token_ids[:stop]))
            if runs:
                return runs
        return []

    def _chain(self, record_hash: BlockHash) -> list[Record]:
        runs: list[Record] = []
        while (kept := self._kept.get(record_hash)) is not None:
            runs.insert(0, kept.record)
            if kept.record.start == 0:
                return runs
            record_hash = kept.record.before
        return []

    def _next_ticket(self) -> int:
        self._num_tickets += 1
        return self._num_tickets
