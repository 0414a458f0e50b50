"""Server-sent events as bytes, and what a stream of them needs."""

SSE = "text/event-stream"
STREAM_HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}
"""Keep proxies from collecting the events before they pass them on; the second is nginx's."""
HEARTBEAT = b": keepwarm\n"
"""A comment before the next event. No blank line follows: many clients take one for an empty event,
and some end there (openai-go before 3.43).
"""


def frame(name: str, data: bytes) -> bytes:
    """Write an event with a name."""
    return f"event: {name}\ndata: ".encode() + data + b"\n\n"


def unnamed_frame(data: bytes) -> bytes:
    """Write an event without a name."""
    return b"data: " + data + b"\n\n"
