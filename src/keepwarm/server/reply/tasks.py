"""Tasks that a request begins: none outlives the request or its client."""

import asyncio
from collections.abc import Collection, Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive

T = TypeVar("T")


async def ended(tasks: Collection["asyncio.Task[Any]"]) -> None:
    """Cancel all tasks, and wait until each has ended.

    All are cancelled before the first wait, so that none goes on while another ends, even where the
    caller is cancelled once more.
    """
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled():
            task.exception()  # asyncio reports exceptions that were never looked at


async def disconnected(receive: Receive) -> None:
    """Return when the client has disconnected."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return what the work returns. A client that disconnects ends it: raises ClientDisconnect."""
    working = asyncio.create_task(work)
    tasks = (working, asyncio.create_task(disconnected(request.receive)))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
    finally:
        await ended(tasks)
    raise ClientDisconnect
