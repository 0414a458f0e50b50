"""Corners of the moves between the tiers, each on a budget that leaves no other way."""

import pytest

from engines import BLOCK_BYTES, check_values, fake_loaded, ids
from keepwarm.core.agent import AgentBlocks
from keepwarm.core.layout import capacity_for
from keepwarm.core.pool import BlockPool
from keepwarm.core.ports import RowId, RowInput
from keepwarm.core.stored import KVFamily
from keepwarm.kv.generator_source import GeneratorSource
from keepwarm.kv.tiers import Tiers
from keepwarm.testing.generator import FAKE_LAYOUT, GeneratorFault

ROW = RowId(1)


def new_tiers(budget_bytes: int) -> Tiers:
    return Tiers(
        BlockPool(budget_bytes),
        GeneratorSource(fake_loaded()),
        family=KVFamily("fake", FAKE_LAYOUT),
    )


def computed(tiers: Tiers, token_ids: list[int]) -> AgentBlocks:
    """A resting hot line with the KV of these ids."""
    line = tiers.new_line()
    tiers.make_hot(line, token_ids, capacity_for(len(token_ids)))
    assert line.slab is not None
    for start in range(0, len(token_ids), 256):
        chunk = token_ids[start : start + 256]
        tiers.model.generator.open_row(ROW, line.slab)
        tiers.model.generator.step([RowInput(ROW, chunk)])
        tiers.model.generator.close_row(ROW)
        tiers.advance(line, chunk)
    tiers.park(line)
    return line


def check(tiers: Tiers) -> None:
    tiers.check()
    check_values(tiers)


def test_a_line_that_is_being_restored_can_be_cut_anywhere() -> None:
    for num_tokens in (0, 1, 256, 300, 512, 550):
        tiers = new_tiers(100 * BLOCK_BYTES)
        line = computed(tiers, ids(600))
        tiers.demote(line)
        tiers.make_hot(line, ids(700), 768)
        tiers.promotion.restore(line, 1)
        tiers.truncate(line, num_tokens)
        check(tiers)
        tiers.park(line)
        check(tiers)


def test_cutting_a_block_never_evicts_that_block() -> None:
    tiers = new_tiers(3 * BLOCK_BYTES + 100)
    line = computed(tiers, ids(512))
    tiers.demote(line)
    tiers.make_room(BLOCK_BYTES)
    other = computed(tiers, ids(100, 1))
    tiers.pin(other)
    tiers.demote(other)
    tiers.truncate(line, 500)
    check(tiers)
    assert line.num_tokens in (256, 500)


def test_a_child_keeps_the_blocks_it_shares_while_room_is_made_for_its_tail() -> None:
    tiers = new_tiers(3 * BLOCK_BYTES)
    parent = computed(tiers, ids(700))
    child = tiers.fork(parent, 600)
    check(tiers)
    assert child.num_tokens == 512
    assert parent.num_tokens == 700


def test_a_block_that_others_rely_on_is_saved_before_its_slab_forgets_it() -> None:
    tiers = new_tiers(100 * BLOCK_BYTES)
    parent = computed(tiers, ids(700))
    child = tiers.fork(parent, 512)
    tiers.truncate(parent, 0)
    check(tiers)
    assert child.num_tokens == 512


def test_where_there_is_no_room_to_save_it_the_others_forget_it() -> None:
    tiers = new_tiers(3 * BLOCK_BYTES)
    parent = computed(tiers, ids(700))
    child = tiers.fork(parent, 512)
    tiers.truncate(parent, 0)
    check(tiers)
    assert child.num_tokens == 0


@pytest.mark.parametrize("call", ["extract", "dismantle"])
def test_a_slab_that_cannot_be_read_is_given_up(
    call: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its line computes its KV again; whoever needs the room is not failed for it."""
    tiers = new_tiers((6 if call == "extract" else 3) * BLOCK_BYTES)
    line = computed(tiers, ids(700))

    def fail(*_: object) -> None:
        raise GeneratorFault("no memory left")

    monkeypatch.setattr(tiers.model.generator, call, fail)
    tiers.demote(line)
    check(tiers)
    assert line.num_tokens == 0
    assert tiers.pool.used_bytes == 0
    assert "KV of 700 tokens is given up" in caplog.text
