"""Random moves between the tiers: nothing is lost, nothing is doubled, and no KV is wrong."""

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from engines import BLOCK_BYTES, check_values, fake_loaded
from keepwarm.core.agent import AgentBlocks
from keepwarm.core.block import chain_hashes, common_prefix
from keepwarm.core.errors import PoolExhausted
from keepwarm.core.layout import BLOCK_TOKENS, capacity_for
from keepwarm.core.pool import BlockPool
from keepwarm.core.ports import RowId, RowInput
from keepwarm.core.stored import KVFamily
from keepwarm.kv.generator_source import GeneratorSource
from keepwarm.kv.tiers import Tiers
from keepwarm.testing.generator import FAKE_LAYOUT

pytestmark = pytest.mark.slow

FAMILY = KVFamily("fake", FAKE_LAYOUT)
ROW = RowId(1)
NUM_LINES = 5

# Up to three blocks of a stem that all prompts share, then up to two of a branch.
prompts = st.builds(
    lambda stem, branch, more: [*[1] * stem, *[100 + branch] * more],
    stem=st.sampled_from([0, 100, 256, 257, 512, 512, 600, 768, 768]),
    branch=st.integers(0, 1),
    more=st.sampled_from([1, 156, 255, 256, 300, 512]),
)
lengths = st.sampled_from([0, 1, 100, 255, 256, 257, 300, 511, 512, 600, 768, 1000])
indices = st.integers(0, NUM_LINES - 1)


class TiersMachine(RuleBasedStateMachine):
    """A few lines that want prompts with a common stem, on a budget of a few blocks."""

    @initialize(num_blocks=st.integers(4, 16))
    def make(self, num_blocks: int) -> None:
        self.tiers = Tiers(
            BlockPool(num_blocks * BLOCK_BYTES),
            GeneratorSource(fake_loaded()),
            family=FAMILY,
        )
        self.lines = [self.tiers.new_line() for _ in range(NUM_LINES)]
        self.wanted: dict[AgentBlocks, list[int]] = {}

    # -- what a request does ---------------------------------------------------------------------

    @rule(index=indices, prompt=prompts, spare=st.sampled_from([0, 256]), rest=st.booleans())
    def compute(self, index: int, prompt: list[int], spare: int, rest: bool) -> None:
        if self._start(index, prompt, spare):
            self.go_on(index, 1000)
            if rest:
                self.tiers.park(self.lines[index])

    @rule(index=indices, prompt=prompts, spare=st.sampled_from([0, 256]))
    def start(self, index: int, prompt: list[int], spare: int) -> None:
        self._start(index, prompt, spare)

    def _start(self, index: int, prompt: list[int], spare: int) -> bool:
        line = self.lines[index]
        if line.is_held:
            return False
        before = list(line.token_ids)
        num_known = self._longest_match(line, prompt)
        try:
            self.tiers.make_hot(line, prompt, capacity_for(len(prompt) + spare))
        except PoolExhausted:
            assert line.token_ids == before
            assert not line.is_held
            return False
        assert line.slab is not None
        assert line.token_ids == prompt[: line.num_tokens]
        assert line.num_tokens >= num_known // 256 * 256
        assert line.is_held
        self.wanted[line] = prompt
        return True

    def _longest_match(self, line: AgentBlocks, prompt: list[int]) -> int:
        """How many leading ids have KV somewhere: in this line, or in anybody's blocks."""
        run = self.tiers.memory.index.longest_run(chain_hashes(FAMILY.root, prompt))
        return max(common_prefix(line.token_ids, prompt), len(run) * BLOCK_TOKENS)

    @rule(index=indices, prompt=prompts)
    def start_at_any_cost(self, index: int, prompt: list[int]) -> None:
        line = self.lines[index]
        others = [other for other in self.lines if other is not line]
        alone = not any(other.is_held or other.pinned for other in others)
        if line.is_held:
            return
        capacity = capacity_for(len(prompt))
        try:
            self.tiers.make_room_at_any_cost(line, capacity)
            self.tiers.make_hot(line, prompt, capacity)
        except PoolExhausted:
            too_large = capacity * FAKE_LAYOUT.token_bytes > self.tiers.pool.budget_bytes
            assert too_large or not alone
            return
        assert line.token_ids == prompt[: line.num_tokens]
        self.wanted[line] = prompt

    @rule(index=indices, num_calls=st.integers(1, 4))
    def go_on(self, index: int, num_calls: int) -> None:
        """Restore, adopt and prefill as the batch does, for so many calls."""
        line = self.lines[index]
        for _ in range(num_calls):
            if not line.is_held or line.num_tokens - line.num_to_restore == len(self.wanted[line]):
                return
            if line.num_to_restore:
                assert self.tiers.promotion.restore(line, 1) > 0
            elif not self.tiers.adopt_computed(line, self.wanted[line]):
                self._prefill(line, 200)

    def _prefill(self, line: AgentBlocks, limit: int) -> None:
        start = line.num_tokens
        chunk = self.wanted[line][start : min(start + limit, start - start % 256 + 256)]
        assert line.slab is not None
        self.tiers.model.generator.open_row(ROW, line.slab)
        self.tiers.model.generator.step([RowInput(ROW, chunk)])
        self.tiers.model.generator.close_row(ROW)
        self.tiers.advance(line, chunk)

    @rule(index=indices, more=st.sampled_from([1, 256, 1024]))
    def reserve(self, index: int, more: int) -> None:
        line = self.lines[index]
        if line.is_held and line.slab is not None:
            capacity = line.slab.capacity_tokens
            try:
                self.tiers.reserve(line, capacity_for(capacity + more))
            except PoolExhausted:
                assert line.slab.capacity_tokens == capacity
            else:
                assert line.slab.capacity_tokens >= capacity + more

    # -- what happens to lines at rest -----------------------------------------------------------

    @rule(index=indices)
    def park(self, index: int) -> None:
        line = self.lines[index]
        if line.is_held:
            held = list(line.token_ids)
            self.tiers.park(line)
            assert line.token_ids == held
            assert not line.num_to_restore

    @rule(index=indices)
    def demote(self, index: int) -> None:
        line = self.lines[index]
        if line.slab is not None and not line.is_held:
            held = list(line.token_ids)
            self.tiers.demote(line)
            assert line.token_ids == held
            assert line.slab is None

    @rule(index=indices, num_tokens=lengths)
    def truncate(self, index: int, num_tokens: int) -> None:
        line = self.lines[index]
        before, was_hot = list(line.token_ids), line.slab is not None
        wanted = before[:num_tokens]
        self.tiers.truncate(line, num_tokens)
        assert line.token_ids == wanted[: len(line.token_ids)]
        if was_hot and not line.num_to_restore:
            assert line.slab is not None
        assert len(line.token_ids) >= len(wanted) // 256 * 256

    @rule(index=indices, child=indices, num_tokens=lengths)
    def fork(self, index: int, child: int, num_tokens: int) -> None:
        parent = self.lines[index]
        if index == child or self.lines[child].is_held or parent.num_to_restore:
            return
        self.forget(child)
        before = list(parent.token_ids)
        forked = self.lines[child] = self.tiers.fork(parent, num_tokens)
        assert parent.token_ids == before
        num_held = min(num_tokens, len(before))
        assert num_held // 256 * 256 <= common_prefix(forked.token_ids, before) <= num_held

    @rule(index=indices)
    def forget(self, index: int) -> None:
        line = self.lines[index]
        others = {other: list(other.token_ids) for other in self.lines if other is not line}
        if not line.is_held:
            self.tiers.forget(line)
            self.lines[index] = self.tiers.new_line()
            for other, before in others.items():
                assert other.token_ids == before[: len(other.token_ids)]

    @rule(index=indices)
    def discard_slab(self, index: int) -> None:
        line = self.lines[index]
        if line.slab is not None:
            self.tiers.discard_slab(line)
            assert line.slab is None
            assert not line.is_held

    @rule(index=indices, pinned=st.booleans())
    def pin(self, index: int, pinned: bool) -> None:
        self.tiers.pin(self.lines[index], pinned=pinned)

    @rule(num_blocks=st.integers(1, 16))
    def make_room(self, num_blocks: int) -> None:
        held = {line: list(line.token_ids) for line in self.lines if line.pinned or line.is_held}
        needed = num_blocks * BLOCK_BYTES
        try:
            self.tiers.make_room(needed)
        except PoolExhausted:
            assert held or needed > self.tiers.pool.budget_bytes
        else:
            assert self.tiers.pool.free_bytes >= needed
        assert held == {line: line.token_ids for line in held}

    # -- what is always so -----------------------------------------------------------------------

    @invariant()
    def the_books_balance(self) -> None:
        if hasattr(self, "tiers"):
            self.tiers.check()

    @invariant()
    def all_kv_is_the_kv_of_its_ids(self) -> None:
        if hasattr(self, "tiers"):
            check_values(self.tiers)


TestTiers = TiersMachine.TestCase
TestTiers.settings = settings(
    max_examples=250,
    stateful_step_count=40,
    deadline=None,
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.too_slow],
)
