"""Tasks that a request begins: none outlives it, and none its client."""

import asyncio
from collections.abc import Collection, Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive

T = TypeVar("T")


async def ended(tasks: Collection["asyncio.Task[Any]"]) -> None:
    """Cancel all of them, and wait until each has ended, however it does.

    All are cancelled before anything is waited for: none goes on while another one ends, also where
    the caller is cancelled once more.
    """
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled():
            task.exception()  # seen, so that it is not reported as lost


async def disconnected(receive: Receive) -> None:
    """Return when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return what the work returns; a client that hangs up ends it. Raises ClientDisconnect."""
    working = asyncio.create_task(work)
    tasks = (working, asyncio.create_task(disconnected(request.receive)))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
    finally:
        await ended(tasks)
    raise ClientDisconnect
