"""What the engine expects of every `AgentStore`: the fake one and the one on a disk."""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from keepwarm.core.agent_store import AgentStore
from keepwarm.core.block import BlockHash, chain_hashes, child_hash
from keepwarm.core.layout import BLOCK_TOKENS, CacheLayout, LayerLayout
from keepwarm.core.stored import (
    AgentSettings,
    AgentState,
    Committed,
    Fetched,
    KVFamily,
    LineState,
    Record,
    Saved,
    StoreEvent,
)
from keepwarm.core.transcript import Span, Transcript, Turn
from keepwarm.store.agent_cache_store import AgentCacheStore
from keepwarm.testing.agent_store import MemoryAgentStore

FAMILY = KVFamily("model", CacheLayout((LayerLayout(1, 2, 2),), "float16"))
IDS = [(position * 37 + position // 7) % 4096 for position in range(1000)]

Reopen = Callable[[], AgentStore]


@pytest.fixture(params=["memory", "disk"])
def reopen(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Reopen]:
    """Opens the store, and each time again what the last one left."""
    memory = MemoryAgentStore()
    opened: list[AgentCacheStore] = []

    def again() -> AgentStore:
        if request.param == "memory":
            return memory
        while opened:
            opened.pop().close()
        opened.append(AgentCacheStore(tmp_path / "store"))
        return opened[0]

    yield again
    while opened:
        opened.pop().close()


@pytest.fixture
def store(reopen: Reopen) -> AgentStore:
    return reopen()


def events_of(store: AgentStore, num_events: int) -> list[StoreEvent]:
    """So many events; the store has ten seconds for them."""
    events: list[StoreEvent] = []
    until = time.monotonic() + 10.0
    while len(events) < num_events and time.monotonic() < until:
        store.wait(0.1)
        events += store.poll()
    assert len(events) == num_events, events
    store.check()
    return events


def data_of(start: int, stop: int) -> bytes:
    """Bytes that no other run of tokens has."""
    return b"".join(p.to_bytes(8, "little") for p in range(start, stop))


def save(
    store: AgentStore,
    parent: BlockHash,
    token_ids: Sequence[int],
    *,
    start: int = 0,
    depth: int = 0,
    maker: str | None = "ada",
) -> Record:
    """A run up to the last of the block's `token_ids`, wherever the store's own runs end."""
    stop = len(token_ids)
    before = child_hash(parent, token_ids[:start]) if start else parent
    record = Record(child_hash(parent, token_ids), before, parent, depth, start, stop)
    data = memoryview(data_of(depth * BLOCK_TOKENS + start, depth * BLOCK_TOKENS + stop))
    half = len(data) // 2
    store.save(FAMILY, record, token_ids, [data[:half], data[half:]], maker)
    assert events_of(store, 1) == [Saved(record.hash, retry=False)]
    return record


def save_blocks(store: AgentStore, token_ids: Sequence[int]) -> list[Record]:
    records: list[Record] = []
    parent = FAMILY.root
    for depth, start in enumerate(range(0, len(token_ids), BLOCK_TOKENS)):
        ids = token_ids[start : start + BLOCK_TOKENS]
        records.append(save(store, parent, ids, depth=depth))
        parent = records[-1].hash
    return records


def read(store: AgentStore, record: Record) -> bytes | None:
    buffer = bytearray(store.record_bytes(FAMILY, record.num_tokens))
    ticket = store.fetch(FAMILY, record, buffer)
    (event,) = events_of(store, 1)
    assert isinstance(event, Fetched)
    assert event.ticket == ticket
    return None if event.data is None else bytes(event.data)


def state_of(agent_id: str, token_ids: Sequence[int], *, pinned: bool = False) -> AgentState:
    messages = ({"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"})
    line = LineState(
        number=0,
        tokenizer="words",
        transcript=Transcript((Span("Hello", tuple(token_ids)),)),
        messages=messages,
        turns=(Turn(len(token_ids), messages),),
        block_hashes=tuple(chain_hashes(FAMILY.root, token_ids)),
        last_used=7,
    )
    return AgentState(agent_id, AgentSettings(pinned=pinned), (line,))


def test_an_empty_store_knows_nothing(store: AgentStore) -> None:
    assert store.plan(FAMILY, FAMILY.root, IDS) == []
    assert store.missing_from(FAMILY.root, IDS[:256]) == 0
    assert store.load_agent("ada") is None
    assert store.summaries() == []
    assert store.poll() == []
    assert store.clock() == 0


def test_saved_runs_are_found_in_order_and_come_back_the_same(store: AgentStore) -> None:
    records = save_blocks(store, IDS[:600])
    assert store.plan(FAMILY, FAMILY.root, IDS) == records
    assert store.plan(FAMILY, records[0].hash, IDS[256:]) == records[1:]
    for record in records:
        start = record.depth * BLOCK_TOKENS
        assert read(store, record) == data_of(start + record.start, start + record.stop)


@pytest.mark.parametrize(
    ("num_tokens", "num_found"), [(255, 0), (256, 1), (511, 1), (512, 2), (599, 2), (600, 3)]
)
def test_only_what_the_prompt_begins_with_is_found(
    store: AgentStore, num_tokens: int, num_found: int
) -> None:
    save_blocks(store, IDS[:600])
    assert len(store.plan(FAMILY, FAMILY.root, IDS[:num_tokens])) == num_found


def test_another_prompt_shares_only_the_beginning(store: AgentStore) -> None:
    records = save_blocks(store, IDS[:600])
    assert store.plan(FAMILY, FAMILY.root, [*IDS[:300], 9999, *IDS[301:]]) == records[:1]
    assert store.plan(FAMILY, records[1].hash, IDS[:256]) == []


def test_a_block_may_be_stored_in_several_runs(store: AgentStore) -> None:
    runs = [
        save(store, FAMILY.root, IDS[:stop], start=start)
        for start, stop in ((0, 40), (40, 100), (100, 256))
    ]
    assert store.plan(FAMILY, FAMILY.root, IDS[:256]) == runs
    assert store.plan(FAMILY, FAMILY.root, IDS[:120]) == runs[:2]
    assert store.missing_from(FAMILY.root, IDS[:120]) == 100
    assert store.missing_from(FAMILY.root, IDS[:256]) == 256
    assert b"".join(read(store, run) or b"" for run in runs) == data_of(0, 256)


def test_a_record_that_is_gone_is_a_miss(store: AgentStore) -> None:
    ghost = Record(BlockHash(bytes(32)), FAMILY.root, FAMILY.root, 0, 0, 256)
    assert read(store, ghost) is None


def test_what_was_saved_and_committed_is_there_when_the_store_is_opened_again(
    reopen: Reopen,
) -> None:
    store = reopen()
    records = save_blocks(store, IDS[:600])
    state = state_of("ada", IDS[:600])
    ticket = store.commit(state)
    assert events_of(store, 1) == [Committed(ticket, durable=True)]
    store = reopen()
    assert store.plan(FAMILY, FAMILY.root, IDS) == records
    assert read(store, records[2]) == data_of(512, 600)
    assert store.load_agent("ada") == state
    assert store.clock() == 7
    (summary,) = store.summaries()
    assert (summary.agent_id, summary.num_tokens, summary.num_turns) == ("ada", 600, 1)


def test_the_last_commit_counts(reopen: Reopen) -> None:
    store = reopen()
    for num_tokens in (100, 300, 200):
        store.commit(state_of("ada", IDS[:num_tokens]))
        assert store.load_agent("ada") == state_of("ada", IDS[:num_tokens])
    events_of(store, 3)
    assert reopen().load_agent("ada") == state_of("ada", IDS[:200])


def test_a_deleted_agent_takes_with_it_what_only_it_used(reopen: Reopen) -> None:
    store = reopen()
    shared, own = save_blocks(store, IDS[:512])
    store.commit(state_of("ada", IDS[:512]))
    store.commit(state_of("bob", IDS[:300]))
    events_of(store, 2)
    store.delete_agent("ada")
    events_of(store, 1)
    store = reopen()
    assert store.load_agent("ada") is None
    assert store.load_agent("bob") is not None
    assert store.plan(FAMILY, FAMILY.root, IDS) == [shared]
    assert read(store, own) is None


def test_a_deleted_agents_unfinished_block_goes_as_well(store: AgentStore) -> None:
    save_blocks(store, IDS[:300])
    store.commit(state_of("ada", IDS[:300]))
    events_of(store, 1)
    store.delete_agent("ada")
    assert store.load_agent("ada") is None
    events_of(store, 1)
    assert store.plan(FAMILY, FAMILY.root, IDS) == []
