"""Which records may go first, and that every count stays right."""

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from keepwarm.core.block import BlockHash, child_hash
from keepwarm.core.layout import BLOCK_TOKENS
from keepwarm.core.stored import AgentSettings, AgentState, LineState, Record
from keepwarm.core.transcript import EMPTY
from keepwarm.store.record_index import Entry, RecordIndex

ROOT = BlockHash(b"r" * 32)
FILE_BYTES = 100


def ids_of(branch: int, num_tokens: int) -> list[int]:
    """Branches agree in their first block."""
    return [*[0] * min(num_tokens, BLOCK_TOKENS), *[branch] * (num_tokens - BLOCK_TOKENS)]


def hash_of(branch: int, num_tokens: int) -> tuple[BlockHash, BlockHash]:
    """The hash of everything up to there, and of the block before its own."""
    parent = ROOT
    ids = ids_of(branch, num_tokens)
    for start in range(0, num_tokens - num_tokens % BLOCK_TOKENS, BLOCK_TOKENS):
        if start + BLOCK_TOKENS == num_tokens:
            break
        parent = child_hash(parent, ids[start : start + BLOCK_TOKENS])
    depth = (num_tokens - 1) // BLOCK_TOKENS
    return child_hash(parent, ids[depth * BLOCK_TOKENS :]), parent


def record_of(branch: int, start: int, stop: int) -> Record:
    """Positions [start, stop) of the branch, within one block."""
    record_hash, parent = hash_of(branch, stop)
    depth = (stop - 1) // BLOCK_TOKENS
    before = hash_of(branch, start)[0] if start % BLOCK_TOKENS else parent
    first = depth * BLOCK_TOKENS
    return Record(record_hash, before, parent, depth, start - first, stop - first)


def entry_of(
    branch: int, start: int, stop: int, *, last_used: int = 0, maker: str | None = None
) -> Entry:
    return Entry(record_of(branch, start, stop), FILE_BYTES, maker, last_used)


def state_of(
    agent_id: str, branch: int, num_blocks: int, *, pinned: bool, last_used: int
) -> AgentState:
    hashes = tuple(hash_of(branch, (n + 1) * BLOCK_TOKENS)[0] for n in range(num_blocks))
    line = LineState(0, "t", EMPTY, None, (), hashes, last_used)
    return AgentState(agent_id, AgentSettings(pinned=pinned), (line,))


def test_the_least_recently_used_leaf_goes_first() -> None:
    index = RecordIndex()
    index.add(entry_of(0, 0, 256, last_used=9))
    index.add(entry_of(1, 256, 512, last_used=9))
    index.add(entry_of(2, 256, 512, last_used=3))
    (victim,) = index.choose_victims(1)
    assert victim.record == record_of(2, 256, 512)
    index.check()


def test_a_prefix_goes_after_what_follows_it() -> None:
    index = RecordIndex()
    for start in (0, 256, 512):
        index.add(entry_of(1, start, start + 256, last_used=1))
    victims = index.choose_victims(3 * FILE_BYTES)
    assert [v.record.depth for v in victims] == [2, 1, 0]


def test_a_leaf_that_was_used_meanwhile_stays() -> None:
    index = RecordIndex()
    index.add(entry_of(1, 0, 256, last_used=1))
    assert index.choose_victims(0) == []
    index.add(entry_of(1, 256, 512, last_used=1))
    index.add(entry_of(2, 256, 512, last_used=2))
    index.use(state_of("ada", 1, 2, pinned=False, last_used=5))
    (victim,) = index.choose_victims(1)
    assert victim.record == record_of(2, 256, 512)


def test_pinned_blocks_and_what_pinned_agents_made_stay() -> None:
    index = RecordIndex()
    for start, stop in ((0, 256), (256, 512), (512, 600)):
        index.add(entry_of(1, start, stop, maker="ada"))
    index.use(state_of("ada", 1, 2, pinned=True, last_used=1))
    assert index.choose_victims(1000) == []
    index.use(state_of("ada", 1, 2, pinned=False, last_used=2))
    assert len(index.choose_victims(1000)) == 3
    index.check()


def test_what_a_deleted_agent_shared_stays_without_an_owner_and_may_go() -> None:
    index = RecordIndex()
    for start, stop in ((0, 256), (256, 356), (356, 456)):
        index.add(entry_of(1, start, stop, maker="ada" if stop < 456 else "bob"))
    for agent_id, pinned in (("ada", True), ("bob", False)):
        index.use(state_of(agent_id, 1, 1, pinned=pinned, last_used=1))
    assert index.choose_victims(0) == []
    assert index.disuse("ada") == []
    assert [entry.maker for entry in index] == [None, None, "bob"]
    assert index.bytes_of("ada") == 0
    index.check()
    assert len(index.choose_victims(1000)) == 3


def test_what_is_read_or_written_stays() -> None:
    index = RecordIndex()
    index.add(entry_of(1, 0, 256))
    entry = index.get(record_of(1, 0, 256).hash)
    assert entry is not None
    entry.num_readers = 1
    assert index.choose_victims(1) == []
    entry.num_readers = 0
    index.offer(entry.record.hash)
    assert index.choose_victims(1) == [entry]


def test_a_quota_takes_from_its_own_agent() -> None:
    index = RecordIndex()
    index.add(entry_of(1, 0, 256, maker="ada", last_used=9))
    index.add(entry_of(2, 256, 512, maker="bob", last_used=1))
    index.add(entry_of(3, 256, 512, maker="ada", last_used=2))
    (victim,) = index.choose_victims_of("ada", 1)
    assert victim.record == record_of(3, 256, 512)


class IndexMachine(RuleBasedStateMachine):
    """Random adds, losses, uses, pins and evictions of a small tree."""

    def __init__(self) -> None:
        super().__init__()
        self.index = RecordIndex()
        self.now = 0

    @rule(
        branch=st.integers(1, 3),
        stop=st.sampled_from([100, 200, 256, 300, 512, 600, 768]),
        maker=st.sampled_from([None, "ada", "bob"]),
    )
    def add(self, branch: int, stop: int, maker: str | None) -> None:
        depth = (stop - 1) // BLOCK_TOKENS
        ids = ids_of(branch, stop)[depth * BLOCK_TOKENS :]
        _, parent = hash_of(branch, stop)
        runs = self.index.runs_of_block(parent, ids)
        start = runs[-1].record.stop if runs else 0
        if start < len(ids) and self.index.get(hash_of(branch, stop)[0]) is None:
            first = depth * BLOCK_TOKENS
            self.index.add(entry_of(branch, first + start, stop, last_used=self.now, maker=maker))

    @rule(branch=st.integers(1, 3), stop=st.sampled_from([100, 256, 300, 512, 768]))
    def lose(self, branch: int, stop: int) -> None:
        self.index.forget(hash_of(branch, stop)[0])

    @rule(
        agent_id=st.sampled_from(["ada", "bob"]),
        branch=st.integers(1, 3),
        num_blocks=st.integers(0, 3),
        pinned=st.booleans(),
    )
    def use(self, agent_id: str, branch: int, num_blocks: int, pinned: bool) -> None:
        self.now += 1
        state = state_of(agent_id, branch, num_blocks, pinned=pinned, last_used=self.now)
        self.index.use(state)

    @rule(agent_id=st.sampled_from(["ada", "bob"]))
    def disuse(self, agent_id: str) -> None:
        for entry in self.index.disuse(agent_id):
            assert not self.index.usage.is_used(entry.record.hash)
        assert not [e for e in self.index if e.maker == agent_id]
        assert not self.index.bytes_of(agent_id)

    @rule(num_records=st.integers(0, 3))
    def evict(self, num_records: int) -> None:
        before = {entry.record.hash for entry in self.index}
        victims = self.index.choose_victims(num_records * FILE_BYTES)
        for victim in victims:
            assert victim.record.hash in before
            assert not self.index.usage.is_pinned(victim.record.hash, victim.maker)
        left = {entry.record.before for entry in self.index}
        assert not left & {victim.record.hash for victim in victims}
        if len(victims) < num_records:
            leaves = [entry for entry in self.index if entry.record.hash not in left]
            assert all(self.index.usage.is_pinned(e.record.hash, e.maker) for e in leaves)

    @rule(branch=st.integers(1, 3), num_tokens=st.integers(1, 768))
    def plan(self, branch: int, num_tokens: int) -> None:
        end = 0
        for entry in self.index.plan(ROOT, ids_of(branch, num_tokens)):
            assert entry.record.depth * BLOCK_TOKENS + entry.record.start == end
            end += entry.record.num_tokens
            assert entry.record.hash == hash_of(branch, end)[0]
        assert end <= num_tokens

    @invariant()
    def counts_are_right(self) -> None:
        self.index.check()


TestIndexMachine = IndexMachine.TestCase
TestIndexMachine.settings = settings(
    max_examples=40,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
