"""What the engine expects of every `AgentStore`: the fake one, and the one on a disk."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from keepwarm.core.agent_store import AgentStore, BundleTicket, NoStore
from keepwarm.core.block import BlockHash, chain_hashes, child_hash
from keepwarm.core.errors import BadBundle, KeepwarmError, NoAgentStore
from keepwarm.core.layout import BLOCK_TOKENS, CacheLayout, LayerLayout
from keepwarm.core.stored import (
    AgentSettings,
    AgentState,
    Bundle,
    BundleTerms,
    KVFamily,
    LineState,
    Record,
    Saved,
)
from keepwarm.core.transcript import Span, Transcript, Turn
from keepwarm.store.agent_cache_store import AgentCacheStore
from keepwarm.testing.agent_store import MemoryAgentStore
from stores import hear

FAMILY = KVFamily("model", CacheLayout((LayerLayout(1, 2, 2),), "float16"))
IDS = [(position * 37 + position // 7) % 4096 for position in range(1000)]

BUNDLES: dict[Path, Any] = {}
TERMS = BundleTerms(replace(FAMILY, namespace="import:1"), "words", vocab_size=4096)

Reopen = Callable[[], AgentStore]


@pytest.fixture(params=["memory", "disk"])
def reopen(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Reopen]:
    """Opens the store, and each time again what the last one left."""
    memory = MemoryAgentStore(BUNDLES)
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


def answered(store: AgentStore, is_answered: Callable[[], object]) -> None:
    """Poll the store until it has answered; it must agree with itself then."""
    hear(store, is_answered)
    store.check()


def commit(store: AgentStore, *states: AgentState) -> None:
    """Commit all of them, and wait until they are durable."""
    answers: list[bool] = []
    for state in states:
        store.commit(state, answers.append)
    answered(store, lambda: len(answers) == len(states))
    assert all(answers)


def delete(store: AgentStore, agent_id: str) -> None:
    answers: list[bool] = []
    store.delete_agent(agent_id, answers.append)
    answered(store, lambda: answers)
    assert answers == [True]


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
    answers: list[Saved] = []
    store.save(FAMILY, record, token_ids, [data[:half], data[half:]], maker, answers.append)
    answered(store, lambda: answers)
    assert answers == [Saved.WRITTEN]
    return record


def save_blocks(store: AgentStore, token_ids: Sequence[int]) -> list[Record]:
    records: list[Record] = []
    parent = FAMILY.root
    for depth, start in enumerate(range(0, len(token_ids), BLOCK_TOKENS)):
        ids = token_ids[start : start + BLOCK_TOKENS]
        records.append(save(store, parent, ids, depth=depth))
        parent = records[-1].hash
    return records


def read(store: AgentStore, record: Record, family: KVFamily = FAMILY) -> bytes | None:
    buffer = bytearray(store.record_bytes(family, record.num_tokens))
    answers: list[memoryview | None] = []
    store.fetch(family, record, buffer, answers.append)
    answered(store, lambda: answers)
    (data,) = answers
    return None if data is None else bytes(data)


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
    return AgentState(agent_id, AgentSettings(pinned=pinned), (line,), "other")


def test_an_empty_store_knows_nothing(store: AgentStore) -> None:
    assert store.plan(FAMILY, FAMILY.root, IDS) == []
    assert store.missing_from(FAMILY.root, IDS[:256]) == 0
    assert store.load_agent("ada") is None
    assert store.summaries() == []
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
    commit(store, state)
    store = reopen()
    assert store.plan(FAMILY, FAMILY.root, IDS) == records
    assert read(store, records[2]) == data_of(512, 600)
    assert store.load_agent("ada") == state
    assert store.clock() == 7
    (summary,) = store.summaries()
    assert (summary.agent_id, summary.num_tokens, summary.num_turns) == ("ada", 600, 1)


@pytest.mark.parametrize("num_tokens", [1, 100, 255, 256, 257, 511, 512, 600])
@pytest.mark.parametrize("num_saved", [0, 100, 256, 400, 512, 600])
def test_how_much_of_an_agent_is_stored(reopen: Reopen, num_tokens: int, num_saved: int) -> None:
    """By a few rows: as many tokens as a plan finds, though the store does not know the model.

    Of a block in the middle that is there in part, nothing is counted.
    """
    store = reopen()
    save_blocks(store, IDS[:num_saved])
    commit(store, state_of("ada", IDS[:num_tokens]))
    records = store.plan(FAMILY, FAMILY.root, IDS[:num_tokens])
    found = records[-1].end_position if records else 0
    expected = found if found >= num_tokens - num_tokens % 256 else found - found % 256
    assert store.num_stored("ada") == expected
    assert reopen().num_stored("ada") == expected


def test_of_what_follows_a_gap_nothing_counts(store: AgentStore) -> None:
    records = save_blocks(store, IDS[:600])
    commit(store, state_of("ada", IDS[:600]))
    store.drop([records[1].hash])
    assert store.num_stored("ada") == 256
    assert store.num_stored("nobody") == 0


def test_which_model_each_agent_talked_to(store: AgentStore) -> None:
    commit(store, state_of("ada", IDS[:10]), state_of("bob", IDS[:10]))
    assert store.models() == {"ada": "other", "bob": "other"}
    delete(store, "ada")
    assert store.models() == {"bob": "other"}


def test_the_last_commit_counts(reopen: Reopen) -> None:
    store = reopen()
    answers: list[bool] = []
    for num_tokens in (100, 300, 200):
        store.commit(state_of("ada", IDS[:num_tokens]), answers.append)
        assert store.load_agent("ada") == state_of("ada", IDS[:num_tokens])
    answered(store, lambda: len(answers) == 3)
    assert reopen().load_agent("ada") == state_of("ada", IDS[:200])


def test_a_deleted_agent_takes_with_it_what_only_it_used(reopen: Reopen) -> None:
    store = reopen()
    shared, own = save_blocks(store, IDS[:512])
    commit(store, state_of("ada", IDS[:512]), state_of("bob", IDS[:300]))
    delete(store, "ada")
    store = reopen()
    assert store.load_agent("ada") is None
    assert store.load_agent("bob") is not None
    assert store.plan(FAMILY, FAMILY.root, IDS) == [shared]
    assert read(store, own) is None


def test_a_deleted_agents_unfinished_block_goes_as_well(store: AgentStore) -> None:
    save_blocks(store, IDS[:300])
    commit(store, state_of("ada", IDS[:300]))
    answers: list[bool] = []
    store.delete_agent("ada", answers.append)
    assert store.load_agent("ada") is None
    answered(store, lambda: answers)
    assert store.plan(FAMILY, FAMILY.root, IDS) == []


# -- dropped records -------------------------------------------------------------------------------


def test_a_dropped_record_is_gone(reopen: Reopen) -> None:
    store = reopen()
    records = save_blocks(store, IDS[:600])
    store.drop([records[1].hash, BlockHash(bytes(32))])
    assert store.plan(FAMILY, FAMILY.root, IDS) == records[:1]
    assert read(store, records[1]) is None
    store = reopen()
    assert store.plan(FAMILY, FAMILY.root, IDS) == records[:1]
    assert read(store, records[2]) is not None
    save(store, records[0].hash, IDS[256:512], depth=1)
    assert store.plan(FAMILY, FAMILY.root, IDS) == records


def test_what_a_line_uses_may_be_spared(store: AgentStore) -> None:
    records = save_blocks(store, IDS[:600])
    commit(store, state_of("ada", IDS[:300]))
    store.drop([record.hash for record in records], if_unused=True)
    assert store.plan(FAMILY, FAMILY.root, IDS) == records[:1]


# -- bundles ---------------------------------------------------------------------------------------


def answer(store: AgentStore, ticket: BundleTicket[Any]) -> Any:
    answered(store, lambda: ticket.answer)
    return ticket.answer


def read_bundle(store: AgentStore, path: Path, terms: BundleTerms = TERMS) -> Bundle:
    bundle = answer(store, store.read_bundle(path, terms)).bundle
    assert isinstance(bundle, Bundle)
    return bundle


@pytest.fixture
def bundle_path(store: AgentStore, tmp_path: Path) -> Path:
    """An agent of two whole blocks and a tail, in a bundle."""
    save_blocks(store, IDS[:600])
    path = tmp_path / "ada"
    ticket = store.write_bundle(FAMILY, "words", state_of("ada", IDS[:600]), path)
    written = answer(store, ticket)
    assert (written.num_records, written.error) == (3, None)
    assert written.file_bytes >= 600 * FAMILY.layout.token_bytes
    return path


def test_a_bundle_is_read_in_a_namespace_of_its_own(store: AgentStore, bundle_path: Path) -> None:
    bundle = read_bundle(store, bundle_path)
    state = state_of("ada", IDS[:600])
    line = replace(state.lines[0], namespace="import:1", block_hashes=(), last_used=0)
    assert bundle.state == replace(state, lines=(line,), model="")
    assert [record.depth for record in bundle.records] == [0, 1, 2]
    assert bundle.num_dropped == 0
    root = TERMS.family.root
    assert bundle.records[0].parent == root
    assert store.plan(TERMS.family, root, IDS) == []
    ticket = store.store_bundle(bundle, "eve")
    assert answer(store, ticket).num_records == 3
    assert store.plan(TERMS.family, root, IDS) == list(bundle.records)
    assert store.missing_from(root, IDS[:256]) == 256
    assert read(store, bundle.records[2], TERMS.family) == data_of(512, 600)


def test_an_imported_agent_leaves_with_its_records(store: AgentStore, bundle_path: Path) -> None:
    bundle = read_bundle(store, bundle_path)
    answer(store, store.store_bundle(bundle, "eve"))
    hashes = tuple(record.hash for record in bundle.records[:2])
    line = replace(bundle.state.lines[0], block_hashes=hashes, last_used=9)
    state = replace(bundle.state, agent_id="eve", lines=(line,))
    commit(store, state)
    assert store.load_agent("eve") == state
    assert [summary.is_private for summary in store.summaries()] == [True]
    delete(store, "eve")
    assert store.plan(TERMS.family, TERMS.family.root, IDS) == []
    assert len(store.plan(FAMILY, FAMILY.root, IDS)) == 3


@pytest.mark.parametrize(
    "terms",
    [
        replace(TERMS, family=replace(TERMS.family, fingerprint="other")),
        replace(TERMS, family=replace(TERMS.family, lineage="q8")),
        replace(TERMS, tokenizer="letters"),
    ],
)
def test_of_another_family_only_the_agent_is_kept(
    store: AgentStore, bundle_path: Path, terms: BundleTerms
) -> None:
    bundle = read_bundle(store, bundle_path, terms)
    assert (bundle.records, bundle.num_dropped) == ((), 3)
    assert bundle.state.lines[0].namespace == ""
    assert bundle.state.lines[0].transcript == state_of("ada", IDS[:600]).lines[0].transcript


def test_what_is_no_bundle(store: AgentStore, tmp_path: Path) -> None:
    path = tmp_path / "no-bundle"
    path.write_bytes(b"x" * 20_000)
    read = answer(store, store.read_bundle(path, TERMS))
    assert read.bundle is None
    assert isinstance(read.error, BadBundle)


def test_without_a_store_there_are_no_bundles(tmp_path: Path) -> None:
    store = NoStore()
    store.drop([BlockHash(bytes(32))])
    state = state_of("ada", IDS[:10])
    bundle = Bundle(tmp_path, TERMS, state, (), 0, 0)
    for call in (
        lambda: store.write_bundle(FAMILY, "words", state, tmp_path),
        lambda: store.read_bundle(tmp_path, TERMS),
        lambda: store.store_bundle(bundle, "ada"),
    ):
        with pytest.raises(NoAgentStore) as caught:
            call()
        assert isinstance(caught.value, KeepwarmError)


class TestCancelled:
    """A bundle that is not wanted any more is not answered, and nothing is left of it."""

    def test_an_export(self, store: AgentStore, tmp_path: Path) -> None:
        save_blocks(store, IDS[:600])
        path = tmp_path / "cancelled"
        ticket = store.write_bundle(FAMILY, "words", state_of("ada", IDS[:600]), path)
        ticket.cancel()
        self.expect_silence(store, ticket)
        assert not list(tmp_path.glob("*cancelled*"))
        assert not list(tmp_path.glob(".keepwarm-*"))
        assert answer(store, store.read_bundle(path, TERMS)).error is not None
        assert len(store.plan(FAMILY, FAMILY.root, IDS[:600])) == 3

    def test_an_export_that_has_ended(self, store: AgentStore, tmp_path: Path) -> None:
        save_blocks(store, IDS[:600])
        path = tmp_path / "cancelled"
        ticket = store.write_bundle(FAMILY, "words", state_of("ada", IDS[:600]), path)
        assert answer(store, ticket).error is None
        ticket.cancel()
        self.expect_silence(store, ticket)
        assert not path.exists()
        assert answer(store, store.read_bundle(path, TERMS)).error is not None

    def test_a_bundle_that_is_read(self, store: AgentStore, bundle_path: Path) -> None:
        ticket = store.read_bundle(bundle_path, TERMS)
        ticket.cancel()
        self.expect_silence(store, ticket)
        ticket = store.read_bundle(bundle_path, TERMS)
        answer(store, ticket)
        ticket.cancel()
        assert read_bundle(store, bundle_path).records

    @pytest.mark.parametrize("has_ended", [False, True])
    def test_a_bundle_that_is_stored(
        self, store: AgentStore, bundle_path: Path, has_ended: bool
    ) -> None:
        bundle = read_bundle(store, bundle_path)
        ticket = store.store_bundle(bundle, "eve")
        if has_ended:
            assert answer(store, ticket).num_records == 3
        ticket.cancel()
        self.expect_silence(store, ticket)
        assert store.plan(TERMS.family, TERMS.family.root, IDS) == []
        assert answer(store, store.store_bundle(bundle, "eve")).num_records == 3
        assert len(store.plan(TERMS.family, TERMS.family.root, IDS)) == 3

    @staticmethod
    def expect_silence(store: AgentStore, ticket: BundleTicket[Any]) -> None:
        for _ in range(4):  # work of many units lets what comes behind it go first
            record = save(store, FAMILY.root, [9, 9])
            store.drop([record.hash])
        assert ticket.answer is None


# -- answers ---------------------------------------------------------------------------------------


class TestAnswers:
    """Each caller hears of its own calls, by whichever of them polls, in order and one by one."""

    def test_each_call_is_answered_where_it_asked(self, store: AgentStore) -> None:
        (record,) = save_blocks(store, IDS[:256])
        heard: list[tuple[str, object]] = []
        for name in ("one", "two"):
            store.commit(
                state_of(name, IDS[:9]), lambda durable, name=name: heard.append((name, durable))
            )
        assert heard == [], "an answer came before the store was polled"
        answered(store, lambda: len(heard) == 2)
        assert heard == [("one", True), ("two", True)]
        buffers = {name: bytearray(store.record_bytes(FAMILY, 256)) for name in ("one", "two")}
        data: dict[str, memoryview | None] = {}
        for name, buffer in buffers.items():
            store.fetch(FAMILY, record, buffer, lambda found, name=name: data.update({name: found}))
        answered(store, lambda: len(data) == 2)
        for name, buffer in buffers.items():
            found = data[name]
            assert found is not None
            assert found.obj is buffer
            assert found == data_of(0, 256)

    def test_an_answer_may_poll_and_ask_again(self, store: AgentStore) -> None:
        """As a deletion does whose end lets another one begin."""
        heard: list[str] = []

        def first(durable: bool) -> None:
            heard.append("first")
            store.commit(state_of("c", IDS[:9]), lambda durable: heard.append("third"))
            store.poll()
            heard.append("end of the first")

        store.commit(state_of("a", IDS[:9]), first)
        store.commit(state_of("b", IDS[:9]), lambda durable: heard.append("second"))
        answered(store, lambda: len(heard) == 4)
        assert [name for name in heard if name != "end of the first"] == [
            "first",
            "second",
            "third",
        ]

    def test_a_wait_does_not_outlast_an_answer_that_another_poll_delivered(
        self, store: AgentStore
    ) -> None:
        """Another engine's poll: the one that waits next has work now."""
        answers: list[bool] = []
        store.commit(state_of("ada", IDS[:9]), answers.append)
        while not answers:
            store.poll()
        store.wait(3600.0)  # beyond the test's own time
