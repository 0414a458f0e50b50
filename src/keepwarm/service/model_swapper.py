"""Brings models into memory and out of it, one at a time, as requests and people ask for them."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Protocol

from keepwarm.core.errors import (
    EngineStopped,
    ModelNotLoaded,
    ModelTooLarge,
    ModelUnavailable,
    NoRoomForModel,
    QueueFull,
    QueueTimeout,
)
from keepwarm.core.ports import LoadedModel
from keepwarm.fleet.fleet import Fleet
from keepwarm.service.load_thread import LoadThread
from keepwarm.service.model_registry import (
    AWAY,
    Model,
    ModelFacts,
    ModelRegistry,
    ModelState,
    choose_to_unload,
)

RETRY_S = 30.0
"""How many seconds pass before a request makes the server try again to load a model that failed."""
AFTER_ERROR_S = 1.0
"""The pause after an error that is no model's fault."""
UNLOAD_TIMEOUT_S = 60.0
"""How long writing an unloaded model's KV to disk may take."""
STOP_S = 2.0
"""How long a load that is going on may delay the end."""

_log = logging.getLogger(__name__)


class ModelSource(Protocol):
    """Where weights come from: `wiring` has the real one, `testing` a fake.

    `measure` and `load` run on a `LoadThread`.
    """

    def measure(self, model: Model) -> int:
        """Estimate the bytes that the model will need. Raises ModelLoadError."""
        ...

    def load(self, model: Model) -> LoadedModel:
        """Load the model. Raises ModelLoadError."""
        ...

    def memory_bytes(self) -> int:
        """Return the device's memory, for weights and KV."""
        ...

    def leave_thread(self) -> None:
        """Drop what computing has left in this thread, which ends now."""
        ...


@dataclass(slots=True)
class _Want:
    """What waits for a model since `since_s`: requests, and people who asked for it.

    `is_owed`: it made room for a model that then could not be loaded, and comes back first.
    """

    since_s: float
    requests: list["asyncio.Future[None]"] = field(default_factory=list)
    people: list["asyncio.Future[None]"] = field(default_factory=list)
    is_owed: bool = False

    @property
    def futures(self) -> Iterator["asyncio.Future[None]"]:
        """All that still wait."""
        return (future for future in (*self.requests, *self.people) if not future.done())


class ModelSwapper:
    """Owns the states of models and what waits for them. Belongs to the event loop's thread.

    The model that was wanted first is loaded next. Where memory is short, others make room: they
    finish their requests, for at most `patience_s` seconds, and are suspended. Requests that are
    left want the model back, and wait for it like all others. Where a load fails, the models that
    made room for it come back first. `ask` runs a command on the engines' thread.
    """

    def __init__(
        self,
        registry: ModelRegistry,
        source: ModelSource,
        ask: Callable[[Callable[[Fleet], object]], Awaitable[object]],
        *,
        limit_bytes: int,
        patience_s: float = 30.0,
        may_load: bool = True,
        max_waiting: int = 1024,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.registry = registry
        self._source = source
        self._ask = ask
        self._limit_bytes = limit_bytes
        self._patience_s = patience_s
        self._may_load = may_load
        self._max_waiting = max_waiting
        self._clock = clock
        self._wanted: dict[str, _Want] = {}
        self._changed = asyncio.Event()
        self._in_turn = asyncio.Lock()
        self._worker: asyncio.Task[None] | None = None
        self._thread = LoadThread(source.leave_thread)
        self._is_stopped = False

    def __repr__(self) -> str:
        return f"ModelSwapper({self.registry!r}, {list(self._wanted)} wanted)"

    @property
    def num_waiting(self) -> int:
        """How many requests wait for a model."""
        requests = (future for want in self._wanted.values() for future in want.requests)
        return sum(not future.done() for future in requests)

    def start(self) -> None:
        """Begin to bring models in and out, in a task of the running loop."""
        self._worker = asyncio.create_task(self._work())

    async def stop(self) -> None:
        """Stop bringing models in and out, and refuse what waits with EngineStopped.

        A load that is still going on after `STOP_S` seconds runs on.
        """
        if self._worker is not None:
            self._worker.cancel()
            with suppress(asyncio.CancelledError):
                await self._worker
        self._is_stopped = True
        for name in list(self._wanted):
            self._refuse(name, EngineStopped())
        await asyncio.to_thread(self._thread.stop, STOP_S)

    # -- requests --------------------------------------------------------------------------------

    async def enter(self, name: str, timeout_s: float | None) -> None:
        """Wait until the model is ready. It stays until `leave`, or until its patience has ended.

        Raises UnknownModel, ModelUnavailable, ModelTooLarge, QueueFull and QueueTimeout.
        """
        model = self.registry.resolve(name)
        model.last_used_s = self._clock()
        if model.state is ModelState.READY:
            model.num_requests += 1
            return
        self._check_may_wait(model)
        future = asyncio.get_running_loop().create_future()
        self._want(name).requests.append(future)
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.shield(future)
        except BaseException as error:
            if future.done() and not future.cancelled() and future.exception() is None:
                self.leave(name)
            future.cancel()
            if isinstance(error, TimeoutError) and timeout_s is not None:
                raise QueueTimeout(waited_s=timeout_s) from None
            raise

    def is_ready(self, name: str) -> bool:
        """Whether a request need not wait for the model. Raises UnknownModel."""
        return self.registry.resolve(name).state is ModelState.READY

    def can_be_had(self, model: Model) -> bool:
        """Whether a request may name the model now: it is in memory, or may be loaded."""
        return model.state not in AWAY or (self._may_load and model.state is not ModelState.FAILED)

    def leave(self, name: str) -> None:
        """End one request's use of the model."""
        model = self.registry.get(name)
        model.num_requests -= 1
        model.last_used_s = self._clock()
        if not model.num_requests or model.state is not ModelState.READY:
            self._changed.set()

    def _check_may_wait(self, model: Model) -> None:
        since_s = self._clock() - model.failed_s
        if model.state is ModelState.FAILED and since_s < RETRY_S and model.problem is not None:
            raise ModelUnavailable(model.name, model.problem, retry_s=RETRY_S - since_s)
        if model.state in AWAY and not self._may_load and model.name not in self._wanted:
            raise ModelNotLoaded(model.name)
        if self.num_waiting >= self._max_waiting:
            raise QueueFull(num_waiting=self.num_waiting)

    # -- people ----------------------------------------------------------------------------------

    async def load(self, name: str) -> None:
        """Wait until the model is ready. Raises ModelUnavailable and ModelTooLarge."""
        model = self.registry.get(name)
        if model.state is ModelState.READY:
            return
        future = asyncio.get_running_loop().create_future()
        self._want(name).people.append(future)
        await future

    async def unload(self, name: str) -> None:
        """Take the model out of memory when its requests have ended, or its patience has.

        Requests that it has not answered by then bring it back.
        """
        model = self.registry.get(name)
        async with self._in_turn:
            if model.state is ModelState.READY:
                await self._put_out(model)
        self._changed.set()

    # -- one after the other ---------------------------------------------------------------------

    async def _work(self) -> None:
        """Go on with the other models, whatever goes wrong with one."""
        while True:
            try:
                await self._work_once()
            except Exception:  # noqa: BLE001 - the top of the task
                _log.exception("a model could not be brought in or out")
                await asyncio.sleep(AFTER_ERROR_S)

    async def _work_once(self) -> None:
        self._changed.clear()
        name = self._next_wanted()
        if name is not None:
            async with self._in_turn:
                await self._bring(name)
        elif (idle := self._idle()) is not None:
            await self.unload(idle.name)
        else:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._next_look_s()):
                    await self._changed.wait()

    def _next_wanted(self) -> str | None:
        for name, want in list(self._wanted.items()):
            is_wanted = want.is_owed or any(want.futures)
            if not is_wanted and not self.registry.get(name).num_requests:
                del self._wanted[name]  # all that waited for it have gone
        self.registry.forget_strangers(self._wanted, self._clock() - RETRY_S)
        return min(self._wanted, key=lambda name: self._wanted[name].since_s, default=None)

    async def _bring(self, name: str) -> None:
        """Load the model, after unloading others where it needs their memory."""
        model = self.registry.get(name)
        if model.state is ModelState.READY:
            self._grant(model)
            return
        self._move(model, ModelState.LOADING)
        put_out: list[Model] = []
        try:
            needed_bytes = await self._thread.run(lambda: self._source.measure(model))
            for other in self._who_makes_room(model, needed_bytes):
                put_out.append(other)
                await self._put_out(other)
            loaded = _as_set(await self._thread.run(lambda: self._source.load(model)), model)
            await self._attach(loaded)
        except Exception as error:  # noqa: BLE001 - weights and libraries raise what they like
            await self._fail(model, error, put_out)
            return
        model.facts = ModelFacts(
            loaded.fingerprint, loaded.max_context_tokens, needed_bytes, loaded.computed_by
        )
        model.num_loads += 1
        model.problem = None
        model.last_used_s = self._clock()
        self._move(model, ModelState.READY)
        self._grant(model)

    def _who_makes_room(self, model: Model, needed_bytes: int) -> Sequence[Model]:
        """Choose the models to unload; the default model is loaded even where it exceeds the limit.

        Raises ModelTooLarge and NoRoomForModel.
        """
        others = [other for other in self.registry if other.state is ModelState.READY]
        try:
            return choose_to_unload(model, needed_bytes, self._limit_bytes, others)
        except ModelTooLarge as error:
            if model is not self.registry.default or isinstance(error, NoRoomForModel):
                raise
            _log.warning("%s; it is loaded all the same, because it is the default", error)
            return [other for other in others if not other.settings.pinned]

    async def _attach(self, loaded: LoadedModel) -> None:
        try:
            await self._ask(lambda fleet: fleet.attach(loaded))
        except BaseException:
            loaded.close()
            raise

    def _grant(self, model: Model) -> None:
        """Let everything that waited for the model go on.

        Requests count as its own before they run again, so that it is not unloaded first.
        """
        want = self._wanted.pop(model.name, None)
        for future in want.requests if want else ():
            if not future.done():
                model.num_requests += 1
                future.set_result(None)
        for future in want.people if want else ():
            if not future.done():
                future.set_result(None)

    async def _fail(self, model: Model, error: Exception, put_out: list[Model]) -> None:
        """Tell what waits that the model could not be loaded; what made room comes back first."""
        _log.warning("the model %s could not be loaded: %s", model.name, error)
        for other in put_out:
            if other.state is ModelState.KNOWN:
                want = self._want(other.name)
                want.since_s, want.is_owed = float("-inf"), True
        is_short = isinstance(error, ModelTooLarge)
        model.problem = None if is_short else error
        model.failed_s = self._clock()
        self._move(model, ModelState.KNOWN if is_short else ModelState.FAILED)
        shown = error if is_short else ModelUnavailable(model.name, error, retry_s=RETRY_S)
        if model.num_requests:
            await self._ask(lambda fleet: fleet.abandon(model.name, shown))
        self._refuse(model.name, shown)

    def _refuse(self, name: str, error: Exception) -> None:
        want = self._wanted.pop(name, None)
        for future in want.futures if want else ():
            future.set_exception(error)

    async def _put_out(self, model: Model) -> None:
        """Wait for the model's requests, within its patience, then suspend it."""
        self._move(model, ModelState.DRAINING)
        until_s = self._clock() + self._patience_s
        while model.num_requests and (left_s := until_s - self._clock()) > 0:
            self._changed.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await self._changed.wait()
        self._move(model, ModelState.UNLOADING)
        try:
            if not await self._ask(lambda fleet: fleet.detach(model.name, UNLOAD_TIMEOUT_S)):
                _log.warning("the disk did not take all KV of %s; it stays in memory", model.name)
        finally:
            is_there = await self._ask(lambda fleet: fleet.is_attached(model.name))
            self._move(model, ModelState.READY if is_there else ModelState.KNOWN)
        if model.num_requests:
            self._want(model.name)

    def _move(self, model: Model, state: ModelState) -> None:
        _log.info("model %s: %s", model.name, state)
        model.move(state)

    # -- inside ----------------------------------------------------------------------------------

    def _want(self, name: str) -> _Want:
        if self._is_stopped:
            raise EngineStopped
        self._changed.set()
        return self._wanted.setdefault(name, _Want(self._clock()))

    def _idle(self) -> Model | None:
        """Find a model that has been unused for as long as its settings allow."""
        return next((model for model in self.registry if self._idle_in_s(model) <= 0.0), None)

    def _next_look_s(self) -> float | None:
        times = [self._idle_in_s(model) for model in self.registry]
        soonest = min(times, default=float("inf"))
        return None if soonest == float("inf") else soonest

    def _idle_in_s(self, model: Model) -> float:
        limit_s = model.settings.idle_unload_s
        if not limit_s or model.state is not ModelState.READY or model.num_requests:
            return float("inf")
        return model.last_used_s + limit_s - self._clock()


def _as_set(loaded: LoadedModel, model: Model) -> LoadedModel:
    """Give the loaded model the name and the context that its settings have."""
    limit = model.settings.context_tokens or loaded.max_context_tokens
    return replace(
        loaded, name=model.name, max_context_tokens=min(limit, loaded.max_context_tokens)
    )
