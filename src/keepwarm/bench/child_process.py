"""Python in a process of its own: told once, heard line by line, killed or waited for."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from subprocess import PIPE
from typing import IO, Self


class ChildProcess:
    """Runs this Python with `arguments`, such as `-m MODULE`, until the block ends or it does.

    The child imports from where this process does. It has ended when the block is left: it is
    killed there if it still runs.
    """

    def __init__(self, *arguments: str) -> None:
        path = os.pathsep.join(os.path.abspath(folder) for folder in sys.path)  # noqa: PTH100
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed when the block ends
        self._timers: list[threading.Timer] = []
        self._process = subprocess.Popen(
            [sys.executable, *arguments],
            env={**os.environ, "PYTHONPATH": path},
            stdin=PIPE,
            stdout=PIPE,
            stderr=self._errors,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        for timer in self._timers:
            timer.cancel()
        if self._process.poll() is None:
            self._process.kill()
        with self._process, self._errors:
            self._process.wait()

    @property
    def pid(self) -> int:
        return self._process.pid

    def tell(self, text: str = "") -> None:
        """Write to its standard input, and close that."""
        with _present(self._process.stdin) as pipe:
            pipe.write(text.encode())

    def read_line(self) -> str:
        """Return what it says next, without the line's end; empty when it says no more."""
        return next(self.lines(), "")

    def lines(self) -> Iterator[str]:
        """Yield what it says until it ends. A last line that was cut is left out."""
        for line in _present(self._process.stdout):
            if line.endswith(b"\n"):
                yield line.decode().removesuffix("\n")

    def send_signal(self, number: int) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def kill_after(self, seconds: float) -> None:
        """Kill it in `seconds`, unless it has ended by then."""
        timer = threading.Timer(seconds, self._process.kill)
        timer.daemon = True
        timer.start()
        self._timers.append(timer)

    def wait(self, timeout_s: float | None = None) -> int:
        """Return its exit code, negative for a signal. Raises subprocess.TimeoutExpired."""
        return self._process.wait(timeout_s)

    def complaints(self) -> str:
        """Return what it has written to its standard error."""
        # Read without seeking: the child, which may still write, shares the file's position.
        descriptor = self._errors.fileno()
        size = os.fstat(descriptor).st_size
        return os.pread(descriptor, size, 0).decode("utf-8", "replace").strip()


def _present(pipe: IO[bytes] | None) -> IO[bytes]:
    if pipe is None:
        raise RuntimeError("the child has no pipes")
    return pipe
