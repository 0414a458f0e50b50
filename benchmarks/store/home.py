"""A home with many agents: how long it takes to open it, and to look something up in it."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.store.chat import temporary_home
from keepwarm.bench.report import Figure
from keepwarm.bench.requiring import require
from keepwarm.bench.timing import Percentiles, median
from keepwarm.core.block import BlockHash, chain_hashes
from keepwarm.core.layout import BLOCK_TOKENS
from keepwarm.core.ports import Message
from keepwarm.core.stored import DEFAULT_SETTINGS, AgentState, KVFamily, LineState, Record
from keepwarm.core.transcript import NO_TEXT, Span, Transcript, Turn
from keepwarm.store.agent_cache_store import AgentCacheStore
from keepwarm.store.catalog.catalog import Catalog
from keepwarm.store.catalog.reader import CatalogReader
from keepwarm.store.catalog.rows import RecordRow
from keepwarm.store.disk.budget import DiskBudget
from keepwarm.store.disk.disk_store import CATALOG_NAME
from keepwarm.store.disk.files import RecordFiles
from keepwarm.store.disk.record import encode
from keepwarm.testing.generator import FAKE_LAYOUT

BLOCKS_PER_AGENT = 10
TURNS_PER_AGENT = 5
MAX_OPEN_S = 1.0
MAX_LOOK_UP_MS = 1.0
NUM_OPENINGS = 3
QUIET_S = 0.5

FAMILY = KVFamily("small", FAKE_LAYOUT)
"""Blocks of 2 KB: their number counts here, not their size."""

_PIECES = tuple(memoryview(bytes(t.nbytes)) for t in FAKE_LAYOUT.tensors(BLOCK_TOKENS))
_SPECIAL = "<|im_end|>"
_TEXT = "What a question of this length says, and the answer to it. " * 17


@dataclass(frozen=True, slots=True)
class _LookUps:
    calls: Percentiles
    longest_s: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "_LookUps":
        return cls(Percentiles.of(seconds), max(seconds))


@dataclass(frozen=True, slots=True)
class _Home:
    """What one home's operations took, in seconds."""

    open_s: float
    plan: _LookUps
    load: _LookUps
    catalog_bytes: int


def home_figures(*, num_agents: int, num_look_ups: int, seed: int) -> tuple[Figure, ...]:
    """Measure a home of `num_agents` agents; the facts tell of one with a tenth of them, too."""
    small = _measure(num_agents // 10, num_look_ups=num_look_ups, seed=seed)
    large = _measure(num_agents, num_look_ups=num_look_ups, seed=seed)
    where = f"{num_agents:,} agents, {num_agents * BLOCKS_PER_AGENT:,} blocks"
    return (
        Figure(
            f"opening a home of {where}",
            large.open_s,
            MAX_OPEN_S,
            unit="s",
            facts={
                "open_ms": 1e3 * large.open_s,
                "tenth_open_ms": 1e3 * small.open_s,
                "catalogue_mb": large.catalog_bytes / 1e6,
            },
        ),
        _look_up(f"plan of {BLOCKS_PER_AGENT} blocks, p99 ({where})", large.plan, small.plan),
        _look_up(f"load of an agent, p99 ({where})", large.load, small.load),
    )


def _look_up(name: str, large: "_LookUps", small: "_LookUps") -> Figure:
    return Figure(
        name,
        1e3 * large.calls.p99_s,
        MAX_LOOK_UP_MS,
        unit="ms",
        facts={
            "p50_ms": 1e3 * large.calls.p50_s,
            "longest_ms": 1e3 * large.longest_s,
            "tenth_p50_ms": 1e3 * small.calls.p50_s,
            "tenth_p99_ms": 1e3 * small.calls.p99_s,
        },
    )


def _measure(num_agents: int, *, num_look_ups: int, seed: int) -> _Home:
    with temporary_home() as home:
        build_home(home, num_agents, seed=seed)
        read_through(home / CATALOG_NAME)
        open_s = median([_opening_s(home) for _ in range(NUM_OPENINGS)])
        chosen = np.random.default_rng(seed).integers(0, num_agents, num_look_ups).tolist()
        with AgentCacheStore(home) as store:
            _compare_files(store)
            _have_in_page_cache(home / CATALOG_NAME, chosen)
            plans = [_plan_s(store, number, seed) for number in chosen]
            loads = [_load_s(store, number) for number in chosen]
        nbytes = (home / CATALOG_NAME).stat().st_size
    return _Home(open_s, _LookUps.of(plans), _LookUps.of(loads), nbytes)


def read_through(file: Path) -> None:
    """Bring a file into the page cache.

    Not for a database that is open: closing the file would drop SQLite's locks.
    """
    with file.open("rb") as source:
        while source.read(1 << 20):
            pass


def _have_in_page_cache(catalog: Path, chosen: Sequence[int]) -> None:
    """Bring the chosen agents' pages into the cache: the look-up is measured, not the disk."""
    with CatalogReader.open(catalog) as reader:
        for number in chosen:
            reader.load_agent(f"agent-{number}")


def _opening_s(home: Path) -> float:
    started = time.perf_counter()
    with AgentCacheStore(home):
        return time.perf_counter() - started


def _compare_files(store: AgentCacheStore) -> None:
    """Wait until the store has compared all files, which it does when it has nothing else to do."""
    num_records = store.health().num_records
    started = time.perf_counter()
    while time.perf_counter() - started < QUIET_S:
        started = time.perf_counter()
        store.wait(QUIET_S)  # until the answer about the next few files
        store.poll()
    require(store.health().num_records == num_records, "records were lost or found")


def _plan_s(store: AgentCacheStore, number: int, seed: int) -> float:
    token_ids = token_ids_of(number, seed=seed)
    started = time.perf_counter()
    records = store.plan(FAMILY, FAMILY.root, token_ids)
    seconds = time.perf_counter() - started
    require(len(records) == BLOCKS_PER_AGENT, f"{len(records)} of the agent's records were found")
    return seconds


def _load_s(store: AgentCacheStore, number: int) -> float:
    started = time.perf_counter()
    state = store.load_agent(f"agent-{number}")
    seconds = time.perf_counter() - started
    require(state is not None, f"agent {number} was not found")
    return seconds


# -- building ------------------------------------------------------------------------------------


def token_ids_of(number: int, *, seed: int) -> list[int]:
    rng = np.random.default_rng([seed, number])
    ids: list[int] = rng.integers(0, 50_000, BLOCKS_PER_AGENT * BLOCK_TOKENS).tolist()
    return ids


def build_home(home: Path, num_agents: int, *, seed: int) -> None:
    """Write what the store would write, agent after agent, in larger transactions."""
    catalog = Catalog.open(home / CATALOG_NAME)
    budget = DiskBudget(home, budget_bytes=1 << 40)
    files = RecordFiles(home, budget, max_set_aside_bytes=0)
    with catalog:
        for number in range(num_agents):
            token_ids = token_ids_of(number, seed=seed)
            hashes = tuple(chain_hashes(FAMILY.root, token_ids))
            rows = [
                _add_record(files, f"agent-{number}", hashes, depth, token_ids)
                for depth in range(BLOCKS_PER_AGENT)
            ]
            catalog.add_records(rows)
            catalog.commit(_state(f"agent-{number}", token_ids, hashes, last_used=number + 1))


def _add_record(
    files: RecordFiles,
    maker: str,
    hashes: Sequence[BlockHash],
    depth: int,
    token_ids: Sequence[int],
) -> RecordRow:
    parent = hashes[depth - 1] if depth else FAMILY.root
    record = Record(hashes[depth], parent, parent, depth, 0, BLOCK_TOKENS)
    ids = token_ids[depth * BLOCK_TOKENS :][:BLOCK_TOKENS]
    file_bytes = files.publish(record.hash, encode(FAMILY, record, ids, _PIECES))
    return RecordRow.of(record, FAMILY, file_bytes=file_bytes, maker=maker)


def _state(
    agent_id: str, token_ids: Sequence[int], hashes: tuple[BlockHash, ...], *, last_used: int
) -> AgentState:
    """Make a conversation whose every message is `_TEXT` and a special token."""
    per_message = len(token_ids) // (2 * TURNS_PER_AGENT)
    spans: list[Span] = []
    messages: list[Message] = []
    turns: list[Turn] = []
    for start in range(0, len(token_ids), per_message):
        ids = tuple(token_ids[start : start + per_message])
        spans += [Span(_TEXT, ids[:-1]), Span(_SPECIAL, ids[-1:], is_special=True)]
        messages.append({"role": "assistant" if len(messages) % 2 else "user", "content": _TEXT})
        if len(messages) % 2 == 0:
            turns.append(Turn(start + per_message, tuple(messages)))
    line = LineState(
        number=0,
        tokenizer="benchmark",
        transcript=Transcript((*spans, NO_TEXT)),
        messages=tuple(messages),
        turns=tuple(turns),
        block_hashes=hashes,
        last_used=last_used,
    )
    return AgentState(agent_id, DEFAULT_SETTINGS, (line,))
