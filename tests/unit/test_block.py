"""Names of blocks, and what two runs of ids have in common."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepwarm.core.block import chain_hashes, child_hash, common_prefix, root_hash
from keepwarm.core.layout import BLOCK_TOKENS

ROOT = root_hash(fingerprint="model")


@pytest.mark.parametrize(
    "other",
    [
        root_hash(fingerprint="another model"),
        root_hash(fingerprint="model", lineage="q8"),
        root_hash(fingerprint="model", namespace="somebody else"),
        root_hash(fingerprint="modelexact", lineage=""),
        root_hash(fingerprint="mode", lineage="lexact"),
    ],
)
def test_other_weights_lineages_and_namespaces_share_nothing(other: bytes) -> None:
    assert other != ROOT


def test_a_child_is_named_by_its_parent_and_its_ids() -> None:
    token_ids = list(range(BLOCK_TOKENS))
    child = child_hash(ROOT, token_ids)
    assert child == child_hash(ROOT, tuple(token_ids))
    assert child != child_hash(child, token_ids)
    assert child != child_hash(ROOT, [*token_ids[:-1], 9999])
    assert child != child_hash(ROOT, [token_ids[1], token_ids[0], *token_ids[2:]])


@pytest.mark.parametrize(
    ("num_tokens", "num_hashes"), [(0, 0), (255, 0), (256, 1), (511, 1), (512, 2), (600, 2)]
)
def test_only_whole_blocks_have_a_name(num_tokens: int, num_hashes: int) -> None:
    assert len(list(chain_hashes(ROOT, range(num_tokens)))) == num_hashes


def test_a_chain_goes_through_the_parent() -> None:
    first, second = chain_hashes(ROOT, list(range(512)))
    assert first == child_hash(ROOT, list(range(256)))
    assert second == child_hash(first, list(range(256, 512)))
    changed_first, changed_second = chain_hashes(ROOT, [9, *range(1, 512)])
    assert changed_first != first
    assert changed_second != second


def test_a_chain_is_computed_as_far_as_it_is_asked_for() -> None:
    class Counting(list[int]):
        reads = 0

        def __getitem__(self, index: Any) -> Any:
            self.reads += 1
            return super().__getitem__(index)

    token_ids = Counting(range(2560))
    next(chain_hashes(ROOT, token_ids))
    assert token_ids.reads == 1


@given(
    shared=st.lists(st.integers(0, 5), max_size=600),
    one=st.lists(st.integers(0, 5), max_size=300),
    other=st.lists(st.integers(0, 5), max_size=300),
)
def test_the_common_prefix_is_the_longest(
    shared: list[int], one: list[int], other: list[int]
) -> None:
    a, b = shared + one, shared + other
    length = common_prefix(a, b)
    assert length >= len(shared)
    assert a[:length] == b[:length]
    assert a[length : length + 1] != b[length : length + 1] or length == min(len(a), len(b))
