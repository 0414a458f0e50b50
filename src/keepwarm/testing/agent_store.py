"""A store of agents that keeps everything in memory and answers with the next `poll`."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from pathlib import Path

from keepwarm.core.agent import PRIVATE
from keepwarm.core.agent_store import Answers, BundleAnswer, BundleTicket
from keepwarm.core.block import BlockHash, child_hash
from keepwarm.core.errors import BadBundle, BundleFailed, DamagedAgent
from keepwarm.core.layout import BLOCK_TOKENS
from keepwarm.core.stored import (
    AgentState,
    AgentSummary,
    Bundle,
    BundleRead,
    BundleStored,
    BundleTerms,
    BundleWritten,
    KVFamily,
    LineState,
    Record,
    Saved,
    StoreHealth,
)


@dataclass(frozen=True, slots=True)
class _Kept:
    record: Record
    data: bytes
    maker: str | None


@dataclass(frozen=True, slots=True)
class _Bundled:
    """The content of the file that an export would write."""

    family: KVFamily
    tokenizer: str
    state: AgentState
    kept: dict[BlockHash, _Kept]

    @property
    def file_bytes(self) -> int:
        return sum(len(kept.data) for kept in self.kept.values())


class MemoryAgentStore:
    """Implements `AgentStore`. An engine that is given it again finds what another one left.

    `refuses` plays a disk that takes nothing; `unreadable` holds records, and `damaged` agents,
    that cannot be read. Bundles are no files: stores with the same `bundles` share them.
    """

    def __init__(self, bundles: dict[Path, _Bundled] | None = None) -> None:
        self._bundles = {} if bundles is None else bundles
        self.refuses = False
        self.unreadable: set[BlockHash] = set()
        self.damaged: set[str] = set()
        self.num_written_bytes = 0
        self._kept: dict[BlockHash, _Kept] = {}
        self._agents: dict[str, AgentState] = {}
        self._refused: set[str] = set()
        self._answers = Answers()

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
        answer: Callable[[Saved], object],
    ) -> None:
        if self.refuses:
            self._answers.add(answer, Saved.REFUSED)
            return
        data = b"".join(pieces)
        self._kept[record.hash] = _Kept(record, data, maker)
        self.num_written_bytes += len(data)
        self._answers.add(answer, Saved.WRITTEN)

    def fetch(
        self,
        family: KVFamily,
        record: Record,
        buffer: bytearray,
        answer: Callable[[memoryview | None], object],
    ) -> None:
        kept = self._kept.get(record.hash)
        if kept is None or record.hash in self.unreadable:
            self._kept.pop(record.hash, None)
            self._answers.add(answer, None)
            return
        buffer[: len(kept.data)] = kept.data
        self._answers.add(answer, memoryview(buffer)[: len(kept.data)])

    def drop(self, hashes: Iterable[BlockHash], *, if_unused: bool = False) -> None:
        used = self._used() if if_unused else set()
        for record_hash in set(hashes) - used:
            self._kept.pop(record_hash, None)

    def clock(self) -> int:
        lines = [line.last_used for state in self._agents.values() for line in state.lines]
        return max(lines, default=0)

    def commit(self, state: AgentState, answer: Callable[[bool], object]) -> None:
        if self.refuses:
            self._refused.add(state.agent_id)
        else:
            self._agents[state.agent_id] = state
            self._refused.discard(state.agent_id)
        self._answers.add(answer, not self.refuses)

    def delete_agent(self, agent_id: str, answer: Callable[[bool], object]) -> None:
        self._answers.add(answer, not self.refuses)
        if self.refuses:
            return
        self._agents.pop(agent_id, None)
        self._refused.discard(agent_id)
        self.damaged.discard(agent_id)
        used = self._used()
        self._kept = {
            h: kept for h, kept in self._kept.items() if h in used or kept.maker != agent_id
        }

    def is_durable(self, agent_id: str) -> bool:
        return agent_id not in self._refused

    def load_agent(self, agent_id: str) -> AgentState | None:
        if agent_id in self.damaged:
            raise DamagedAgent(agent_id, "it was said to be")
        return self._agents.get(agent_id)

    def salvage_agent(self, agent_id: str) -> AgentState:
        if agent_id not in self._agents:
            raise DamagedAgent(agent_id, "nothing of it can be read")
        return self._agents[agent_id]

    def summaries(self) -> list[AgentSummary]:
        return [
            AgentSummary(
                agent_id=state.agent_id,
                settings=state.settings,
                num_tokens=state.lines[0].transcript.num_tokens if state.lines else 0,
                num_turns=len(state.lines[0].turns) if state.lines else 0,
                num_lines=len(state.lines),
                last_used=max((line.last_used for line in state.lines), default=0),
                is_private=any(
                    line.namespace.startswith(PRIVATE) for line in state.lines if line.number == 0
                ),
                model=state.model,
                damage="it was said to be" if state.agent_id in self.damaged else "",
            )
            for _, state in sorted(self._agents.items())
        ]

    def models(self) -> dict[str, str]:
        return {agent_id: state.model for agent_id, state in self._agents.items()}

    def num_stored(self, agent_id: str) -> int:
        state = self._agents.get(agent_id)
        if state is None or not state.mains:
            return 0
        line = max(state.mains, key=lambda main: main.last_used)
        whole = list(takewhile(self._kept.__contains__, line.block_hashes))
        num_tokens = len(whole) * BLOCK_TOKENS
        if len(whole) < len(line.block_hashes):
            return num_tokens
        tail_ids = line.transcript.token_ids[num_tokens:]
        first = (kept.record for kept in self._kept.values() if not kept.record.first_position)
        runs = [self._runs_of_block(p, tail_ids) for p in whole[-1:] or {r.before for r in first}]
        return num_tokens + max((run[-1].stop for run in runs if run), default=0)

    def write_bundle(
        self, family: KVFamily, tokenizer: str, state: AgentState, path: Path
    ) -> BundleTicket[BundleWritten]:
        if self.refuses:
            error = BundleFailed(path, "the disk refuses")
            return self._answered(BundleWritten(error=error))
        own = [line for line in state.lines if line.tokenizer == tokenizer]
        kept = {
            record.hash: self._kept[record.hash]
            for line in own
            for record in self._records_of(line, family)
        }
        bundled = self._bundles[path] = _Bundled(family, tokenizer, state, kept)
        written = BundleWritten(bundled.file_bytes, len(kept))
        return self._answered(written, partial(self._bundles.pop, path))

    def read_bundle(self, path: Path, terms: BundleTerms) -> BundleTicket[BundleRead]:
        bundled = self._bundles.get(path)
        if bundled is None:
            return self._answered(BundleRead(error=BadBundle(path, "it is no bundle")))
        is_own = bundled.tokenizer == terms.tokenizer and bundled.family == replace(
            terms.family, namespace=""
        )
        records = list(dict.fromkeys(r for r, _ in _moved(bundled, terms.family) if is_own))
        namespace = terms.family.namespace if records else ""
        lines = tuple(
            replace(
                line,
                namespace=namespace if line.tokenizer == terms.tokenizer else "",
                block_hashes=(),
                last_used=0,
            )
            for line in bundled.state.lines
        )
        state = replace(bundled.state, lines=lines, model="")
        num_dropped = 0 if is_own else len(bundled.kept)
        bundle = Bundle(path, terms, state, tuple(records), num_dropped, bundled.file_bytes)
        return self._answered(BundleRead(bundle))

    def store_bundle(self, bundle: Bundle, agent_id: str) -> BundleTicket[BundleStored]:
        wanted = set() if self.refuses else set(bundle.records)
        for record, data in _moved(self._bundles[bundle.path], bundle.terms.family):
            if record in wanted:
                self._kept[record.hash] = _Kept(record, data, agent_id)
        undo = partial(self.drop, [record.hash for record in wanted])
        return self._answered(BundleStored(len(wanted)), undo)

    def _answered(
        self, answer: BundleAnswer, undo: Callable[[], object] = lambda: None
    ) -> BundleTicket[BundleAnswer]:
        """Return a ticket for what was done at once; cancelling it undoes that."""
        ticket: BundleTicket[BundleAnswer] = BundleTicket(undo)
        self._answers.add(ticket.put, answer)
        return ticket

    def _records_of(self, line: LineState, family: KVFamily) -> list[Record]:
        own = replace(family, namespace=line.namespace)
        return self.plan(own, own.root, line.transcript.token_ids)

    def _used(self) -> set[BlockHash]:
        """Return the blocks that committed lines name."""
        return {
            block_hash
            for state in self._agents.values()
            for line in state.lines
            for block_hash in line.block_hashes
        }

    def poll(self) -> None:
        self._answers.deliver()

    def wait(self, timeout_s: float) -> None:
        """Return at once: every answer is due at the next `poll`."""

    def ask_again(self) -> None:
        """Do nothing: it never pauses."""

    def health(self) -> StoreHealth:
        return StoreHealth(
            fault="it refuses" if self.refuses else None,
            num_records=len(self._kept),
            written_bytes=self.num_written_bytes,
        )

    def check(self) -> None:
        """Do nothing: dictionaries do not contradict themselves."""

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


def _moved(bundled: _Bundled, family: KVFamily) -> Iterator[tuple[Record, bytes]]:
    """Yield the bundle's records under their names in that family, with their data."""
    kept = MemoryAgentStore()
    kept._kept = bundled.kept
    for line in bundled.state.lines:
        if line.tokenizer != bundled.tokenizer:
            continue
        token_ids, parents = line.transcript.token_ids, [family.root]
        for record in kept._records_of(line, bundled.family):
            first = record.depth * BLOCK_TOKENS
            ids = token_ids[first : first + record.stop]
            moved = Record.of_run(parents[record.depth], record.depth, ids, start=record.start)
            parents += [moved.hash] if record.stop == BLOCK_TOKENS else []
            yield moved, bundled.kept[record.hash].data
