"""What the store's three ports share: its thread, its disk, and the books about it."""

from dataclasses import dataclass

from keepwarm.core.agent_store import Answers
from keepwarm.store.disk.disk_store import DiskStore
from keepwarm.store.disk.io_thread import IOThread
from keepwarm.store.disk_room import DiskRoom
from keepwarm.store.health import DiskHealth
from keepwarm.store.record_index import RecordIndex


@dataclass(frozen=True, slots=True)
class StoreParts:
    """The parts of one store. `disk` is for commands that `thread` runs, and for nothing else."""

    thread: IOThread
    disk: DiskStore
    index: RecordIndex
    room: DiskRoom
    health: DiskHealth
    answers: Answers
