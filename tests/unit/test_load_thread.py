"""The thread that loads models: one for all calls, and ended in order."""

import asyncio
import threading
from collections.abc import Callable

from keepwarm.service.load_thread import LoadThread
from waiting import PATIENCE_S


def test_one_thread_runs_all_calls_and_leaves_last() -> None:
    threads: list[tuple[str, int]] = []

    def noting(what: str) -> Callable[[], None]:
        return lambda: threads.append((what, threading.get_ident()))

    async def two_calls() -> None:
        await thread.run(noting("first"))
        await thread.run(noting("second"))

    thread = LoadThread(leave=noting("left"))
    asyncio.run(two_calls())
    assert thread.stop(PATIENCE_S)
    assert [what for what, _ in threads] == ["first", "second", "left"]
    assert len({ident for _, ident in threads}) == 1
    assert threading.get_ident() not in {ident for _, ident in threads}


def test_one_that_never_ran_has_ended() -> None:
    assert LoadThread().stop(0.0)


def test_a_call_that_nothing_waits_for_is_not_cut_off() -> None:
    has_begun, may_end = threading.Event(), threading.Event()
    ends: list[str] = []

    def load() -> None:
        has_begun.set()
        may_end.wait(PATIENCE_S)
        ends.append("loaded")

    async def given_up() -> None:
        loading = asyncio.create_task(thread.run(load))
        await asyncio.to_thread(has_begun.wait, PATIENCE_S)
        loading.cancel()

    thread = LoadThread(leave=lambda: ends.append("left"))
    asyncio.run(given_up())
    assert not thread.stop(0.0)
    may_end.set()
    assert thread.stop(PATIENCE_S)
    assert ends == ["loaded", "left"]
