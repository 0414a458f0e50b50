"""Requests that may be sent twice and run once."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from doors import GatedFactory, Opener, cancel, end_of, engine_of, events_of, message, run, until
from engines import FakeFactory
from keepwarm.core.errors import GeneratorFailed, KeyReused, UnknownAgent
from keepwarm.core.events import Completed, Delta, Failed
from keepwarm.engine.requests import ReceiptKey
from keepwarm.service.async_engine import AsyncEngine
from keepwarm.service.event_stream import EventStream

KEY = ReceiptKey("k", "digest")


async def with_ada(engine: AsyncEngine) -> None:
    await engine.call_at("ada", lambda e: e.create("ada"))


async def said(stream: EventStream) -> str:
    events = await events_of(stream)
    assert isinstance(events[-1], Completed)
    text = "".join(event.text for event in events if isinstance(event, Delta))
    assert text == events[-1].text
    return text


def test_twice_at_once_runs_once(tmp_path: Path) -> None:
    async def test() -> None:
        async with engine_of(Opener(tmp_path)) as engine:
            await with_ada(engine)
            asked = [engine.submit_once(message(max_tokens=30), KEY) for _ in range(5)]
            streams = await asyncio.gather(*asked)
            texts = await asyncio.gather(*(said(stream) for stream in streams))
            assert len(set(texts)) == 1
            assert len(await engine.call_at("ada", lambda e: e.turns("ada"))) == 1
            assert engine.is_idle

    run(test())


def test_another_request_under_the_key_is_refused_now_and_later(tmp_path: Path) -> None:
    async def test() -> None:
        factory = GatedFactory()
        async with engine_of(Opener(tmp_path, factory=factory)) as engine:
            await with_ada(engine)
            factory.gate.close()
            running = await engine.submit_once(message(), KEY)
            with pytest.raises(KeyReused):
                await engine.submit_once(message(), ReceiptKey("k", "other"))
            factory.gate.open()
            await end_of(running)
            with pytest.raises(KeyReused):
                await engine.submit_once(message(), ReceiptKey("k", "other"))

    run(test())


@pytest.mark.parametrize("times", [0, 1, 3])
def test_it_runs_on_when_its_reader_has_gone(tmp_path: Path, times: int) -> None:
    """Cancelled while submitting or later, once or again and again."""

    async def test() -> None:
        async with engine_of(Opener(tmp_path)) as engine:
            await with_ada(engine)
            for _ in range(2):
                task = asyncio.ensure_future(engine.submit_once(message(max_tokens=50), KEY))
                for _ in range(times):
                    await asyncio.sleep(0)
                await cancel(task)
            await said(await engine.submit_once(message(max_tokens=50), KEY))
            assert len(await engine.call_at("ada", lambda e: e.turns("ada"))) == 1

    run(test())


def test_the_reply_is_told_again_by_the_next_server(tmp_path: Path) -> None:
    async def test() -> None:
        async with engine_of(Opener(tmp_path)) as engine:
            await with_ada(engine)
            first = await end_of(await engine.submit_once(message(), KEY))
            assert isinstance(first, Completed)
        async with engine_of(Opener(tmp_path)) as engine:
            again = await end_of(await engine.submit_once(message(), KEY))
            assert isinstance(again, Completed)
            assert again.text == first.text
            assert again.usage == first.usage
            assert again.finish_reason == first.finish_reason
            assert len(await engine.call_at("ada", lambda e: e.turns("ada"))) == 1
            with pytest.raises(KeyReused):
                await engine.submit_once(message(), ReceiptKey("k", "other"))

    run(test())


def test_one_that_failed_may_run_again(tmp_path: Path) -> None:
    async def test() -> None:
        opener = Opener(tmp_path, factory=FakeFactory(fail_at=[[2]]))
        async with engine_of(opener) as engine:
            await with_ada(engine)
            asked = [asyncio.ensure_future(engine.submit_once(message(), KEY)) for _ in "ab"]
            end = await end_of(await asked[0])
            assert isinstance(end, Failed)
            assert isinstance(end.error, GeneratorFailed)
            with pytest.raises(GeneratorFailed):
                await asked[1]
            assert await said(await engine.submit_once(message(), KEY))

    run(test())


def test_one_that_was_refused_may_run_again(tmp_path: Path) -> None:
    async def test() -> None:
        async with engine_of(Opener(tmp_path)) as engine:
            for _ in range(2):
                with pytest.raises(UnknownAgent):
                    await engine.submit_once(message(), KEY)
            await with_ada(engine)
            assert await said(await engine.submit_once(message(), KEY))

    run(test())


def test_one_that_was_cut_off_by_a_stop_runs_again(tmp_path: Path) -> None:
    async def test() -> None:
        factory = GatedFactory()
        async with engine_of(Opener(tmp_path, factory=factory)) as engine:
            await with_ada(engine)
            stream = await engine.submit_once(message(max_tokens=80_000), KEY)
            await until(lambda: stream.has_started)
            factory.gate.close()
            stopping = asyncio.ensure_future(engine.stop(0.0))
            assert isinstance(await end_of(stream), Failed)
            factory.gate.open()
            assert await stopping
        async with engine_of(Opener(tmp_path)) as engine:
            end: Any = await end_of(await engine.submit_once(message(), KEY))
            assert end.usage.completion_tokens == 4

    run(test())
