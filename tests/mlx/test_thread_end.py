"""Nothing of Python's is left to MLX when a thread that has computed ends.

MLX would free it as the system ends the thread, which may be after `Thread.join`, and the process
aborts where the interpreter is being finalised by then.
"""

import asyncio
import gc
import threading
import weakref
from pathlib import Path

import mlx.core as mx

from keepwarm.config import load_settings
from keepwarm.core.ports import LoadedModel
from keepwarm.mlx_backend.memory import leave_thread
from keepwarm.service.model_registry import Model
from keepwarm.wiring import MLXSource, start_server
from tiny_models import write_tiny_model


class _Key:
    """The key of a compiled function's output, which MLX keeps with what it compiled."""


class Traces:
    """Computes with a compiled function, and knows for which threads MLX keeps its output's key."""

    def __init__(self) -> None:
        self._keys: dict[str, weakref.ref[_Key]] = {}
        self._compiled = mx.compile(self._traced)

    def compute(self) -> None:
        """Compute on this thread."""
        mx.eval(self._compiled(mx.ones(4)))

    def are_kept(self) -> dict[str, bool]:
        """Return by thread's name whether MLX keeps something."""
        gc.collect()
        return {name: key() is not None for name, key in self._keys.items()}

    def _traced(self, array: mx.array) -> dict[_Key, mx.array]:
        key = _Key()
        self._keys[threading.current_thread().name] = weakref.ref(key)
        return {key: array + 1}


class TracedSource(MLXSource):
    """Loads models as the server does, and computes on the thread that loads."""

    def __init__(self, traces: Traces) -> None:
        self._traces = traces

    def load(self, model: Model) -> LoadedModel:
        self._traces.compute()
        return super().load(model)


def test_a_thread_that_leaves_keeps_nothing() -> None:
    traces = Traces()
    kept: list[dict[str, bool]] = []

    def work() -> None:
        traces.compute()
        kept.append(traces.are_kept())
        leave_thread()
        kept.append(traces.are_kept())

    thread = threading.Thread(target=work, name="worker")
    thread.start()
    thread.join()
    assert kept == [{"worker": True}, {"worker": False}]


def test_a_servers_threads_leave_at_its_end(tmp_path: Path) -> None:
    """The threads of the engines and of the loads, which are seen to end before `stop` returns."""
    traces = Traces()
    ends: list[tuple[str, dict[str, bool]]] = []

    class Watched(TracedSource):
        def leave_thread(self) -> None:
            super().leave_thread()
            ends.append((threading.current_thread().name, traces.are_kept()))

    async def serve() -> None:
        folder = write_tiny_model(tmp_path / "model")
        given = {"model.name": str(folder), "memory.budget_bytes": 64 << 20}
        settings = load_settings(given, environment={})
        running = await start_server(settings, tmp_path / "home", source=Watched(traces))
        await running.engine.call(lambda fleet: traces.compute())
        assert traces.are_kept() == {"keepwarm-load": True, "keepwarm-engine": True}
        assert await running.engine.stop(0.0)

    asyncio.run(serve())
    assert dict(ends) == {
        "keepwarm-load": {"keepwarm-load": False, "keepwarm-engine": True},
        "keepwarm-engine": {"keepwarm-load": False, "keepwarm-engine": False},
    }
    names = {thread.name for thread in threading.enumerate()}
    assert not names & {"keepwarm-load", "keepwarm-engine"}
