"""Does what an agent keeps say the same as a cold run? And what becomes of what does not."""

from array import array
from pathlib import Path
from typing import Any

import pytest

from engines import (
    FakeFactory,
    check_values,
    completed,
    drain,
    fake_engine,
    fresh_reply,
    generator_of,
    ids,
    main_blocks,
    run,
    settle,
    step,
)
from keepwarm import BlockPoolBatchEngine
from keepwarm.core.agent_store import AgentStore
from keepwarm.core.errors import AgentBusy, GeneratorFailed, PoolExhausted, UnknownAgent
from keepwarm.core.fidelity import kv_bound
from keepwarm.core.stored import Record, Saved
from keepwarm.kv.verifier import SCRATCH_ROW, VerifyReport
from keepwarm.testing.agent_store import MemoryAgentStore
from keepwarm.testing.generator import FakePayload, FakeSlab
from stores import Restart, hear


def verified(engine: BlockPoolBatchEngine, agent_id: str = "ada") -> VerifyReport:
    """Verify, with the bookkeeping checked, and no row or slab left behind."""
    engine.agent(agent_id)
    lines = len(engine.tiers._lines)
    report = engine.verify(agent_id)
    engine.check()
    check_values(engine.tiers)
    assert SCRATCH_ROW not in generator_of(engine)._rows
    assert len(engine.tiers._lines) == lines
    return report


def say(engine: BlockPoolBatchEngine, num_tokens: int = 600) -> list[int]:
    """Everything that ada has said and heard."""
    reply = run(engine, agent_id="ada", token_ids=ids(num_tokens), max_tokens=3)
    return [*ids(num_tokens), *reply.token_ids]


class TestHonestKV:
    @pytest.mark.parametrize("num_tokens", [5, 255, 256, 257, 600])
    def test_hot_warm_and_cold(self, restart: Restart, num_tokens: int) -> None:
        engine = restart()
        num_held = len(say(engine, num_tokens)) - 1
        hot = verified(engine)
        assert hot.passed
        assert hot.largest == 0.0
        assert hot.num_compared == num_held
        assert sum(block.num_tokens for block in hot.blocks) == num_held
        assert all(block.in_memory == 0.0 for block in hot.blocks)
        engine.demote("ada")
        assert verified(engine).num_compared == num_held
        engine = restart()
        cold = verified(engine)
        assert cold.passed
        assert cold.num_compared == num_held
        assert all(block.in_memory is None for block in cold.blocks)
        assert all(block.on_disk == 0.0 for block in cold.blocks)
        assert not main_blocks(engine, "ada").num_tokens

    def test_its_own_kv_stays_as_it_is(self, restart: Restart) -> None:
        engine = restart()
        said = say(engine)
        slab = main_blocks(engine, "ada").slab
        before = engine.snapshot().pool.num_by_kind["slab"]
        verified(engine)
        assert main_blocks(engine, "ada").slab is slab
        assert engine.snapshot().pool.num_by_kind["slab"] == before
        turn = run(engine, agent_id="ada", token_ids=[*said, 1], max_tokens=3)
        assert turn.cache.tier == "hot"

    def test_it_computes_in_the_engines_chunks(self) -> None:
        engine = fake_engine(prefill_chunk_tokens=100)
        say(engine, 300)
        before = len(generator_of(engine).prefilled)
        verified(engine)
        chunks = [length for _, length in generator_of(engine).prefilled[before:]]
        assert chunks == [100, 100, 56, 46]

    def test_beside_others_that_run(self, restart: Restart) -> None:
        engine = restart()
        say(engine)
        request = engine.submit(agent_id="bob", token_ids=ids(300, 1), max_tokens=50)
        step(engine, 5)
        assert verified(engine).passed
        turn = completed(drain(engine), request)
        assert turn.token_ids == fresh_reply(ids(300, 1), max_tokens=50)

    def test_while_it_is_put_away(self, restart: Restart) -> None:
        engine = restart()
        say(engine)
        engine.park("ada")
        assert verified(engine).passed
        settle(engine)
        assert verified(engine).num_compared == 602

    def test_an_agent_without_kv(self, restart: Restart) -> None:
        engine = restart()
        request = engine.submit(agent_id="ada", token_ids=ids(5), max_tokens=3)
        engine.cancel(request)
        drain(engine)
        report = verified(engine)
        assert (report.passed, report.num_compared, report.blocks) == (True, 0, ())

    def test_a_line_whose_kv_left_the_conversation(self, restart: Restart) -> None:
        """A request that was cancelled before its first token leaves KV of another continuation."""
        engine = restart()
        say(engine, 300)
        request = engine.submit(agent_id="ada", token_ids=[*ids(280), *ids(900, 1)], max_tokens=3)
        step(engine, 1)
        engine.cancel(request)
        drain(engine)
        report = verified(engine)
        assert report.passed
        assert report.num_compared >= 256


class TestWrongKV:
    def test_in_a_slab(self, restart: Restart) -> None:
        engine = restart()
        said = say(engine)
        settle(engine)
        slab = main_blocks(engine, "ada").slab
        assert isinstance(slab, FakeSlab)
        slab.values[300] += 1
        report = engine.verify("ada")
        assert not report.passed
        assert report.differing == (1,)
        assert report.blocks[1].in_memory == 1.0
        assert report.blocks[1].on_disk == 0.0
        assert main_blocks(engine, "ada").num_tokens == 256
        self.goes_on(engine, said)

    def test_in_a_slabs_tail(self, restart: Restart) -> None:
        engine = restart()
        said = say(engine)
        slab = main_blocks(engine, "ada").slab
        assert isinstance(slab, FakeSlab)
        slab.values[599] += 1
        assert engine.verify("ada").differing == (2,)
        assert main_blocks(engine, "ada").num_tokens == 512
        self.goes_on(engine, said)

    def test_in_blocks_and_in_a_tail(self, restart: Restart) -> None:
        engine = restart()
        said = say(engine)
        engine.demote("ada")
        settle(engine)
        blocks = main_blocks(engine, "ada")
        blocks.tail = wrong(blocks.tail)
        assert engine.verify("ada").differing == (2,)
        assert blocks.num_tokens == 512
        blocks.blocks[0].payload = wrong(blocks.blocks[0].payload)
        assert engine.verify("ada").differing == (0,)
        assert blocks.num_tokens == 0
        self.goes_on(engine, said)

    @pytest.mark.parametrize("depth", [0, 1, 2])
    def test_on_disk_under_a_valid_checksum(self, restart: Restart, depth: int) -> None:
        said = say(restart())
        engine = restart()
        spoil(engine, said, depth)
        report = verified(engine)
        assert report.differing == (depth,)
        assert report.blocks[depth].on_disk == 1.0
        assert engine.agent("ada").held_tokens == depth * 256
        again = verified(engine)
        assert again.passed
        assert again.num_compared == depth * 256
        self.goes_on(engine, said)

    def test_a_record_that_cannot_be_read(self) -> None:
        store = MemoryAgentStore()
        engine = fake_engine(store=store)
        said = say(engine)
        engine.close()
        engine = fake_engine(store=store)
        store.unreadable.add(records_of(engine, said)[1].hash)
        report = verified(engine)
        assert report.passed
        assert report.num_compared == 256

    def test_all_who_rely_on_it_forget_it(self, restart: Restart) -> None:
        """A fork at rest, another that runs, and one that was restored from the wrong copy."""
        engine = restart()
        said = say(engine)
        engine.demote("ada")
        for name in ("warm", "busy"):
            engine.fork("ada", name)
        blocks = main_blocks(engine, "ada")
        request = engine.submit(agent_id="busy", token_ids=[*said, 7], max_tokens=40)
        step(engine, 3)
        blocks.blocks[1].payload = wrong(blocks.blocks[1].payload)
        slab = main_blocks(engine, "busy").slab
        assert isinstance(slab, FakeSlab)
        slab.values[256 + 7] += 1
        assert engine.verify("ada").differing == (1,)
        engine.check()
        for name in ("ada", "warm"):
            assert main_blocks(engine, name).num_tokens == 256
        turn = completed(drain(engine), request)
        assert turn.token_ids[-20:] == fresh_reply([*said, 7], max_tokens=40)[-20:]
        check_values(engine.tiers)

    def goes_on(self, engine: BlockPoolBatchEngine, said: list[int]) -> None:
        prompt = [*said, 9]
        turn = run(engine, agent_id="ada", token_ids=prompt, max_tokens=9)
        assert turn.token_ids == fresh_reply(prompt, max_tokens=9)
        assert verified(engine).passed


class TestImported:
    def test_lies_stay_private_and_are_dropped(self, tmp_path: Path) -> None:
        bundles: dict[Path, Any] = {}
        one, two = MemoryAgentStore(bundles), MemoryAgentStore(bundles)
        engine = fake_engine(store=one)
        said = say(engine)
        engine.close()
        spoil(engine, said, 1)
        engine.export("ada", tmp_path / "ada")
        engine = fake_engine(store=two)
        engine.import_agent(tmp_path / "ada")
        report = verified(engine)
        assert (report.differing, report.became_shared) == ((1,), False)
        assert engine.agent("ada").is_private
        turn = run(engine, agent_id="ada", token_ids=[*said, 1], max_tokens=5)
        assert turn.cache.cached_tokens == 256
        assert turn.token_ids == fresh_reply([*said, 1], max_tokens=5)
        assert verified(engine).became_shared
        settle(engine)
        engine.close()
        engine = fake_engine(store=two)
        assert run(engine, token_ids=[*said, 1], max_tokens=1).cache.cached_tokens >= 512
        assert two.health().num_records == len(records_of(engine, [*said, 1, *turn.token_ids]))

    def test_that_it_became_shared_waits_for_the_disk(self, tmp_path: Path) -> None:
        bundles: dict[Path, Any] = {}
        store = MemoryAgentStore(bundles)
        engine = fake_engine(store=store)
        say(engine)
        engine.export("ada", tmp_path / "ada")
        engine.import_agent(tmp_path / "ada", "eve")
        engine.import_agent(tmp_path / "ada", "bob")
        assert verified(engine, "eve").is_durable
        store.refuses = True
        report = verified(engine, "bob")
        assert (report.became_shared, report.is_durable) == (True, False)

    def test_one_without_kv_is_shared_at_once(self, tmp_path: Path) -> None:
        engine = fake_engine(store=MemoryAgentStore())
        say(engine)
        engine.export("ada", tmp_path / "ada")
        engine.import_agent(tmp_path / "ada", "eve")
        engine.forget_cache("eve")
        engine._store.drop(
            [r.hash for r in records_of(engine, ids(700), main_blocks(engine, "eve").namespace)]
        )
        assert verified(engine, "eve").became_shared
        assert not engine.agent("eve").is_private


class TestWhereItCannot:
    def test_an_unknown_agent_and_a_busy_one(self, restart: Restart) -> None:
        engine = restart()
        with pytest.raises(UnknownAgent):
            engine.verify("nobody")
        engine.submit(agent_id="ada", token_ids=ids(5), max_tokens=2)
        with pytest.raises(AgentBusy):
            engine.verify("ada")

    def test_without_room_for_a_second_copy(self, restart: Restart) -> None:
        engine = restart(num_blocks=7)
        said = say(engine, 1000)
        with pytest.raises(PoolExhausted):
            engine.verify("ada")
        engine.check()
        turn = run(engine, agent_id="ada", token_ids=[*said, 1], max_tokens=3)
        assert turn.cache.tier == "hot"
        engine.park("ada")
        settle(engine)
        step(engine)
        tight = restart(num_blocks=10)
        assert verified(tight).passed

    @pytest.mark.parametrize("call", range(1, 5))
    def test_the_model_fails(self, call: int) -> None:
        factory = FakeFactory()
        engine = fake_engine(factory=factory, store=MemoryAgentStore())
        say(engine)
        generator = generator_of(engine)
        request = engine.submit(agent_id="bob", token_ids=ids(300, 1), max_tokens=50)
        step(engine, 3)
        generator._fail_at = {generator.num_calls + call}
        try:
            engine.verify("ada")
        except GeneratorFailed:
            assert call <= 3
        else:
            assert call == 4
            generator._fail_at = set()
        engine.check()
        check_values(engine.tiers)
        assert SCRATCH_ROW not in generator._rows
        assert completed(drain(engine), request).token_ids == fresh_reply(
            ids(300, 1), max_tokens=50
        )
        assert engine.verify("ada").passed

    def test_something_else_fails(self, monkeypatch: pytest.MonkeyPatch) -> None:
        engine = fake_engine()
        say(engine)
        generator = generator_of(engine)

        def fail(*_: object) -> float:
            raise ZeroDivisionError

        monkeypatch.setattr(generator, "largest_difference", fail)
        with pytest.raises(ZeroDivisionError):
            engine.verify("ada")
        assert SCRATCH_ROW not in generator._rows
        engine.check()


def test_bounds() -> None:
    assert kv_bound("float32", deterministic=False) == 5e-4
    assert kv_bound("bfloat16", deterministic=True) == 0.0
    assert kv_bound("float32", deterministic=False) < kv_bound("float16", deterministic=False)


class TestPriority:
    def test_an_agents_priority_is_its_requests_default(self, restart: Restart) -> None:
        engine = restart()
        say(engine, 5)
        engine.configure("ada", priority=9)
        assert priority_of(engine, agent_id="ada") == 9
        assert priority_of(engine, agent_id="ada", priority=0) == 0
        assert priority_of(engine, agent_id="ada", priority=-3) == -3
        assert priority_of(engine, agent_id="bob") == 0
        assert priority_of(engine) == 0
        assert priority_of(restart(), agent_id="ada") == 9

    def test_it_is_admitted_first(self) -> None:
        engine = fake_engine(max_rows=1)
        say(engine, 5)
        engine.configure("ada", priority=9)
        requests = [
            engine.submit(agent_id=name, token_ids=ids(20, salt), max_tokens=2)
            for salt, name in enumerate(("bob", "eve", "ada"), 1)
        ]
        endings = [event.request_id for event in drain(engine) if hasattr(event, "finish_reason")]
        assert endings == [requests[2], requests[0], requests[1]]


def priority_of(engine: BlockPoolBatchEngine, **request: Any) -> int:
    request_id = engine.submit(token_ids=ids(5), max_tokens=1, **request)
    priority = engine._turns.active[request_id].sequence.priority
    engine.cancel(request_id)
    drain(engine)
    return priority


def wrong(payload: Any) -> FakePayload:
    values = list(payload.values)
    values[7] += 1
    return FakePayload(tuple(values), payload.token_bytes)


def records_of(
    engine: BlockPoolBatchEngine, token_ids: list[int], namespace: str = ""
) -> list[Record]:
    family = engine.tiers.family_of(namespace)
    return engine._store.plan(family, family.root, token_ids)


def spoil(engine: BlockPoolBatchEngine, said: list[int], depth: int) -> None:
    """One wrong value in a block's record, which is otherwise as the store writes it."""
    store: AgentStore = engine._store
    record = records_of(engine, said)[depth]
    buffer = bytearray(store.record_bytes(engine.tiers.family_of(""), record.num_tokens))
    read: list[Any] = []
    store.fetch(engine.tiers.family_of(""), record, buffer, read.append)
    hear(store, lambda: read)
    values = array("Q", bytes(read[0]))
    values[7] += 1
    data = memoryview(values.tobytes())
    block = said[depth * 256 : depth * 256 + record.stop]
    store.drop([record.hash])
    half = len(data) // 2
    saved: list[Saved] = []
    store.save(
        engine.tiers.family_of(""), record, block, [data[:half], data[half:]], "ada", saved.append
    )
    hear(store, lambda: saved)
    assert saved == [Saved.WRITTEN]
