"""The async door to the engine's thread: what servers call, on their event loop."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from keepwarm.core.agent import Tier
from keepwarm.core.errors import (
    DeadlineExceeded,
    EngineStopped,
    KeyReused,
    QueueTimeout,
    UnknownModel,
)
from keepwarm.core.events import (
    CacheReport,
    Completed,
    Event,
    Failed,
    FinishReason,
    Timing,
    Usage,
)
from keepwarm.core.transcript import Turn
from keepwarm.engine.agents.book import AgentView
from keepwarm.engine.agents.store_inbox import Commit
from keepwarm.engine.batch_engine import BlockPoolBatchEngine
from keepwarm.engine.prompt.prompt_encoder import Guard
from keepwarm.engine.prompt.prompt_reader import Draft, ReadElsewhere
from keepwarm.engine.prompt.reader_threads import Readers
from keepwarm.engine.requests import GenerateRequest, PromptSource, ReceiptKey
from keepwarm.engine.turn.intake import Reading
from keepwarm.fleet.fleet import Fleet
from keepwarm.kv.verifier import VerifyReport
from keepwarm.service.agent_queue import AgentQueue
from keepwarm.service.engine_thread import EngineThread
from keepwarm.service.event_stream import EventStream, replayed
from keepwarm.service.mailbox import Call
from keepwarm.service.model_swapper import ModelSwapper

T = TypeVar("T")

OpenFleet = Callable[[], tuple[Fleet, Callable[[], None]]]
Beginning = asyncio.Task[EventStream]

NUM_COUNTED = 50
"""Of how many agents it is looked up at once what the disk holds: that takes some milliseconds."""
ABORT_S = 10.0
"""How long the thread may take to end when the start was called off."""
SAVE_S = 120.0
"""How long saving every agent's KV may take at a shutdown."""

_log = logging.getLogger(__name__)


class AsyncEngine:
    """Requests in, streams of events out. Belongs to the event loop's thread.

    `on_end` hears of every request's end. `max_waiting` may wait for their agents' turns, beside
    those that wait in the engine. `models` brings models in and out of memory; without it there are
    those that the fleet was opened with. The requests' streams, and the results of what goes on
    beside them, are known on the engine's thread only, which enters them in the same command that
    begins them.
    """

    def __init__(
        self,
        open_fleet: OpenFleet,
        *,
        on_end: Callable[[Completed | Failed], None] = lambda event: None,
        max_waiting: int = 1024,
    ) -> None:
        self._thread = EngineThread(open_fleet, deliver=self._deliver, lost=self._lose)
        self._on_end = on_end
        self._running: set[EventStream] = set()
        self._turnstile = AgentQueue(max_waiting)
        self._readers = Readers(max_waiting=max_waiting)
        self._once: dict[tuple[str | None, str], tuple[ReceiptKey, Beginning]] = {}
        self._is_stopping = False
        self.models: ModelSwapper | None = None
        self.has_stopped_well = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._streams: dict[str, EventStream] = {}
        self._changes: set[Future[bool]] = set()
        self._results: set[Future[VerifyReport]] = set()
        self._working: list[Future[Any]] = []

    def __repr__(self) -> str:
        return f"AsyncEngine({len(self._running)} requests, {self._thread!r})"

    @property
    def is_serving(self) -> bool:
        return self._loop is not None and not self._is_stopping and not self._thread.has_ended

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
        return len(self._running)

    async def start(self) -> None:
        """Open the engine on its thread. Raises what opening raises."""
        self._loop = asyncio.get_running_loop()
        try:
            await asyncio.wrap_future(self._thread.start())
        except BaseException:
            await asyncio.to_thread(self._thread.stop, ABORT_S)
            raise

    async def stop(self, grace_s: float) -> bool:
        """Refuse new requests, let those that run end, and save every agent.

        What has not ended after `grace_s` is cut off; its agent keeps what was said. Returns
        whether everything was saved in time.
        """
        self._is_stopping = True
        if self._thread.has_ended:
            return False
        await self._wait_for_ends(grace_s)
        if self.models is not None:
            await self.models.stop()
        for stream in tuple(self._running):
            stream.fail(EngineStopped())
        self.has_stopped_well = await asyncio.to_thread(self._thread.stop, SAVE_S)
        return self.has_stopped_well

    async def call(self, call: Call[T]) -> T:
        """Call it on the engine's thread between two steps."""
        return await asyncio.wrap_future(self._thread.ask(call))

    async def change(self, change: Call[tuple[Commit, T]]) -> tuple[bool, T]:
        """Make a change on the engine's thread, and wait for the disk's answer.

        Returns whether the change is durable, and what else the call returned. The change goes on
        when the caller is cancelled.
        """
        answer: Future[bool] = Future()
        answer.set_running_or_notify_cancel()

        def command(fleet: Fleet) -> T:
            commit, result = change(fleet)
            self._changes.add(answer)
            commit.then(partial(self._answer_change, answer))
            return result

        result = await self.call(command)
        return await asyncio.wrap_future(answer), result

    async def work(self, begin: Callable[[Fleet, "Future[T]"], None]) -> T:
        """Begin what goes on between the engines' steps, and wait for its answer.

        When the caller is cancelled, so is the work.
        """
        answer: Future[T] = Future()

        def command(fleet: Fleet) -> None:
            self._working = [other for other in self._working if not other.done()]
            self._working.append(answer)
            begin(fleet, answer)

        try:
            await self.call(command)
            return await asyncio.wrap_future(answer)
        finally:
            answer.cancel()

    async def call_at(self, agent_id: str, call: Callable[[BlockPoolBatchEngine], T]) -> T:
        """Call it on the engine that the agent is at, whose model need not be in memory."""
        return await self.call(lambda fleet: call(fleet.of(agent_id)))

    async def call_computing(self, agent_id: str, call: Callable[[BlockPoolBatchEngine], T]) -> T:
        """The same with the model in memory. Raises what `submit` raises about that."""
        name = await self._enter(await self._name_for(GenerateRequest(agent_id=agent_id)), None)
        try:
            return await self.call(lambda fleet: call(fleet.bring(agent_id, name)))
        finally:
            self._leave_model(name)

    async def agents(
        self, wanted: Callable[[Sequence[AgentView]], Sequence[AgentView]]
    ) -> list[AgentView]:
        """Those of all agents that are wanted, with what the disk holds of them.

        That is counted for a few at a time, with steps in between.
        """
        views = wanted(await self.call(lambda fleet: fleet.agents()))
        counted: list[AgentView] = []
        for start in range(0, len(views), NUM_COUNTED):
            some = views[start : start + NUM_COUNTED]
            counted += await self.call(partial(Fleet.counted, views=some))
        return counted

    async def verify(self, agent_id: str) -> VerifyReport:
        """Compare what the agent keeps with a cold run, beside the requests.

        Cancelling it ends it. Raises UnknownAgent, AgentBusy, VerifyInterrupted, GeneratorFailed
        and PoolExhausted, and what `submit` raises about the model.
        """

        result: Future[VerifyReport] = Future()

        def begin(fleet: Fleet) -> None:
            fleet.bring(agent_id, name).begin_verify(agent_id, result)
            self._results.add(result)
            result.add_done_callback(self._results.discard)

        name = await self._enter(await self._name_for(GenerateRequest(agent_id=agent_id)), None)
        try:
            await self.call(begin)
            return await asyncio.wrap_future(result)
        finally:
            result.cancel()  # whether it has begun, or never will
            self._leave_model(name)

    async def call_on(self, model: str, call: Callable[[BlockPoolBatchEngine], T]) -> T:
        """Call it on this model's engine; the model is loaded if it never was."""

        def look(fleet: Fleet) -> T | None:
            return call(fleet.engine(model)) if fleet.has_engine(model) else None

        found = await self.call(look)
        if found is not None:
            return found
        name = await self._enter(model, None)
        try:
            return await self.call(lambda fleet: call(fleet.engine(name)))
        finally:
            self._leave_model(name)

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
        """The stream is the caller's, who hangs up: a server uses `generate`, which does.

        What is appended to an agent waits until what was appended to it before has ended. When the
        caller is cancelled meanwhile, so is the request. Raises what `BlockPoolBatchEngine.submit`
        raises, QueueTimeout and EngineStopped.
        """
        arrived_s = asyncio.get_running_loop().time()
        if request.append is None or request.agent_id is None:
            return await self._submit(request, arrived_s)
        if self._turnstile.is_taken(request.agent_id):
            await self._wait_for_turn(request.agent_id, request)
        else:
            await self._turnstile.enter(request.agent_id, request.queue_timeout_s)
        try:
            stream = await self._submit(request, arrived_s)
        except BaseException:
            self._turnstile.leave(request.agent_id)
            raise
        stream.end.add_done_callback(partial(self._leave, request.agent_id))
        return stream

    async def _wait_for_turn(self, agent_id: str, request: GenerateRequest) -> None:
        """In line from the start; that it is not too long already is looked at meanwhile."""
        entering = asyncio.create_task(self._turnstile.enter(agent_id, request.queue_timeout_s))
        checking = asyncio.create_task(self.check_length(request))
        try:
            await asyncio.wait({entering, checking}, return_when=asyncio.FIRST_COMPLETED)
            if not entering.done():
                await checking
            await entering
        except BaseException:
            entering.cancel()
            entering.add_done_callback(partial(self._leave_if_entered, agent_id))
            raise
        finally:
            checking.cancel()
            checking.add_done_callback(_is_fine)  # the submission will find the same

    async def _submit(self, request: GenerateRequest, arrived_s: float) -> EventStream:
        if self._is_stopping:
            raise EngineStopped
        name = await self._enter_in_time(request)
        try:
            stream = await self._submit_to(replace(request, model=name), arrived_s)
        except BaseException:
            self._leave_model(name)
            raise
        self._running.add(stream)
        stream.end.add_done_callback(partial(self._ended, stream, name))
        stream.limit(since_s=arrived_s, queue_s=request.queue_timeout_s, total_s=request.deadline_s)
        return stream

    async def _submit_to(self, request: GenerateRequest, arrived_s: float) -> EventStream:
        stream = EventStream(self._cancel)

        def submit(fleet: Fleet, reading: Reading) -> None:
            request_id = fleet.submit(request, reading)
            stream.request_id = request_id
            self._streams[request_id] = stream

        try:
            await self._call_reading(submit, request, arrived_s)
        except asyncio.CancelledError:
            self._cancel(stream)
            raise
        return stream

    async def check_length(self, request: GenerateRequest) -> None:
        """Refuse a prompt that is too long as things stand, before the request has to wait.

        Raises what `submit` raises about the prompt.
        """

        def check(fleet: Fleet, reading: Reading) -> None:
            fleet.check_length(request, reading)

        await self._call_reading(check, request, asyncio.get_running_loop().time())

    async def count_tokens(self, model: str, source: PromptSource) -> int:
        """How many tokens such a prompt has. Raises InvalidRequest."""
        reader = await self.call_on(model, lambda engine: engine.intake.reader)
        return await self._read(partial(reader.num_tokens, source))

    async def _call_reading(
        self,
        call: Callable[[Fleet, Reading], None],
        request: GenerateRequest,
        arrived_s: float,
    ) -> None:
        """Call it on the engine's thread, which long prompts leave as soon as they are seen.

        They come again when they were read, and again where the lines have changed meanwhile.
        """
        draft: Draft | None = None
        while True:
            try:
                return await self.call(partial(_with_reading, call, Reading(draft)))
            except ReadElsewhere as elsewhere:
                draft = await self._read_in_time(elsewhere.work, request, arrived_s)

    async def _read(self, work: Callable[[Guard], T]) -> T:
        """Return or raise what the work does on a reader's thread; cancelled with its caller."""
        job = self._readers.begin(work)
        try:
            return await asyncio.wrap_future(job.answer)
        finally:
            job.cancel()

    async def _read_in_time(
        self, work: Callable[[Guard], Draft], request: GenerateRequest, arrived_s: float
    ) -> Draft:
        limit_s = request.queue_timeout_s
        try:
            async with asyncio.timeout_at(None if limit_s is None else arrived_s + limit_s):
                return await self._read(work)
        except TimeoutError:
            raise QueueTimeout(waited_s=limit_s or 0.0) from None

    async def _enter_in_time(self, request: GenerateRequest) -> str:
        name = await self._name_for(request)
        if self.models is not None and not self.models.is_ready(name):
            await self.check_length(replace(request, model=name))
        deadline_s, queue_s = request.deadline_s, request.queue_timeout_s
        if deadline_s is None or (queue_s is not None and queue_s <= deadline_s):
            return await self._enter(name, queue_s)
        try:
            return await self._enter(name, deadline_s)
        except QueueTimeout:
            raise DeadlineExceeded(deadline_s=deadline_s) from None

    async def model_of(self, agent_id: str | None) -> str:
        """The name of the model that answers the agent; empty where there is no choice."""
        return "" if self.models is None else await self._model_of(self.models, agent_id)

    async def _model_of(self, models: ModelSwapper, agent_id: str | None) -> str:
        """The one that the agent talked to last, if that can be had here."""
        registry = models.registry
        if registry.only_used:
            return registry.only_used
        name = await self.call(lambda fleet: fleet.model_of(agent_id))
        with suppress(UnknownModel):
            model = registry.resolve(name)
            if models.can_be_had(model):
                return model.name
        _log.warning("%s talked to %s, which cannot be had now", agent_id, name)
        return registry.default.name

    async def _name_for(self, request: GenerateRequest) -> str:
        """Of the model that will answer; empty where there is no choice."""
        return request.model or await self.model_of(request.agent_id)

    async def _enter(self, name: str, timeout_s: float | None) -> str:
        """The model is in memory, until `_leave_model`. Returns its name."""
        if self.models is not None:
            await self.models.enter(name, timeout_s)
        return name

    def _leave_model(self, name: str) -> None:
        if self.models is not None:
            self.models.leave(name)

    async def submit_once(self, request: GenerateRequest, key: ReceiptKey) -> EventStream:
        """The same for a request that may be sent twice, which runs once.

        It runs on when nobody reads any more. Whoever sends it again gets the same reply, when
        there is one, also from a turn of an earlier run of the server. Raises KeyReused.
        """
        name = (request.agent_id, key.key)
        if name in self._once:
            known, beginning = self._once[name]
            if known.digest != key.digest:
                raise KeyReused(key.key)
            running = await asyncio.shield(beginning)
            return _repeat(await asyncio.shield(running.end))
        beginning = asyncio.ensure_future(self._find_or_submit(request, key))
        self._once[name] = (key, beginning)
        beginning.add_done_callback(lambda _: self._forget_at_end(name, beginning))
        return await asyncio.shield(beginning)

    async def _find_or_submit(self, request: GenerateRequest, key: ReceiptKey) -> EventStream:
        agent_id = request.agent_id
        if agent_id is not None:
            found = await self.call_at(agent_id, lambda engine: _receipt(engine, agent_id, key))
            if found is not None:
                turn, durable = found
                return _answer_of(turn, key, durable=durable)
        return await self.submit(replace(request, receipt_key=key))

    def _forget_at_end(self, name: tuple[str | None, str], begun: Beginning) -> None:
        """The key is free again when its request has ended, or was refused."""
        if begun.cancelled() or begun.exception() is not None:
            self._once.pop(name, None)
        else:
            begun.result().end.add_done_callback(lambda _: self._once.pop(name, None))

    # -- inside ----------------------------------------------------------------------------------

    def _leave(self, agent_id: str, _: object) -> None:
        self._turnstile.leave(agent_id)

    def _leave_if_entered(self, agent_id: str, entering: "asyncio.Task[None]") -> None:
        if _is_fine(entering):
            self._turnstile.leave(agent_id)

    def _ended(
        self, stream: EventStream, model: str, end: "asyncio.Future[Completed | Failed]"
    ) -> None:
        self._leave_model(model)
        self._running.discard(stream)
        self._on_end(end.result())

    def _cancel(self, stream: EventStream) -> None:
        """Behind the command that submits it, so that its id is known by then, if ever."""

        def command(fleet: Fleet) -> None:
            # A fleet that was opened again counts its ids from the start.
            request_id = stream.request_id
            if request_id is not None and self._streams.get(request_id) is stream:
                fleet.cancel(request_id)

        self._thread.ask(command)

    async def _wait_for_ends(self, timeout_s: float) -> None:
        ends = [stream.end for stream in self._running]
        if ends:
            await asyncio.wait(ends, timeout=timeout_s)

    # -- on the engine's thread ------------------------------------------------------------------

    def _deliver(self, events: Sequence[Event]) -> None:
        pairs: list[tuple[EventStream, Event]] = []
        for event in events:
            is_end = isinstance(event, Completed | Failed)
            find = self._streams.pop if is_end else self._streams.get
            stream = find(event.request_id, None)
            if stream is not None:
                pairs.append((stream, event))
        self._post(pairs)

    def _lose(self, error: Exception) -> None:
        changes, self._changes = self._changes, set()
        for answer in changes:
            answer.set_exception(error)
        for result in tuple(self._results):
            if not result.done() and result.set_running_or_notify_cancel():
                result.set_exception(error)
        working, self._working = self._working, []
        for answer in working:
            if not answer.done() and answer.set_running_or_notify_cancel():
                answer.set_exception(error)
        streams, self._streams = self._streams, {}
        self._post([(s, Failed(i, None, error, "")) for i, s in streams.items()])

    def _answer_change(self, answer: "Future[bool]", durable: bool) -> None:
        self._changes.discard(answer)
        answer.set_result(durable)

    def _post(self, pairs: Sequence[tuple[EventStream, Event]]) -> None:
        if pairs and self._loop is not None:
            with suppress(RuntimeError):  # the loop has been closed, and nobody listens any more
                self._loop.call_soon_threadsafe(_put_all, pairs)


def _is_fine(task: "asyncio.Task[None]") -> bool:
    """Whether it ended as it should; what it raised has been seen."""
    return not task.cancelled() and task.exception() is None


def _with_reading(call: Callable[[Fleet, Reading], None], reading: Reading, fleet: Fleet) -> None:
    call(fleet, reading)


def _put_all(pairs: Sequence[tuple[EventStream, Event]]) -> None:
    for stream, event in pairs:
        stream.put(event)


def _repeat(end: Completed | Failed) -> EventStream:
    if isinstance(end, Failed):
        raise end.error
    return replayed(end.text, end)


def _receipt(
    engine: BlockPoolBatchEngine, agent_id: str, key: ReceiptKey
) -> tuple[Turn, bool] | None:
    """The turn that a request with this key ended with, and whether it is on the disk."""
    turn = engine.receipt(agent_id, key.key)
    return None if turn is None else (turn, engine.is_durable(agent_id))


def _answer_of(turn: Turn, key: ReceiptKey, *, durable: bool) -> EventStream:
    """The reply that the turn ended with, as it was reported then."""
    receipt = turn.receipt
    if receipt is None or receipt.digest != key.digest:
        raise KeyReused(key.key)
    text = str(turn.messages[-1]["content"]) if turn.messages else ""
    usage = Usage(receipt.prompt_tokens, receipt.cached_tokens, receipt.completion_tokens)
    cache = CacheReport(
        Tier.NONE, usage.cached_tokens, usage.prompt_tokens, usage.prompt_tokens, "repeated", 0.0
    )
    completed = Completed(
        request_id=key.key,
        agent_id=None,
        text=text,
        token_ids=(),
        finish_reason=FinishReason(receipt.finish_reason),
        usage=usage,
        cache=cache,
        timing=Timing(queued_s=0.0, first_token_s=0.0, total_s=0.0, num_preemptions=0),
        durable=durable,
    )
    return replayed(text, completed)
