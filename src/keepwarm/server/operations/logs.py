"""Structured log lines, each with its request's id."""

import logging
import sys

import structlog

from keepwarm.server.edge.guard import request_id_of_context
from keepwarm.server.settings import LogFormat

TRACEBACKS = ("exception", "stack")
"""The parts of a record that may have several lines."""


def configure_logs(log_format: LogFormat, level: int = logging.INFO) -> None:
    """Set up logging for the whole process, standard loggers included."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(log_formatter(log_format))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for noisy in ("httpx", "uvicorn.access"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def log_formatter(log_format: LogFormat) -> logging.Formatter:
    """Make the formatter for records of Keepwarm's loggers and of all others."""
    shared: list[structlog.types.Processor] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=log_format is LogFormat.JSON),
        _add_request_id,
    ]
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.format_exc_info,
            *_renderers(log_format),
        ],
    )


def _renderers(log_format: LogFormat) -> list[structlog.types.Processor]:
    if log_format is LogFormat.JSON:
        return [structlog.processors.JSONRenderer()]  # which escapes everything but ASCII
    return [_escape, structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())]


def _escape(_: object, __: str, event: structlog.types.EventDict) -> structlog.types.EventDict:
    """Keep a record on one line; only a traceback has more lines, which are indented.

    Any text may quote a client: a path, a name, an error. A line break would let it forge a log
    line, and an escape sequence would control the terminal.
    """
    for key, value in event.items():
        if not isinstance(value, str):
            continue
        if key in TRACEBACKS:
            event[key] = "\n".join(f"  {printable(line)}" for line in value.split("\n"))
        else:
            event[key] = printable(value)
    return event


def printable(text: str) -> str:
    """Escape control characters, line separators and marks that turn the direction of text."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def _add_request_id(
    _: object, __: str, event: structlog.types.EventDict
) -> structlog.types.EventDict:
    request_id = request_id_of_context.get()
    if request_id:
        event["request_id"] = request_id
    return event
