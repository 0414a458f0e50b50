"""Corrects paths that clients write with an extra slash, or without the `/v1`."""

import re
from urllib.parse import unquote

from starlette.types import ASGIApp, Receive, Scope, Send

_API = r"(?:chat/+completions|completions|messages|models|agents|stats|responses|embeddings)"
_PREFIX = re.compile(rf"/+(?:v1/+)*(?=(?:{_API})(?:/|$))")
_NAMED = re.compile(r"/v1/(?:agents|models)/")
"""A name follows these, which may be empty or have slashes: its slashes are kept."""


class TidyPaths:
    """Wraps the whole application, so that the guard and the log see only corrected paths."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            raw = scope["raw_path"].decode("ascii")
            tidied = tidy(raw)
            if tidied != raw:
                path = {"path": unquote(tidied), "raw_path": tidied.encode("ascii")}
                scope = {**scope, **path}
        await self._app(scope, receive, send)


def tidy(path: str) -> str:
    """Return the path that is meant; a path that is unknown here stays as it is."""
    path = _PREFIX.sub("/v1/", path, count=1)
    if not _NAMED.match(path):
        path = re.sub(r"/+", "/", path)
    return path.rstrip("/") or "/"
