"""One process for each home: a lock that the operating system gives back when the process ends."""

import fcntl
import os
from pathlib import Path

from keepwarm.core.errors import KeepwarmError


class HomeInUse(KeepwarmError):
    """Another process has this home open."""

    def __init__(self, path: Path, holder: str) -> None:
        super().__init__(
            f"{path} is in use by process {holder}; stop that one, or set KEEPWARM_HOME to another "
            "folder"
        )
        self.path = path
        self.holder = holder


class HomeUnusable(KeepwarmError):
    """The folder of a home can not be made, read or written."""

    def __init__(self, path: Path, cause: OSError) -> None:
        super().__init__(
            f"{path} cannot be used: {cause.strerror or cause}; mend that, or set KEEPWARM_HOME to "
            "another folder"
        )
        self.path = path
        self.cause = cause


class HomeLock:
    """Holds `folder/lock`, which names the holder's process id, until `release`."""

    def __init__(self, folder: Path) -> None:
        """Take the lock. Raises HomeInUse, with the process that has it."""
        self._descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._descriptor, 32, 0).decode("ascii", "replace").strip()
            os.close(self._descriptor)
            raise HomeInUse(folder, holder or "unknown") from None
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Give the home back; once is enough."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)
