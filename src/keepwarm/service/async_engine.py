"""The async door to the engines: what servers call, on their event loop."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from functools import partial
from typing import TypeVar

from keepwarm.core.errors import EngineStopped
from keepwarm.core.events import Completed, Failed
from keepwarm.engine.agents.agent_view import AgentView
from keepwarm.engine.agents.commits import Commit
from keepwarm.engine.batch_engine import BlockPoolBatchEngine
from keepwarm.engine.requests import GenerateRequest, PromptSource, ReceiptKey
from keepwarm.fleet.fleet import Fleet
from keepwarm.kv.verifier import VerifyReport
from keepwarm.service.engine_thread import EngineThread, OpenFleet
from keepwarm.service.event_stream import EventStream
from keepwarm.service.long_prompts import LongPrompts
from keepwarm.service.mailbox import Call
from keepwarm.service.model_swapper import ModelSwapper
from keepwarm.service.model_use import ModelUse
from keepwarm.service.receipts import Receipts
from keepwarm.service.recipients import Begin, Recipients
from keepwarm.service.submission import Submissions

T = TypeVar("T")

NUM_COUNTED = 50
"""For how many agents one command counts what the disk holds: that takes some milliseconds."""
ABORT_S = 10.0
"""How long the thread may take to end when the start was cancelled."""
SAVE_S = 120.0
"""How long saving every agent's KV may take at a shutdown."""


class AsyncEngine:
    """Requests in, streams of events out. Belongs to the event loop that it is made on.

    It owns nothing of an engine: calls become commands to `EngineThread`, whose `Recipients` bring
    back events and answers. `on_end` is called with every request's last event, `leave_thread` on
    the engines' thread when it ends. `max_waiting` requests may wait for their agents' turns,
    beside those that wait in the engines.
    """

    def __init__(
        self,
        open_fleet: OpenFleet,
        *,
        on_end: Callable[[Completed | Failed], None] = lambda event: None,
        leave_thread: Callable[[], None] = lambda: None,
        max_waiting: int = 1024,
    ) -> None:
        recipients = Recipients(asyncio.get_running_loop())
        self._thread = EngineThread(open_fleet, recipients, leave_thread)
        self._models = ModelUse(self._thread)
        self._prompts = LongPrompts(self._thread, max_waiting=max_waiting)
        self._submissions = Submissions(
            self._thread, self._models, self._prompts, on_end=on_end, max_waiting=max_waiting
        )
        self._receipts = Receipts(self._thread, self._submissions.submit)
        self._has_started = False
        self.has_stopped_well = False
        """Whether everything was saved when it stopped."""

    def __repr__(self) -> str:
        return f"AsyncEngine({self._submissions!r}, {self._thread!r})"

    @property
    def models(self) -> ModelSwapper | None:
        """Brings models in and out of memory; None: the fleet has those that it was opened with."""
        return self._models.swapper

    @property
    def is_serving(self) -> bool:
        """Whether requests are taken."""
        return self._has_started and not self._submissions.is_closed and not self.has_ended

    @property
    def has_ended(self) -> bool:
        """Whether its thread has ended, because it was stopped or because it broke for good."""
        return self._thread.has_ended

    @property
    def troubles(self) -> tuple[str, ...]:
        """What is wrong while it serves, like a disk that refuses; for people."""
        return self._thread.troubles

    @property
    def num_requests(self) -> int:
        """How many requests run."""
        return self._submissions.num_running

    @property
    def num_waiting(self) -> int:
        """How many requests wait for their agents' turns."""
        return self._submissions.num_waiting

    @property
    def num_streams(self) -> int:
        """How many requests run in the engines, where they begin and end a moment later."""
        return self._thread.recipients.num_streams

    @property
    def num_answers(self) -> int:
        """How many changes, exports, imports and verifications go on in the engines."""
        return self._thread.recipients.num_answers

    @property
    def is_idle(self) -> bool:
        """Whether nothing is kept for any request: stream, turn, key or answer."""
        is_busy = self.num_streams or self.num_answers or len(self._receipts)
        return self._submissions.is_idle and not is_busy

    async def start(self) -> None:
        """Open the engines on their thread. Raises what opening raises."""
        self._has_started = True
        try:
            await asyncio.wrap_future(self._thread.start())
        except BaseException:
            await asyncio.to_thread(self._thread.stop, ABORT_S)
            raise

    def start_models(self, models: ModelSwapper) -> None:
        """Bring models in and out of memory from now on, as requests want them."""
        self._models.swapper = models
        models.start()

    async def stop(self, grace_s: float) -> bool:
        """Refuse new requests, let those that run end, and save every agent.

        What has not ended after `grace_s` seconds is cut off; its agent keeps what was said.
        Returns whether everything was saved in time.
        """
        self._submissions.close()
        if self.has_ended:
            await self._stop_models()
            return False
        await self._submissions.wait_for_ends(grace_s)
        await self._stop_models()
        self._submissions.fail_all(EngineStopped())
        self.has_stopped_well = await asyncio.to_thread(self._thread.stop, SAVE_S)
        return self.has_stopped_well

    async def _stop_models(self) -> None:
        if self.models is not None:
            await self.models.stop()

    # -- requests --------------------------------------------------------------------------------

    @asynccontextmanager
    async def generate(
        self, request: GenerateRequest, key: ReceiptKey | None = None
    ) -> AsyncIterator[EventStream]:
        """Submit the request; leaving the block ends it, however the block is left.

        The task that enters the block owns the stream: wherever that task is cancelled, the request
        has not been submitted, or ends. With a `key` the request belongs to the engine and runs on;
        see `submit_once`. Raises what `submit` raises, and KeyReused.
        """
        if key is not None:
            yield await self.submit_once(request, key)
            return
        stream = await self.submit(request)
        try:
            yield stream
        finally:
            stream.hang_up()

    async def submit(self, request: GenerateRequest) -> EventStream:
        """See `Submissions.submit`. The caller must end the stream, as `generate` does."""
        return await self._submissions.submit(request)

    async def submit_once(self, request: GenerateRequest, key: ReceiptKey) -> EventStream:
        """See `Receipts.submit`: sent twice under one key, the request runs once."""
        return await self._receipts.submit(request, key)

    async def check_length(self, request: GenerateRequest) -> None:
        """See `Submissions.check_length`."""
        await self._submissions.check_length(request)

    async def count_tokens(self, model: str, source: PromptSource) -> int:
        """Count the tokens of such a prompt. Raises InvalidRequest."""
        reader = await self.call_on(model, lambda engine: engine.intake.reader)
        return await self._prompts.read(partial(reader.num_tokens, source))

    async def model_of(self, agent_id: str | None) -> str:
        """Name the model that answers the agent; empty where there is no choice."""
        return await self._models.model_of(agent_id)

    # -- everything else -------------------------------------------------------------------------

    async def call(self, call: Call[T]) -> T:
        """Call it on the engines' thread between two steps."""
        return await self._thread.call(call)

    async def call_at(self, agent_id: str, call: Callable[[BlockPoolBatchEngine], T]) -> T:
        """Call it on the engine that the agent is at, whose model need not be in memory."""
        return await self.call(lambda fleet: call(fleet.of(agent_id)))

    async def call_computing(self, agent_id: str, call: Callable[[BlockPoolBatchEngine], T]) -> T:
        """Call it on the agent's engine with its model in memory.

        Raises what `submit` raises about the model.
        """
        name = await self.model_of(agent_id)
        async with self._models.using(name):
            return await self.call(lambda fleet: call(fleet.bring(agent_id, name)))

    async def call_on(self, model: str, call: Callable[[BlockPoolBatchEngine], T]) -> T:
        """Call it on this model's engine; the model is loaded if it never was."""

        def look(fleet: Fleet) -> T | None:
            return call(fleet.engine(model)) if fleet.has_engine(model) else None

        found = await self.call(look)
        if found is not None:
            return found
        async with self._models.using(model):
            return await self.call(lambda fleet: call(fleet.engine(model)))

    async def change(self, change: Call[tuple[Commit, T]]) -> tuple[bool, T]:
        """Make a change on the engines' thread, and wait for the disk's answer.

        Returns whether the change is durable, and what else the call returned. The change goes on
        when the caller is cancelled.
        """
        answer: Future[tuple[bool, T]] = Future()
        answer.set_running_or_notify_cancel()  # from here on it cannot be cancelled

        def begin(fleet: Fleet, answer: "Future[tuple[bool, T]]") -> None:
            commit, result = change(fleet)

            def pass_on(durable: bool) -> None:
                if not answer.done():  # failed before, when the engines broke
                    answer.set_result((durable, result))

            commit.then(pass_on)

        return await self._answered(begin, answer)

    async def work(self, begin: Begin[T]) -> T:
        """Begin what goes on between the engines' steps, and wait for its answer.

        When the caller is cancelled, so is the work.
        """
        return await self._answered(begin, Future())

    async def verify(self, agent_id: str) -> VerifyReport:
        """Compare what the agent keeps with a cold run, beside the requests.

        Cancelling it ends it. Raises UnknownAgent, AgentBusy, VerifyInterrupted, GeneratorFailed
        and PoolExhausted, and what `submit` raises about the model.
        """

        def begin(fleet: Fleet, answer: "Future[VerifyReport]") -> None:
            fleet.bring(agent_id, name).begin_verify(agent_id, answer)

        name = await self.model_of(agent_id)
        async with self._models.using(name):
            return await self.work(begin)

    async def agents(
        self, wanted: Callable[[Sequence[AgentView]], Sequence[AgentView]]
    ) -> list[AgentView]:
        """Return those of all agents that `wanted` chooses, with what the disk holds of them.

        That is counted for a few agents in one command, with steps in between.
        """
        views = wanted(await self.call(lambda fleet: fleet.agents()))
        counted: list[AgentView] = []
        for start in range(0, len(views), NUM_COUNTED):
            some = views[start : start + NUM_COUNTED]
            counted += await self.call(partial(Fleet.counted, views=some))
        return counted

    async def _answered(self, begin: Begin[T], answer: "Future[T]") -> T:
        try:
            await self.call(partial(self._thread.recipients.begin, begin, answer))
            return await asyncio.wrap_future(answer)
        finally:
            answer.cancel()  # whether it has begun, or never will
