"""The engine's thread and its door: bugs, rebuilds, cancelled submissions, stops."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from doors import (
    GatedFactory,
    Opener,
    cancel,
    check_is_empty,
    end_of,
    engine_of,
    events_of,
    hold,
    message,
    reply,
    run,
    text,
    until,
)
from keepwarm import BlockPoolBatchEngine
from keepwarm.core.errors import (
    EngineBroke,
    EngineStopped,
    InvalidRequest,
    InvariantBroken,
    QueueFull,
    QueueTimeout,
    UnknownAgent,
)
from keepwarm.core.events import Completed, Event, Failed, FinishReason
from keepwarm.engine.agents.commits import Commit
from keepwarm.fleet.fleet import Fleet
from keepwarm.service.async_engine import AsyncEngine
from keepwarm.service.engine_thread import MAX_REBUILDS


class Bug(Exception):
    """What nobody expects."""


def breaks_at(step: int, *, engines: int = 1) -> Any:
    """The first engines raise in that step."""

    def change(number: int, engine: BlockPoolBatchEngine) -> None:
        if number >= engines:
            return
        steps, original = iter(range(1_000_000)), engine.step

        def broken(**_: object) -> list[Event]:
            if engine.has_work and next(steps) == step:
                raise Bug("in the middle of a step")
            return original()

        engine.step = broken  # type: ignore[method-assign]

    return change


class TestCommands:
    def test_what_a_command_raises_reaches_its_caller_alone(self) -> None:
        async def test() -> None:
            async with engine_of(Opener()) as engine:
                running = await engine.submit(text(max_tokens=500))
                with pytest.raises(InvalidRequest, match="max_tokens"):
                    await engine.submit(text(max_tokens=0))
                with pytest.raises(ZeroDivisionError):
                    await engine.call(lambda _: 1 // 0)
                with pytest.raises(UnknownAgent):
                    await engine.submit(message())
                with pytest.raises(UnknownAgent):
                    await engine.change(lambda fleet: (fleet.delete("nobody"), None))
                assert engine.num_answers == 0
                assert isinstance(await end_of(running), Completed)
                assert await engine.call(lambda e: e.snapshot().num_running) == 0

        run(test())

    def test_none_is_taken_after_the_end(self) -> None:
        async def test() -> None:
            async with engine_of(Opener()) as engine:
                pass
            with pytest.raises(EngineStopped):
                await engine.submit(text())
            with pytest.raises(EngineStopped):
                await engine.call(lambda e: e.snapshot())
            assert not await engine.stop(0.0)

        run(test())

    def test_those_under_way_at_the_end_are_answered(self) -> None:
        async def test() -> None:
            async with engine_of(Opener()) as engine:
                released = await hold(engine)
                calls = [asyncio.ensure_future(engine.call(lambda e: e.snapshot())) for _ in "abc"]
                await asyncio.sleep(0)
                stopping = asyncio.ensure_future(engine.stop(0.0))
                await asyncio.sleep(0.05)
                released.set()
                await stopping
                for result in await asyncio.gather(*calls, return_exceptions=True):
                    assert not isinstance(result, BaseException) or isinstance(
                        result, EngineStopped
                    )

        run(test())


class TestBugs:
    def test_every_stream_ends_and_the_engine_is_opened_again(self, tmp_path: Path) -> None:
        """With what is on disk: an agent goes on where its last turn ended."""

        async def test() -> None:
            opener = Opener(tmp_path, max_rows=2)
            async with engine_of(opener) as engine:
                await engine.call_at("ada", lambda e: e.create("ada"))
                assert (await reply(engine, message())).durable
                released = await hold(engine)
                asked = [asyncio.ensure_future(engine.submit(text())) for _ in range(5)]
                await asyncio.sleep(0)
                broken = engine.call_at("ada", lambda e: breaks_at(0)(0, e))
                asyncio.get_running_loop().call_later(0.01, released.set)
                await broken
                streams = await asyncio.gather(*asked)
                ends = [await end_of(stream) for stream in streams]
                assert [type(end) for end in ends] == [Failed] * 5
                assert all(isinstance(end.error, EngineBroke) for end in ends)  # type: ignore[union-attr]
                assert engine.num_requests == 0
                again = await reply(engine, message("More"))
                assert again.turn == 2
                assert len(opener.opened) == 2
                assert opener.num_closed == 1
                await engine.call_at("ada", check_is_empty)

        run(test())

    def test_a_change_that_waits_for_the_disk_is_answered_once(self, tmp_path: Path) -> None:
        """As failed, when the engines break; the disk's own answer comes too late."""

        async def test() -> None:
            async with engine_of(Opener(tmp_path)) as engine:
                await engine.call_at("ada", lambda e: e.create("ada"))
                commits: list[Commit] = []

                def change(fleet: Fleet) -> tuple[Commit, None]:
                    commits.append(Commit("ada"))
                    fleet.step = lambda: 1 // 0  # type: ignore[method-assign, assignment, return-value]
                    return commits[0], None

                with pytest.raises(EngineBroke):
                    await engine.change(change)
                commits[0].answer(durable=True)
                assert (await reply(engine, message())).durable

        run(test())

    def test_the_streams_are_told_what_had_been_said(self) -> None:
        async def test() -> None:
            async with engine_of(Opener(change=breaks_at(30))) as engine:
                events = await events_of(await engine.submit(text(max_tokens=400)))
                assert isinstance(events[-1], Failed)
                assert isinstance(events[-1].error, EngineBroke)
                assert isinstance(events[-1].error.cause, Bug)

        run(test())

    def test_after_too_many_it_ends_for_good(self) -> None:
        async def test() -> None:
            opener = Opener(change=breaks_at(3, engines=100))
            async with engine_of(opener) as engine:
                for _ in range(MAX_REBUILDS + 1):
                    end = await end_of(await engine.submit(text(max_tokens=50)))
                    assert isinstance(end, Failed)
                await until(lambda: engine.has_ended)
                assert not engine.is_serving
                assert len(opener.opened) == opener.num_closed == MAX_REBUILDS + 1
                with pytest.raises(EngineStopped):
                    await engine.submit(text())

        run(test())

    def test_one_that_cannot_be_opened_again_ends(self) -> None:
        def change(number: int, engine: BlockPoolBatchEngine) -> None:
            if number:
                raise OSError("the model has gone")
            breaks_at(3)(number, engine)

        async def test() -> None:
            async with engine_of(Opener(change=change)) as engine:
                end = await end_of(await engine.submit(text(max_tokens=50)))
                assert isinstance(end, Failed)
                await until(lambda: engine.has_ended)
                with pytest.raises(EngineStopped):
                    await engine.submit(text())

        run(test())

    def test_one_that_cannot_be_opened_at_all_says_why(self) -> None:
        def change(number: int, engine: BlockPoolBatchEngine) -> None:
            raise OSError("there is no model")

        async def test() -> None:
            engine = AsyncEngine(Opener(change=change))
            with pytest.raises(OSError, match="there is no model"):
                await engine.start()
            assert engine.has_ended

        run(test())

    def test_a_store_that_does_not_close_is_no_obstacle(self) -> None:
        async def test() -> None:
            opener = Opener(change=breaks_at(3))
            inner = opener.__call__

            def open_engine() -> Any:
                engine, close = inner()

                def fails() -> None:
                    close()
                    raise OSError("it does not close")

                return engine, fails

            engine = AsyncEngine(open_engine)
            await engine.start()
            assert isinstance(await end_of(await engine.submit(text(max_tokens=50))), Failed)
            assert isinstance(await end_of(await engine.submit(text())), Completed)
            await engine.stop(0.0)

        run(test())

    def test_an_old_streams_hang_up_does_not_end_anothers_request(self) -> None:
        """The new engine counts its requests from the start, so their ids are the same."""

        async def test() -> None:
            async with engine_of(Opener(change=breaks_at(3))) as engine:
                old = await engine.submit(text(max_tokens=50))
                failed = await end_of(old)
                old.end = asyncio.get_running_loop().create_future()  # as if it had not heard yet
                new = await engine.submit(text(max_tokens=300))
                old.hang_up()
                end = await end_of(new)
                assert end.request_id == failed.request_id
                assert isinstance(end, Completed)
                assert end.finish_reason is FinishReason.LENGTH

        run(test())

    def test_agents_in_line_are_served_by_the_next_engine(self, tmp_path: Path) -> None:
        async def test() -> None:
            async with engine_of(Opener(tmp_path, change=breaks_at(60))) as engine:
                await engine.call_at("ada", lambda e: e.create("ada"))
                await engine.call_at("ada", lambda e: e.flush())
                asked = [engine.submit(message(str(n), max_tokens=90)) for n in range(3)]
                tasks = [asyncio.ensure_future(one) for one in asked]
                ends = [await end_of(await task) for task in tasks]
                assert [type(end) for end in ends] == [Failed, Completed, Completed]

        run(test())


class TestSubmitting:
    def test_cancelled_before_the_engine_took_it(self) -> None:
        async def test() -> None:
            async with engine_of(Opener()) as engine:
                released = await hold(engine)
                task = asyncio.ensure_future(engine.submit(text(max_tokens=10_000)))
                await asyncio.sleep(0.01)
                await cancel(task)
                released.set()
                await engine.call_at("ada", check_is_empty)
                assert await engine.call(lambda e: e.snapshot().batch.decoded_tokens) == 0

        run(test())

    def test_cancelled_when_the_engine_had_just_taken_it(self) -> None:
        async def test() -> None:
            factory = GatedFactory()
            async with engine_of(Opener(factory=factory)) as engine:
                factory.gate.close()
                task = asyncio.ensure_future(engine.submit(text(max_tokens=10_000)))
                await asyncio.sleep(0)
                _until_waiting(factory)  # this thread has not heard that it was taken
                await cancel(task)
                assert task.cancelled()
                factory.gate.open()
                await engine.call_at("ada", check_is_empty)
                assert engine.num_requests == 0

        run(test())

    @pytest.mark.parametrize("seed", range(40))
    def test_cancelled_at_any_moment(self, seed: int) -> None:
        async def test() -> None:
            async with engine_of(Opener(max_rows=2)) as engine:
                await engine.call_at("ada", lambda e: e.create("ada"))
                tasks = [
                    asyncio.ensure_future(
                        engine.submit(message(max_tokens=5) if n % 2 else text(max_tokens=9_000))
                    )
                    for n in range(6)
                ]
                for n in range(seed):
                    await asyncio.sleep(0 if n % 5 else 0.0003)
                for task in tasks:
                    if task.done() and not task.cancelled():
                        task.result().hang_up()
                    await cancel(task)
                await until(lambda: engine.is_idle)
                await engine.call_at("ada", check_is_empty)
                assert (await reply(engine, message())).finish_reason is FinishReason.LENGTH

        run(test())


class TestStopping:
    def test_replies_end_within_the_grace(self, tmp_path: Path) -> None:
        async def test() -> None:
            opener = Opener(tmp_path)
            async with engine_of(opener, grace_s=30.0) as engine:
                await engine.call_at("ada", lambda e: e.create("ada"))
                stream = await engine.submit(message(max_tokens=200))
                assert await engine.stop(30.0)
                end = stream.end.result()
                assert isinstance(end, Completed)
                assert end.durable
                assert end.usage.completion_tokens == 200

        run(test())

    def test_one_that_is_cut_off_keeps_what_was_said(self, tmp_path: Path) -> None:
        async def test() -> None:
            factory = GatedFactory()
            async with engine_of(Opener(tmp_path, factory=factory)) as engine:
                await engine.call_at("ada", lambda e: e.create("ada"))
                stream = await engine.submit(message(max_tokens=80_000))
                await until(lambda: len(stream._said.joined()) > 20)
                factory.gate.close()
                stopping = asyncio.ensure_future(engine.stop(0.05))
                end = await end_of(stream)
                factory.gate.open()
                assert await stopping
                assert isinstance(end, Failed)
                assert isinstance(end.error, EngineStopped)
                assert end.text
            async with engine_of(Opener(tmp_path)) as engine:
                (turn,) = await engine.call_at("ada", lambda e: e.turns("ada"))
                assert turn.messages is not None
                assert turn.messages[-1]["content"].startswith(end.text[:20])

        run(test())

    def test_a_waiting_request_is_refused(self) -> None:
        async def test() -> None:
            factory = GatedFactory()
            async with engine_of(Opener(factory=factory)) as engine:
                await engine.call_at("ada", lambda e: e.create("ada"))
                factory.gate.close()
                first = await engine.submit(message(max_tokens=80_000))
                waiting = asyncio.ensure_future(engine.submit(message()))
                await asyncio.sleep(0.01)
                stopping = asyncio.ensure_future(engine.stop(0.02))
                assert isinstance(await end_of(first), Failed)
                with pytest.raises(EngineStopped):
                    await waiting
                factory.gate.open()
                await stopping

        run(test())

    def test_a_disk_that_refuses_is_no_good_end(self, tmp_path: Path) -> None:
        def change(number: int, engine: BlockPoolBatchEngine) -> None:
            engine.close = lambda timeout_s=0.0: False  # type: ignore[method-assign]

        async def test() -> None:
            async with engine_of(Opener(tmp_path, change=change)) as engine:
                assert not await engine.stop(0.0)
                assert not engine.has_stopped_well

        run(test())

    def test_a_save_that_raises_is_no_good_end(self) -> None:
        def change(number: int, engine: BlockPoolBatchEngine) -> None:
            def fails(timeout_s: float = 0.0) -> bool:
                raise InvariantBroken("while saving")

            engine.close = fails  # type: ignore[method-assign]

        async def test() -> None:
            async with engine_of(Opener(change=change)) as engine:
                assert not await engine.stop(0.0)

        run(test())


class TestLimits:
    def test_the_line_before_an_agent_is_bounded(self) -> None:
        async def test() -> None:
            factory = GatedFactory()
            async with engine_of(Opener(factory=factory), max_waiting=2) as engine:
                await engine.call_at("ada", lambda e: e.create("ada"))
                factory.gate.close()
                first = await engine.submit(message(max_tokens=500))
                in_line = [asyncio.ensure_future(engine.submit(message())) for _ in "ab"]
                await asyncio.sleep(0)
                with pytest.raises(QueueFull):
                    await engine.submit(message())
                factory.gate.open()
                first.hang_up()
                for task in in_line:
                    assert isinstance(await end_of(await task), Completed)

        run(test())

    def test_the_engines_queue_is_bounded(self) -> None:
        async def test() -> None:
            factory = GatedFactory()
            async with engine_of(Opener(factory=factory, max_rows=1, max_waiting=2)) as engine:
                factory.gate.close()
                first = await engine.submit(text(max_tokens=500))
                await asyncio.to_thread(_until_waiting, factory)
                asking = asyncio.ensure_future(_submit_many(engine, 3))
                await asyncio.sleep(0.01)
                factory.gate.open()
                assert [type(error) for error in await asking] == [QueueFull]
                assert isinstance(await end_of(first), Completed)

        run(test())

    def test_the_queue_timeout_counts_both_waits(self) -> None:
        async def test() -> None:
            factory = GatedFactory()
            async with engine_of(Opener(factory=factory, max_rows=1)) as engine:
                await engine.call_at("ada", lambda e: e.create("ada"))
                factory.gate.close()
                running = await engine.submit(message(max_tokens=80_000))
                with pytest.raises(QueueTimeout):
                    await engine.submit(message(queue_timeout_s=0.02))
                waiting = asyncio.ensure_future(engine.submit(text(queue_timeout_s=0.02)))
                await asyncio.sleep(0)
                factory.gate.allow(2)
                end = await end_of(await waiting)
                assert isinstance(end, Failed)
                assert isinstance(end.error, QueueTimeout)
                factory.gate.open()
                running.hang_up()
                await end_of(running)
                await engine.call_at("ada", check_is_empty)

        run(test())


def _until_waiting(factory: GatedFactory) -> None:
    while not factory.gate.num_waited:
        pass


async def _submit_many(engine: AsyncEngine, number: int) -> list[BaseException]:
    """What was refused; the others end."""
    streams = await asyncio.gather(
        *(engine.submit(text()) for _ in range(number)), return_exceptions=True
    )
    for stream in streams:
        if not isinstance(stream, BaseException):
            await end_of(stream)
    return [error for error in streams if isinstance(error, BaseException)]
