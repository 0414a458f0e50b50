"""A client that hangs up at the very moment in which its request is submitted."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from doors import Opener, check_is_empty, engine_of, message, run, text, until
from keepwarm.engine.requests import GenerateRequest
from keepwarm.server.dialects.agents.encode import AgentEncoder
from keepwarm.server.reply.choices import Choices
from keepwarm.server.reply.reply import StreamedReply, WholeReply
from keepwarm.service.async_engine import AsyncEngine

LONG = 50_000
TURNS = range(-6, 7)
"""How many turns of the loop later the client goes; before it, where negative."""

Call = Callable[..., Any]


class HeldAnswers:
    """The engine's thread has done what it was asked, and its answers do not arrive yet."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._arrive = asyncio.Event()
        call = engine._thread.call

        async def held(function: Call) -> Any:
            answer = await call(function)
            await self._arrive.wait()
            return answer

        engine._thread.call = held  # type: ignore[method-assign, assignment]

    def arrive(self) -> None:
        self._arrive.set()


async def _hang_up_around(
    engine: AsyncEngine, requests: Sequence[GenerateRequest], turns: int, *, stream: bool
) -> None:
    held, gone = HeldAnswers(engine), asyncio.Event()
    choices, encoder = Choices(engine, requests), AgentEncoder("ada")
    reply = (
        StreamedReply(choices, encoder, {}, heartbeat_s=10.0)
        if stream
        else WholeReply(choices, encoder, {})
    )

    async def receive() -> dict[str, Any]:
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(_: Any) -> None:
        await asyncio.sleep(0)

    answering = asyncio.ensure_future(reply({"type": "http"}, receive, send))
    await until(lambda: engine.num_streams)
    first, second = (held.arrive, gone.set) if turns >= 0 else (gone.set, held.arrive)
    first()
    for _ in range(abs(turns)):
        await asyncio.sleep(0)
    second()
    await answering


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("turns", TURNS)
@pytest.mark.parametrize("kind", ["anonymous", "agent", "choices"])
def test_nothing_runs_on(kind: str, turns: int, stream: bool) -> None:
    requests = {
        "anonymous": [text(max_tokens=LONG)],
        "agent": [message(max_tokens=LONG)],
        "choices": [text(max_tokens=LONG)] * 3,
    }

    async def test() -> None:
        async with engine_of(Opener()) as engine:
            await engine.call_at("ada", lambda e: e.create("ada"))
            call = engine._thread.call
            for _ in range(4):
                await _hang_up_around(engine, requests[kind], turns, stream=stream)
                engine._thread.call = call  # type: ignore[method-assign]
                async with asyncio.timeout(30.0):
                    await until(lambda: engine.is_idle)
                await engine.call_at("ada", check_is_empty)

    run(test())


def test_leaving_the_block_ends_the_request() -> None:
    async def test() -> None:
        async with engine_of(Opener()) as engine:
            with pytest.raises(LookupError):
                async with engine.generate(text(max_tokens=LONG)):
                    raise LookupError
            await until(lambda: not engine.num_requests)
            await engine.call_at("ada", check_is_empty)

    run(test())
