"""The engine's thread: takes commands, steps, and passes events on."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

from keepwarm.core.errors import EngineBroke, EngineStopped
from keepwarm.core.events import Event
from keepwarm.fleet.fleet import Fleet
from keepwarm.service.mailbox import Call, Command, Mailbox

T = TypeVar("T")

CHORE_WAIT_S = 0.02
"""Between two looks at the store while it takes KV and nobody asks for anything."""
IDLE_WAIT_S = 0.5
"""Between two looks at the store when there is nothing to do at all."""
MAX_REBUILDS = 3
"""So many times within `REBUILD_WINDOW_S` a broken engine is built anew; then the loop ends."""
REBUILD_WINDOW_S = 600.0

_log = logging.getLogger(__name__)


class EngineThread:
    """Owns the engine: only this thread touches it, so nothing in it has a lock.

    `open_fleet` runs on the thread, loads what has to be loaded there, and returns the engine
    with what closes it. `deliver` gets each step's events on the thread. `lost` is called with
    EngineBroke when all that ran in the engine is gone (what it had on disk is not), and with
    EngineStopped when the loop ends. A model that raises does not break the engine; a bug in the
    engine's step does. What a command raises is only for whoever asked.
    """

    def __init__(
        self,
        open_fleet: Callable[[], tuple[Fleet, Callable[[], None]]],
        *,
        deliver: Callable[[Sequence[Event]], None],
        lost: Callable[[Exception], None],
    ) -> None:
        self._open_fleet = open_fleet
        self._deliver = deliver
        self._lost = lost
        self._mailbox = Mailbox()
        self._stopping = threading.Event()
        self._ended = threading.Event()
        self._has_saved = False
        self.troubles: tuple[str, ...] = ()
        """What was wrong after the last step: replaced by the thread, read by any."""
        self._opened: Future[None] = Future()
        self._broken_at: list[float] = []
        self._thread = threading.Thread(target=self._run, name="keepwarm-engine", daemon=True)

    def __repr__(self) -> str:
        return f"EngineThread({'ended' if self.has_ended else 'running'})"

    @property
    def has_ended(self) -> bool:
        """Whether nothing is answered any more, because it was stopped or broke for good."""
        return self._ended.is_set()

    def start(self) -> "Future[None]":
        """The future is done when the engine is open; it has what opening raised."""
        self._thread.start()
        return self._opened

    def ask(self, call: Call[T]) -> "Future[T]":
        """Call it between two steps; the future has what it returns or raises."""
        command = Command(call)
        self._mailbox.put(command)
        if self.has_ended:
            self._refuse_commands()
        return command.answer

    def stop(self, timeout_s: float) -> bool:
        """End the loop: KV is saved and the store closed. Returns whether all was, in time."""
        self._stopping.set()
        self._mailbox.put(Command(lambda fleet: None))
        self._thread.join(timeout_s)
        return not self._thread.is_alive() and self._has_saved

    # -- on the thread ---------------------------------------------------------------------------

    def _run(self) -> None:
        self._opened.set_running_or_notify_cancel()
        try:
            while self._serve():
                pass
        finally:
            self._ended.set()
            self._refuse_commands()
            self._lost(EngineStopped())

    def _serve(self) -> bool:
        """Open the engine and run it. Returns whether it broke and is to be opened again."""
        try:
            fleet, close = self._open_fleet()
        except Exception as error:  # noqa: BLE001 - it is raised where the server is started
            self._fail_to_open(error)
            return False
        if not self._opened.done():
            self._opened.set_result(None)
        try:
            self._run_until_stopped(fleet)
        except Exception as error:  # noqa: BLE001 - a bug must not leave a deaf server behind
            _log.exception("the engine broke; its agents are read from the disk again")
            self._lost(EngineBroke(error))
            return self._may_rebuild()
        finally:
            _close_quietly(close)
        return False

    def _run_until_stopped(self, fleet: Fleet) -> None:
        while not self._stopping.is_set():
            self._turn(fleet)
        # What was asked for before the end, like cutting off a reply, is done before saving.
        self._run_commands(fleet, wait_s=0.0)
        self._has_saved = fleet.close()
        fleet.release()

    def _turn(self, fleet: Fleet) -> None:
        self._run_commands(fleet, wait_s=_wait_s(fleet))
        events = fleet.step()
        self.troubles = fleet.troubles
        if events:
            self._deliver(events)

    def _run_commands(self, fleet: Fleet, *, wait_s: float) -> None:
        for command in self._mailbox.drain(wait_s=wait_s):
            command.run(fleet)

    def _fail_to_open(self, error: Exception) -> None:
        if self._opened.done():
            _log.error("the engine could not be opened again: %s", error)
        else:
            self._opened.set_exception(error)

    def _may_rebuild(self) -> bool:
        now = time.monotonic()
        self._broken_at = [at for at in self._broken_at if now - at < REBUILD_WINDOW_S]
        self._broken_at.append(now)
        return len(self._broken_at) <= MAX_REBUILDS and not self._stopping.is_set()

    def _refuse_commands(self) -> None:
        for command in self._mailbox.drain(wait_s=0.0):
            command.refuse(EngineStopped())


def _close_quietly(close: Callable[[], None]) -> None:
    """What is left of a broken engine may not close; the next one says what stands in its way."""
    try:
        close()
    except Exception:  # noqa: BLE001 - the loop goes on, or ends in order
        _log.exception("the engine's store or model did not close")


def _wait_s(fleet: Fleet) -> float:
    if fleet.has_work:
        return 0.0
    return CHORE_WAIT_S if fleet.has_chores else IDLE_WAIT_S
