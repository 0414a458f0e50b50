"""The thread that loads weights, while the engines' thread goes on answering."""

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")


class LoadThread:
    """Runs one call after the other, always on one thread, which does not delay the process's exit.

    Never a thread for each load: MLX and MKL keep streams and buffers for every thread that has
    computed, and resident memory grew by some 3 MB with each. `leave` is called on the thread when
    it ends.
    """

    def __init__(self, leave: Callable[[], None] = lambda: None) -> None:
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._leave = leave
        self._thread: threading.Thread | None = None

    async def run(self, call: Callable[[], T]) -> T:
        """Return or raise what the call does. When the caller is cancelled, the call runs on."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="keepwarm-load", daemon=True)
            self._thread.start()
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self._calls.put(partial(_answer, call, future, loop))
        return await future

    def stop(self, timeout_s: float) -> bool:
        """End the thread after the calls that it was given. Returns whether it has ended.

        It waits `timeout_s` seconds for that.
        """
        if self._thread is None:
            return True
        self._calls.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            call()
        self._leave()


def _answer(
    call: Callable[[], T], future: "asyncio.Future[T]", loop: asyncio.AbstractEventLoop
) -> None:
    try:
        result = call()
    except StopIteration as error:  # asyncio refuses it as a future's exception
        _post(loop, partial(_fail, future, RuntimeError(repr(error))))
    except Exception as error:  # noqa: BLE001 - it is raised where it was asked for
        _post(loop, partial(_fail, future, error))
    except BaseException as error:  # noqa: BLE001 - a library that wants the process to end
        _post(loop, partial(_fail, future, RuntimeError(repr(error))))
    else:
        _post(loop, partial(_succeed, future, result))


def _succeed(future: "asyncio.Future[T]", result: T) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: "asyncio.Future[T]", error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)


def _post(loop: asyncio.AbstractEventLoop, call: Callable[[], object]) -> None:
    with suppress(RuntimeError):  # the loop has been closed: nothing waits for the answer
        loop.call_soon_threadsafe(call)
