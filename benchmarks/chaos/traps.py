"""Where chaos kills: a trap in one chosen place of the engine or the store.

Functions are wrapped only in the process to be killed, which says where it was hit and sends itself
SIGKILL. The moment of `RANDOM` is chosen by the process outside.
"""

import os
import random
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from keepwarm.core.ports import BatchGenerator, LoadedModel, RowInput
from keepwarm.engine.batch_engine import BlockPoolBatchEngine
from keepwarm.kv.demotion import Demotion
from keepwarm.kv.promotion import Promotion
from keepwarm.store.catalog import schema
from keepwarm.store.catalog.catalog import Catalog
from keepwarm.store.disk import files as record_files
from keepwarm.store.disk.disk_store import DiskStore
from keepwarm.store.disk.files import RecordFiles
from keepwarm.store.disk.home_lock import HomeLock

Tell = Callable[[dict[str, Any]], None]


class Phase(StrEnum):
    """What the process is doing when it is killed."""

    QUEUED = "queued"
    PREFILL = "prefill"
    DECODE = "decode"
    WRITE = "middle of a file"
    BEFORE_RENAME = "file written, not renamed"
    AFTER_RENAME = "renamed, not in the catalogue"
    TRANSACTION = "rows changed, not committed"
    COMMIT = "inside a commit"
    COMMITTED = "committed, not acknowledged"
    READ = "middle of a read"
    RESTORE = "half of an agent restored"
    DEMOTION = "demotion"
    REMOVAL = "out of the catalogue, not unlinked"
    DELETE = "agent deleted, not scrubbed"
    SCRUB = "inside the scrub"
    START = "start-up"
    RECONCILE = "reconciling"
    RANDOM = "any moment"


class Trap:
    """Kills this process at the n-th visit of its phase."""

    def __init__(self, phase: Phase, visit: int, seed: int, tell: Tell) -> None:
        self.phase = phase
        self.random = random.Random(seed)  # noqa: S311 - a seeded campaign, not a secret
        self._num_left = visit
        self._tell = tell

    def visit(self, _result: object = None) -> None:
        """Count this visit, and kill if it is the one."""
        if self.is_due():
            self.spring()

    def is_due(self) -> bool:
        """Count this visit. Whether it is the one."""
        self._num_left -= 1
        return self._num_left <= 0

    def spring(self) -> None:
        """Say where it hits, and die."""
        self._tell({"hit": self.phase.value})
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)  # the other threads get no further, and neither does this one


def set_trap(trap: Trap, loaded: LoadedModel) -> None:
    """Wrap the functions that the trap's phase is made of."""
    if trap.phase is not Phase.RANDOM:
        _SETTERS[trap.phase](trap, loaded)


def _replace(owner: Any, name: str, value: Callable[..., Any]) -> None:
    setattr(owner, name, value)


def _before(owner: Any, name: str, call: Callable[[], None]) -> None:
    original = getattr(owner, name)

    def wrapped(*args: Any, **more: Any) -> Any:
        call()
        return original(*args, **more)

    _replace(owner, name, wrapped)


def _after(owner: Any, name: str, call: Callable[[Any], None]) -> None:
    original = getattr(owner, name)

    def wrapped(*args: Any, **more: Any) -> Any:
        result = original(*args, **more)
        call(result)
        return result

    _replace(owner, name, wrapped)


def _in_queue(trap: Trap, _loaded: LoadedModel) -> None:
    _after(BlockPoolBatchEngine, "submit", trap.visit)


def _in_generator(trap: Trap, loaded: LoadedModel) -> None:
    """Kill at the beginning of a step with what the phase names, wherever the store's thread is."""
    generator: Any = type(loaded.batch_gen_factory(deterministic=True))
    original = generator.step

    def step(self: BatchGenerator, inputs: Sequence[RowInput]) -> list[list[int]]:
        if any(bool(item.draws) == (trap.phase is Phase.DECODE) for item in inputs):
            trap.visit()
        tokens: list[list[int]] = original(self, inputs)
        return tokens

    _replace(generator, "step", step)


def _in_write(trap: Trap, _loaded: LoadedModel) -> None:
    original = record_files._write_all

    def write_some(
        descriptor: int, parts: Sequence[bytes | memoryview], between: Callable[[], None]
    ) -> None:
        if trap.is_due():
            data = b"".join(bytes(part) for part in parts)
            os.write(descriptor, data[: trap.random.randrange(len(data) + 1)])
            trap.spring()
        original(descriptor, parts, between)

    _replace(record_files, "_write_all", write_some)


def _at_rename(trap: Trap, _loaded: LoadedModel) -> None:
    if trap.phase is Phase.BEFORE_RENAME:
        _before(record_files, "_move_into_place", trap.visit)
    else:
        _after(record_files, "_move_into_place", trap.visit)


def _in_read(trap: Trap, _loaded: LoadedModel) -> None:
    original = record_files._read_whole

    def read_some(descriptor: int, buffer: memoryview) -> memoryview:
        if trap.is_due():
            os.readv(descriptor, [buffer[: len(buffer) // 2]])
            trap.spring()
        return original(descriptor, buffer)

    _replace(record_files, "_read_whole", read_some)


def _in_restore(trap: Trap, _loaded: LoadedModel) -> None:
    _after(Promotion, "take_fetched", lambda num_tokens: trap.visit() if num_tokens else None)


def _in_demotion(trap: Trap, _loaded: LoadedModel) -> None:
    _after(Demotion, "_payloads_out_of", trap.visit)


def _in_removal(trap: Trap, _loaded: LoadedModel) -> None:
    _before(RecordFiles, "remove", trap.visit)


def _before_scrub(trap: Trap, _loaded: LoadedModel) -> None:
    _before(Catalog, "scrub", trap.visit)


def _after_commit(trap: Trap, _loaded: LoadedModel) -> None:
    _after(Catalog, "commit", trap.visit)


def _in_transaction(trap: Trap, _loaded: LoadedModel) -> None:
    """Kill when all rows are changed and COMMIT is about to be executed."""
    inside = _Inside(trap)
    _around(Catalog, "commit", inside)
    _trace(lambda sql: trap.spring() if sql == "COMMIT" and inside.is_due() else None)


def _in_commit(trap: Trap, _loaded: LoadedModel) -> None:
    """Kill while SQLite writes and syncs its log, which releases the interpreter to the killer."""
    inside = _Inside(trap)
    _around(Catalog, "commit", inside)
    _trace(lambda sql: inside.let_die() if sql == "COMMIT" else None)


def _in_scrub(trap: Trap, _loaded: LoadedModel) -> None:
    inside = _Inside(trap)
    _around(Catalog, "scrub", inside)
    _trace(lambda sql: inside.let_die() if sql == "VACUUM" else None)


class _Inside:
    """Knows whether a wrapped function is running, and kills from a thread while it is."""

    def __init__(self, trap: Trap) -> None:
        self._trap = trap
        self._is_running = False
        self._is_due = False
        self._began_s = 0.0
        self._last_s = 2e-3
        self._go = threading.Event()
        threading.Thread(target=self._kill, daemon=True).start()

    def __enter__(self) -> None:
        self._is_due = self._trap.is_due()
        self._is_running = True

    def __exit__(self, *_error: object) -> None:
        self._is_running = False
        self._last_s = time.perf_counter() - self._began_s

    def is_due(self) -> bool:
        return self._is_running and self._is_due

    def let_die(self) -> None:
        """Kill somewhere within the next call, which takes about as long as the last one did."""
        self._began_s = time.perf_counter()
        if self.is_due():
            self._go.set()

    def _kill(self) -> None:
        while self._go.wait():
            self._go.clear()
            time.sleep(self._last_s * self._trap.random.random() ** 2)
            if self.is_due():
                self._trap.spring()


def _around(owner: Any, name: str, inside: _Inside) -> None:
    original = getattr(owner, name)

    def wrapped(*args: Any, **more: Any) -> Any:
        with inside:
            return original(*args, **more)

    _replace(owner, name, wrapped)


def _trace(on_statement: Callable[[str], None]) -> None:
    """Call `on_statement` with every statement of the catalogue's writer before it is executed."""

    def listen(db: sqlite3.Connection) -> None:
        db.set_trace_callback(on_statement)

    _after(schema, "open_for_writing", listen)


def _at_start(trap: Trap, _loaded: LoadedModel) -> None:
    """Kill in one of five places, in the order in which a start passes them."""
    _after(HomeLock, "__init__", trap.visit)
    _after(schema, "open_for_writing", trap.visit)
    _after(RecordFiles, "clear_tmp", trap.visit)
    _after(Catalog, "load_records", trap.visit)
    _after(Catalog, "load_usage", trap.visit)


def _in_reconciling(trap: Trap, _loaded: LoadedModel) -> None:
    original = RecordFiles.scan

    def scan(files: RecordFiles) -> Iterator[record_files.StoredFile]:
        for stored in original(files):
            trap.visit()
            yield stored

    _replace(RecordFiles, "scan", scan)
    _after(DiskStore, "_adopt", trap.visit)


_SETTERS: dict[Phase, Callable[[Trap, LoadedModel], None]] = {
    Phase.QUEUED: _in_queue,
    Phase.PREFILL: _in_generator,
    Phase.DECODE: _in_generator,
    Phase.WRITE: _in_write,
    Phase.BEFORE_RENAME: _at_rename,
    Phase.AFTER_RENAME: _at_rename,
    Phase.TRANSACTION: _in_transaction,
    Phase.COMMIT: _in_commit,
    Phase.COMMITTED: _after_commit,
    Phase.READ: _in_read,
    Phase.RESTORE: _in_restore,
    Phase.DEMOTION: _in_demotion,
    Phase.REMOVAL: _in_removal,
    Phase.DELETE: _before_scrub,
    Phase.SCRUB: _in_scrub,
    Phase.START: _at_start,
    Phase.RECONCILE: _in_reconciling,
}


@dataclass(frozen=True, slots=True)
class Visits:
    """At which visit of a phase the trap springs, at the latest: on the fake and on a model."""

    fake: int
    model: int


VISITS: dict[Phase, Visits] = {
    Phase.QUEUED: Visits(25, 4),
    Phase.PREFILL: Visits(80, 8),
    Phase.DECODE: Visits(300, 30),
    Phase.WRITE: Visits(60, 6),
    Phase.BEFORE_RENAME: Visits(60, 6),
    Phase.AFTER_RENAME: Visits(60, 6),
    Phase.TRANSACTION: Visits(20, 3),
    Phase.COMMIT: Visits(20, 3),
    Phase.COMMITTED: Visits(20, 3),
    Phase.READ: Visits(25, 3),
    Phase.RESTORE: Visits(15, 2),
    Phase.DEMOTION: Visits(15, 2),
    Phase.REMOVAL: Visits(15, 1),
    Phase.DELETE: Visits(3, 1),
    Phase.SCRUB: Visits(2, 1),
    Phase.START: Visits(5, 5),
    Phase.RECONCILE: Visits(12, 3),
    Phase.RANDOM: Visits(1, 1),
}


def num_unfinished_frames(log: Path) -> int:
    """Return how many pages of a transaction that never ended SQLite's log holds."""
    data = log.read_bytes() if log.exists() else b""
    if len(data) < 32:
        return 0
    salts = data[16:24]
    page_bytes = int.from_bytes(data[8:12], "big")
    num_unfinished = 0
    for start in range(32, len(data) - 23, 24 + page_bytes):
        if data[start + 8 : start + 16] != salts:
            break
        is_commit = data[start + 4 : start + 8] != bytes(4)
        num_unfinished = 0 if is_commit else num_unfinished + 1
    return num_unfinished
