"""Server-sent events as the strictest of real clients read them."""

import json
from dataclasses import dataclass
from typing import Any

DONE = "[DONE]"


@dataclass(frozen=True, slots=True)
class ServerEvent:
    """An event of a stream; `name` is empty where the stream has none."""

    name: str
    data: Any


def events_of(text: str) -> list[ServerEvent]:
    """Parse a stream line by line; each blank line must end an event that has data.

    openai-go before 3.43 ends a stream where a comment stands between two blank lines.
    """
    events: list[ServerEvent] = []
    name, data = "", ""
    *lines, rest = text.split("\n")
    assert rest == "", f"the stream ends amid a line: {rest!r}"
    for line in lines:
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            data += line.removeprefix("data: ")
        elif not line:
            assert data, f"a blank line that ends no event, after {events[-1:]}"
            events.append(ServerEvent(name, data if data == DONE else json.loads(data)))
            name, data = "", ""
        else:
            assert line.startswith(":"), line
    assert not data
    return events


def body_of(received: bytes) -> str:
    """Return the body of a whole chunked response, given as it came from the socket."""
    head, _, rest = received.partition(b"\r\n\r\n")
    assert b"transfer-encoding: chunked" in head
    body = b""
    while True:
        length, _, rest = rest.partition(b"\r\n")
        if not int(length, 16):
            return body.decode()
        body, rest = body + rest[: int(length, 16)], rest[int(length, 16) + 2 :]
