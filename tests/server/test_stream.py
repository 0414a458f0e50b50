"""A request's events while nobody reads them, and its limits."""

import asyncio
import sys
import tracemalloc

import pytest

from doors import events_of, run
from keepwarm.core.agent import Tier
from keepwarm.core.errors import DeadlineExceeded, QueueTimeout
from keepwarm.core.events import (
    CacheReport,
    Completed,
    Delta,
    Event,
    Failed,
    FinishReason,
    Progress,
    Started,
    Timing,
    Usage,
)
from keepwarm.service.event_stream import EventStream, replayed

CACHE = CacheReport(Tier.NONE, 0, 3, 0, "new", 0.0)
STARTED = Started("r", None, CACHE)
COMPLETED = Completed(
    request_id="r",
    agent_id=None,
    text="abc",
    token_ids=(1, 2, 3),
    finish_reason=FinishReason.STOP,
    usage=Usage(3, 0, 3),
    cache=CACHE,
    timing=Timing(0.0, 0.0, 0.0, 0),
)


def delta(text: str, *token_ids: int) -> Delta:
    return Delta("r", None, text, token_ids)


def now() -> float:
    return asyncio.get_running_loop().time()


class Cancels:
    """Counts what a stream asks of the engine."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, stream: EventStream) -> None:
        self.count += 1


def test_what_is_not_read_is_joined() -> None:
    async def test() -> None:
        stream = EventStream(Cancels())
        for event in (
            STARTED,
            Progress("r", None, 1, 9),
            Progress("r", None, 2, 9),
            delta("a", 1),
            delta("b", 2, 300_000),
            delta("", 4),
            delta("c", 5),
            COMPLETED,
        ):
            stream.put(event)
        assert await events_of(stream) == [
            STARTED,
            Progress("r", None, 2, 9),
            delta("abc", 1, 2, 300_000, 4, 5),
            COMPLETED,
        ]

    run(test())


@pytest.mark.parametrize("read_every", [1, 2, 3, 7, 1000])
def test_nothing_is_lost_however_slowly_it_is_read(read_every: int) -> None:
    async def test() -> None:
        stream, events = EventStream(Cancels()), list[Event]()
        expected = [f"<{number}>" for number in range(3000)]
        for number, piece in enumerate(expected):
            stream.put(delta(piece, number))
            if number % read_every == 0:
                events.append(await anext(stream))
        stream.put(COMPLETED)
        events += await events_of(stream)
        *deltas, last = events
        assert last is COMPLETED
        assert all(isinstance(event, Delta) for event in deltas)
        assert "".join(event.text for event in deltas) == "".join(expected)  # type: ignore[union-attr]
        ids = [i for event in deltas for i in event.token_ids]  # type: ignore[union-attr]
        assert ids == list(range(3000))

    run(test())


def test_a_slow_reader_costs_as_much_memory_as_its_text() -> None:
    async def test() -> None:
        num_tokens, size = 50_000, len("token ")
        stream = EventStream(Cancels())
        stream.put(STARTED)
        tracemalloc.start()
        before, _ = tracemalloc.get_traced_memory()
        for number in range(num_tokens):
            stream.put(Delta("r", None, f"t{number % 10_000:04} ", (number,)))
        after, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        # The text twice, for the reader and for `Failed`, and eight bytes for each id.
        assert after - before < 1.5 * num_tokens * (2 * size + 8) + sys.getsizeof(stream) * 100
        assert len(stream._unread) == 2

    run(test())


def test_nothing_comes_after_the_end() -> None:
    async def test() -> None:
        stream = EventStream(Cancels())
        stream.put(COMPLETED)
        stream.put(delta("late"))
        stream.fail(ValueError("late"))
        stream.hang_up()
        assert await events_of(stream) == [COMPLETED]
        assert await events_of(stream) == []

    run(test())


def test_a_reader_that_waits_is_woken() -> None:
    async def test() -> None:
        stream = EventStream(Cancels())
        reading = asyncio.ensure_future(events_of(stream))
        await asyncio.sleep(0)
        stream.put(delta("a"))
        await asyncio.sleep(0)
        stream.put(COMPLETED)
        assert await reading == [delta("a"), COMPLETED]

    run(test())


def test_hanging_up_asks_the_engine_and_waits_for_its_word() -> None:
    async def test() -> None:
        cancels = Cancels()
        stream = EventStream(cancels)
        stream.hang_up()
        assert cancels.count == 1
        assert not stream.has_ended

    run(test())


class TestLimits:
    def test_the_queue_has_one(self) -> None:
        async def test() -> None:
            cancels = Cancels()
            stream = EventStream(cancels)
            stream.limit(since_s=now(), queue_s=0.01, total_s=None)
            (end,) = await events_of(stream)
            assert isinstance(end, Failed)
            assert isinstance(end.error, QueueTimeout)
            assert cancels.count == 1

        run(test())

    def test_it_does_not_count_what_has_started(self) -> None:
        async def test() -> None:
            stream = EventStream(Cancels())
            stream.limit(since_s=now(), queue_s=0.01, total_s=None)
            stream.put(STARTED)
            await asyncio.sleep(0.05)
            assert not stream.has_ended

        run(test())

    def test_the_whole_has_one_and_says_what_had_come(self) -> None:
        async def test() -> None:
            stream = EventStream(Cancels())
            stream.limit(since_s=now(), queue_s=0.01, total_s=0.03)
            stream.put(STARTED)
            stream.put(delta("a"))
            stream.put(delta("b"))
            end = await stream.end
            assert isinstance(end, Failed)
            assert isinstance(end.error, DeadlineExceeded)
            assert end.text == "ab"

        run(test())

    def test_what_was_waited_before_counts(self) -> None:
        async def test() -> None:
            stream = EventStream(Cancels())
            stream.limit(since_s=now() - 100.0, queue_s=100.0, total_s=None)
            assert isinstance(await stream.end, Failed)

        run(test())

    def test_an_end_leaves_no_timer(self) -> None:
        async def test() -> None:
            cancels = Cancels()
            stream = EventStream(cancels)
            stream.limit(since_s=now(), queue_s=0.01, total_s=0.01)
            stream.put(COMPLETED)
            stream.limit(since_s=now(), queue_s=0.0, total_s=0.0)
            await asyncio.sleep(0.03)
            assert cancels.count == 0

        run(test())


def test_a_reply_that_is_told_again_is_whole() -> None:
    async def test() -> None:
        events = await events_of(replayed("abc", COMPLETED))
        assert events == [STARTED, delta("abc", 1, 2, 3), COMPLETED]
        assert await events_of(replayed("", COMPLETED)) == [STARTED, COMPLETED]

    run(test())
