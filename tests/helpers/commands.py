"""The `keepwarm` command, run in this process as a shell runs it, or in its own terminal."""

import contextlib
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

from keepwarm.cli import main
from waiting import PATIENCE_S

MAX_PATTERN = 200
"""The longest text, in characters, that a pattern may match: older text is searched once."""

_IN_TERMINAL = """
import fcntl, signal, termios
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run with `&`
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # Ctrl-C is now a signal to this process
from keepwarm.cli.main import main
main()
"""


@dataclass(frozen=True, slots=True)
class Done:
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def keepwarm(
    *arguments: str, url: str = "", stdin: bytes = b"", key: str = "", columns: int = 240
) -> Done:
    """Run a command; `url` and `key` reach it as environment variables."""
    variables = {"KEEPWARM_URL": url, "KEEPWARM_API_KEY": key, "COLUMNS": str(columns)}
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", newline="") for _ in range(2))
    with (
        mock.patch.dict(os.environ, variables),
        mock.patch.object(sys, "argv", ["keepwarm", *arguments]),
        # It would end the tests' own process, where the threads of a test's server run on.
        mock.patch.object(main, "_leave", sys.exit),
        mock.patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), "utf-8")),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main.main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    return Done(code, _text(out), _text(err))


def _text(stream: io.TextIOWrapper) -> str:
    stream.seek(0)
    return stream.read()


@dataclass(slots=True)
class Terminal:
    """A process with a terminal: what it has shown so far, and a keyboard."""

    process: "subprocess.Popen[bytes]"
    keyboard: int
    shown: str = ""

    def type(self, text: str) -> None:
        os.write(self.keyboard, text.encode())

    def interrupt(self) -> None:
        self.type("\x03")

    def wait_for(self, pattern: str) -> str:
        """Wait until the pattern is shown; return and forget all that was shown up to its end."""
        until = time.monotonic() + PATIENCE_S
        searched = 0
        while not (found := re.compile(pattern).search(self.shown, searched)):
            searched = max(len(self.shown) - MAX_PATTERN, 0)
            left_s = until - time.monotonic()
            if left_s < 0 or not self._read(left_s):
                raise AssertionError(f"{pattern!r} was not shown, but {self.shown!r}")
        before, self.shown = self.shown[: found.end()], self.shown[found.end() :]
        return before

    def end(self) -> int:
        """Read until the process ends; return its exit code."""
        while self._read(PATIENCE_S):
            pass
        return self.process.wait(PATIENCE_S)

    def _read(self, timeout_s: float) -> bool:
        if not select.select([self.keyboard], [], [], timeout_s)[0]:
            return False
        try:
            data = os.read(self.keyboard, 1 << 16)
        except OSError:  # Linux says so when the other side has closed
            return False
        self.shown += data.decode("utf-8", "replace")
        return bool(data)


@contextlib.contextmanager
def terminal(*arguments: str, url: str) -> Iterator[Terminal]:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "KEEPWARM_URL": url, "TERM": "dumb", "COLUMNS": "200"}
    process = subprocess.Popen(
        [sys.executable, "-c", _IN_TERMINAL, *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment,
        start_new_session=True,
    )
    os.close(theirs)
    try:
        yield Terminal(process, ours)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait(PATIENCE_S)
        os.close(ours)
