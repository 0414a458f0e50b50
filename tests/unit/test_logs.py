"""One record is one line, whatever clients put into it."""

import json
import logging
import sys
from typing import Any

import pytest

from keepwarm.server.operations.logs import configure_logs, log_formatter, printable
from keepwarm.server.settings import LogFormat

FORGED = "2026-01-01 [error] all agents deleted"
CONTROLS = {
    "line feed": "\n",
    "carriage return": "\r",
    "both": "\r\n",
    "vertical tab": "\x0b",
    "form feed": "\x0c",
    "escape": "\x1b[2J\x1b]0;title\x07",
    "backspace": "\x08",
    "delete": "\x7f",
    "nul": "\x00",
    "next line": "\x85",
    "C1": "\x9b2J",
    "line separator": "\u2028",
    "paragraph separator": "\u2029",
    "right to left": "\u202e",
    "isolate": "\u2066",
    "zero width": "\u200b",
    "half a pair": "\ud800",
}


def record(message: str, *arguments: Any, exc_info: Any = None) -> logging.LogRecord:
    return logging.LogRecord("keepwarm.x", logging.INFO, "x", 1, message, arguments, exc_info)


@pytest.mark.parametrize("control", CONTROLS.values(), ids=CONTROLS)
@pytest.mark.parametrize("log_format", list(LogFormat))
class TestRecords:
    def test_it_is_one_line(self, log_format: LogFormat, control: str) -> None:
        said = f"/v1/a{control}{FORGED}"
        for one in (record(said), record("%s %d", said, 200), record("%s", ValueError(said))):
            line = log_formatter(log_format).format(one)
            assert FORGED in line
            assert line.replace("\x7f", "").isprintable() or log_format is LogFormat.CONSOLE
            assert line.isprintable() or log_format is LogFormat.JSON
            if log_format is LogFormat.JSON:
                assert control in json.loads(line)["event"]

    def test_an_error_has_more_and_they_are_indented(
        self, log_format: LogFormat, control: str
    ) -> None:
        try:
            raise ValueError(f"no{control}{FORGED}")
        except ValueError:
            one = record("broke", exc_info=sys.exc_info())
        first, *rest = log_formatter(log_format).format(one).split("\n")
        assert "broke" in first
        assert all(line.startswith("  ") and line.isprintable() for line in rest)
        assert FORGED in "".join([first, *rest])
        assert bool(rest) == (log_format is LogFormat.CONSOLE)


def test_ordinary_text_stays() -> None:
    text = "GET /v1/agents/ada 200 12.5 ms: Grüße, 你好, 🦜 \\n"
    assert printable(text) is text


def test_all_loggers_are_written_so(capfd: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    try:
        configure_logs(LogFormat.CONSOLE)
        logging.getLogger("another.library").warning("a\n%s", FORGED)
    finally:
        root.handlers, root.level = before, level
    (line,) = capfd.readouterr().err.splitlines()
    assert f"a\\n{FORGED}" in line
