"""The way of a request into an engine: its agent's turn, its model, its prompt."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from keepwarm.core.errors import DeadlineExceeded, EngineStopped, QueueTimeout
from keepwarm.core.events import Completed, Failed
from keepwarm.engine.requests import GenerateRequest
from keepwarm.engine.turn.intake import Reading
from keepwarm.fleet.fleet import Fleet
from keepwarm.service.agent_queue import AgentQueue
from keepwarm.service.engine_thread import EngineThread
from keepwarm.service.event_stream import EventStream
from keepwarm.service.long_prompts import LongPrompts
from keepwarm.service.model_use import ModelUse


class Submissions:
    """Owns the requests that run, from the event loop's side. Belongs to its thread.

    `on_end` is called with the last event of every request. `max_waiting` requests may wait for
    their agents' turns.
    """

    def __init__(
        self,
        thread: EngineThread,
        models: ModelUse,
        prompts: LongPrompts,
        *,
        on_end: Callable[[Completed | Failed], None],
        max_waiting: int,
    ) -> None:
        self._thread = thread
        self._models = models
        self._prompts = prompts
        self._on_end = on_end
        self._queue = AgentQueue(max_waiting)
        self._running: set[EventStream] = set()
        self._is_closed = False

    def __repr__(self) -> str:
        return f"Submissions({self.num_running} running, {self._queue!r})"

    @property
    def num_running(self) -> int:
        """How many requests were submitted and have not ended."""
        return len(self._running)

    @property
    def is_idle(self) -> bool:
        """Whether no request runs, and none waits for its agent's turn."""
        return not self._running and self._queue.is_empty

    @property
    def num_waiting(self) -> int:
        """How many requests wait for their agents' turns."""
        return self._queue.num_waiting

    @property
    def is_closed(self) -> bool:
        """Whether new requests are refused."""
        return self._is_closed

    def close(self) -> None:
        """Refuse new requests with EngineStopped."""
        self._is_closed = True

    async def wait_for_ends(self, timeout_s: float) -> None:
        """Wait until what runs has ended, or the time is over."""
        ends = [stream.end for stream in self._running]
        if ends:
            await asyncio.wait(ends, timeout=timeout_s)

    def fail_all(self, error: Exception) -> None:
        """End all requests with this error; their agents keep what was said."""
        for stream in tuple(self._running):
            stream.fail(error)

    async def submit(self, request: GenerateRequest) -> EventStream:
        """Submit the request; the stream is the caller's, who must end it with `hang_up`.

        What is appended to an agent waits until what was appended to it before has ended. When the
        caller is cancelled meanwhile, so is the request. Raises what `BlockPoolBatchEngine.submit`
        raises, QueueTimeout and EngineStopped.
        """
        arrived_s = asyncio.get_running_loop().time()
        if request.append is None or request.agent_id is None:
            return await self._submit(request, arrived_s)
        if self._queue.is_taken(request.agent_id):
            await self._wait_for_turn(request.agent_id, request)
        else:
            await self._queue.enter(request.agent_id, request.queue_timeout_s)
        try:
            stream = await self._submit(request, arrived_s)
        except BaseException:
            self._queue.leave(request.agent_id)
            raise
        stream.end.add_done_callback(partial(self._leave, request.agent_id))
        return stream

    async def check_length(self, request: GenerateRequest) -> None:
        """Refuse a prompt that is too long as things stand, before the request has to wait.

        Raises what `submit` raises about the prompt.
        """

        def check(fleet: Fleet, reading: Reading) -> None:
            fleet.check_length(request, reading)

        await self._prompts.call(check, request, asyncio.get_running_loop().time())

    async def _wait_for_turn(self, agent_id: str, request: GenerateRequest) -> None:
        """Wait in the agent's queue, and meanwhile check that the prompt is not too long."""
        entering = asyncio.create_task(self._queue.enter(agent_id, request.queue_timeout_s))
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
            checking.add_done_callback(_has_succeeded)  # the submission will raise it again

    async def _submit(self, request: GenerateRequest, arrived_s: float) -> EventStream:
        if self._is_closed:
            raise EngineStopped
        name = request.model or await self._models.model_of(request.agent_id)
        request = replace(request, model=name)
        await self._enter_model(request)
        try:
            stream = await self._submit_to_engine(request, arrived_s)
        except BaseException:
            self._models.leave(name)
            raise
        self._running.add(stream)
        stream.end.add_done_callback(partial(self._ended, stream, name))
        stream.limit(since_s=arrived_s, queue_s=request.queue_timeout_s, total_s=request.deadline_s)
        return stream

    async def _enter_model(self, request: GenerateRequest) -> None:
        """Wait for the request's model, for as long as the request may wait."""
        if not self._models.is_ready(request.model):
            await self.check_length(request)
        deadline_s, queue_s = request.deadline_s, request.queue_timeout_s
        if deadline_s is None or (queue_s is not None and queue_s <= deadline_s):
            await self._models.enter(request.model, queue_s)
            return
        try:
            await self._models.enter(request.model, deadline_s)
        except QueueTimeout:
            raise DeadlineExceeded(deadline_s=deadline_s) from None

    async def _submit_to_engine(self, request: GenerateRequest, arrived_s: float) -> EventStream:
        stream = EventStream(self._cancel)
        submit = partial(self._thread.recipients.submit, request, stream)
        try:
            await self._prompts.call(submit, request, arrived_s)
        except asyncio.CancelledError:
            self._cancel(stream)
            raise
        return stream

    def _cancel(self, stream: EventStream) -> None:
        # The mailbox keeps the order: where a command submits this stream, it has run by then.
        self._thread.ask(partial(self._thread.recipients.cancel, stream))

    def _leave(self, agent_id: str, _: object) -> None:
        self._queue.leave(agent_id)

    def _leave_if_entered(self, agent_id: str, entering: "asyncio.Task[None]") -> None:
        if _has_succeeded(entering):
            self._queue.leave(agent_id)

    def _ended(
        self, stream: EventStream, model: str, end: "asyncio.Future[Completed | Failed]"
    ) -> None:
        self._models.leave(model)
        self._running.discard(stream)
        self._on_end(end.result())


def _has_succeeded(task: "asyncio.Task[None]") -> bool:
    """Whether the task returned; its error counts as seen, so that asyncio does not report it."""
    return not task.cancelled() and task.exception() is None
