"""The engines' thread: runs commands, steps, and passes events on."""

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from keepwarm.core.errors import EngineBroke, EngineStopped
from keepwarm.fleet.fleet import Fleet
from keepwarm.service.mailbox import Call, Command, Mailbox
from keepwarm.service.recipients import Recipients

T = TypeVar("T")

OpenFleet = Callable[[], tuple[Fleet, Callable[[], None]]]
"""Loads what has to be loaded, and returns the fleet with what closes it."""

CHORE_WAIT_S = 0.02
"""The pause between two looks at the store while it writes KV and no command comes."""
IDLE_WAIT_S = 0.5
"""The pause between two looks at the store when there is nothing to do at all."""
MAX_REBUILDS = 3
"""How often within `REBUILD_WINDOW_S` a broken fleet is opened anew before the thread ends."""
REBUILD_WINDOW_S = 600.0

_log = logging.getLogger(__name__)


class EngineThread:
    """Owns the fleet and its recipients: only this thread touches them, so neither has a lock.

    `open_fleet` runs on the thread. What a command raises goes to its caller. A model that raises
    does not break the fleet; a bug in a step does: then what ran is failed with EngineBroke, and
    the fleet is opened again from what is on disk. When the thread ends, what ran is failed with
    EngineStopped, and `leave` is called on the thread.
    """

    def __init__(
        self,
        open_fleet: OpenFleet,
        recipients: Recipients,
        leave: Callable[[], None] = lambda: None,
    ) -> None:
        self.recipients = recipients
        self._open_fleet = open_fleet
        self._leave = leave
        self._mailbox = Mailbox()
        self._stopping = threading.Event()
        self._ended = threading.Event()
        self._has_saved = False
        self.troubles: tuple[str, ...] = ()
        """What was wrong after the last step. This thread replaces it, any thread reads it."""
        self._opened: Future[None] = Future()
        self._broken_at: list[float] = []
        self._thread = threading.Thread(target=self._run, name="keepwarm-engine", daemon=True)

    def __repr__(self) -> str:
        return f"EngineThread({'ended' if self.has_ended else 'running'})"

    @property
    def has_ended(self) -> bool:
        """Whether commands are refused, because the thread was stopped or broke for good."""
        return self._ended.is_set()

    def start(self) -> "Future[None]":
        """Open the fleet on the thread. The future is done when it is open, or has its error."""
        self._thread.start()
        return self._opened

    def ask(self, call: Call[T]) -> "Future[T]":
        """Call it on the thread between two steps, after what was asked before. From any thread.

        The future has what it returns or raises.
        """
        command = Command(call)
        self._mailbox.put(command)
        # The thread may have emptied the mailbox for the last time just before the `put`.
        if self.has_ended:
            self._refuse_commands()
        return command.answer

    async def call(self, call: Call[T]) -> T:
        """Call it on the thread between two steps. From the event loop."""
        return await asyncio.wrap_future(self.ask(call))

    def stop(self, timeout_s: float) -> bool:
        """End the thread, which saves all KV and closes the store. Returns whether all was saved.

        It waits `timeout_s` seconds for that.
        """
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
            self.recipients.lose(EngineStopped())
            self._leave()

    def _serve(self) -> bool:
        """Open the fleet and run it. Returns whether it broke and is to be opened again."""
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
            self.recipients.lose(EngineBroke(error))
            return self._may_rebuild()
        finally:
            _close_quietly(close)
        return False

    def _run_until_stopped(self, fleet: Fleet) -> None:
        while not self._stopping.is_set():
            self._turn(fleet)
        # Commands from before the end, like cutting off a reply, change what is saved.
        self._run_commands(fleet, wait_s=0.0)
        self._has_saved = fleet.close()
        fleet.release()

    def _turn(self, fleet: Fleet) -> None:
        self._run_commands(fleet, wait_s=_wait_s(fleet))
        events = fleet.step()
        self.troubles = fleet.troubles
        if events:
            self.recipients.deliver(events)

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
    """Close what is left of a fleet; where that fails, opening the next one says why."""
    try:
        close()
    except Exception:  # noqa: BLE001 - the loop goes on, or ends in order
        _log.exception("the engine's store or model did not close")


def _wait_s(fleet: Fleet) -> float:
    if fleet.has_work:
        return 0.0
    return CHORE_WAIT_S if fleet.has_chores else IDLE_WAIT_S
