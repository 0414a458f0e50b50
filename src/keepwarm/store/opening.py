"""Opening a store on the I/O thread: the catalogue belongs to the thread that opens it."""

from pathlib import Path

from keepwarm.core.errors import InvariantBroken, KeepwarmError
from keepwarm.store.catalog.opening import Opened
from keepwarm.store.disk.disk_store import DiskStore, Limits, OpenFailed, Outcome
from keepwarm.store.disk.io_thread import IOThread, Priority


def open_disk(thread: IOThread[Outcome], path: Path, limits: Limits) -> tuple[DiskStore, Opened]:
    """Raises what `DiskStore` raises; the thread has ended then."""
    opening: list[DiskStore] = []

    def open_it() -> Outcome:
        try:
            opening.append(DiskStore(path, limits, thread.run_commits))
            return opening[0].opened()
        except (KeepwarmError, OSError) as error:
            return OpenFailed(error)

    thread.post(Priority.COMMIT, open_it)
    while not (outcomes := thread.take()):
        thread.wait(1.0)
        if thread.failure is not None:
            raise thread.failure
    (outcome,) = outcomes
    if isinstance(outcome, Opened):
        return opening[0], outcome
    thread.stop(None)
    if isinstance(outcome, OpenFailed):
        raise outcome.error
    raise InvariantBroken(f"the store was opened with {outcome}")
