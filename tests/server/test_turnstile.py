"""One message at a time for each agent, in order."""

import asyncio

import pytest

from doors import cancel, run
from keepwarm.core.errors import QueueFull, QueueTimeout
from keepwarm.service.agent_queue import AgentQueue


def check_is_empty(turnstile: AgentQueue) -> None:
    assert not turnstile._locks
    assert not turnstile._num_inside_or_waiting
    assert turnstile.num_waiting == 0


def test_they_pass_in_the_order_in_which_they_came() -> None:
    async def test() -> None:
        turnstile, passed = AgentQueue(100), list[int]()

        async def pass_through(number: int) -> None:
            await turnstile.enter("ada", None)
            passed.append(number)
            await asyncio.sleep(0)
            turnstile.leave("ada")

        await asyncio.gather(*(pass_through(number) for number in range(20)))
        assert passed == list(range(20))
        check_is_empty(turnstile)

    run(test())


def test_agents_do_not_wait_for_each_other() -> None:
    async def test() -> None:
        turnstile = AgentQueue(0)
        await turnstile.enter("ada", None)
        await turnstile.enter("eve", None)
        turnstile.leave("ada")
        turnstile.leave("eve")
        check_is_empty(turnstile)

    run(test())


def test_waiting_ends_with_the_time() -> None:
    async def test() -> None:
        turnstile = AgentQueue(10)
        await turnstile.enter("ada", None)
        with pytest.raises(QueueTimeout, match=r"0\.01"):
            await turnstile.enter("ada", 0.01)
        turnstile.leave("ada")
        check_is_empty(turnstile)
        await turnstile.enter("ada", 0.01)
        turnstile.leave("ada")
        check_is_empty(turnstile)

    run(test())


def test_no_more_than_so_many_wait() -> None:
    async def test() -> None:
        turnstile = AgentQueue(1)
        await turnstile.enter("ada", None)
        waiting = asyncio.ensure_future(turnstile.enter("ada", None))
        await asyncio.sleep(0)
        with pytest.raises(QueueFull):
            await turnstile.enter("ada", None)
        turnstile.leave("ada")
        await waiting
        turnstile.leave("ada")
        check_is_empty(turnstile)

    run(test())


@pytest.mark.parametrize("position", range(4))
def test_a_cancelled_request_makes_way(position: int) -> None:
    """Also the one whose turn has just come."""

    async def test() -> None:
        turnstile = AgentQueue(10)
        await turnstile.enter("ada", None)
        waiting = [asyncio.ensure_future(turnstile.enter("ada", None)) for _ in range(4)]
        await asyncio.sleep(0)
        turnstile.leave("ada")  # the first is woken and has not run
        await cancel(waiting.pop(position))
        for task in waiting:
            await task
            turnstile.leave("ada")
        check_is_empty(turnstile)

    run(test())
