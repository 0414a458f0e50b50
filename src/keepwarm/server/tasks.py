"""Tasks that a task has begun, and ends before it ends itself."""

import asyncio
from collections.abc import Collection
from typing import Any


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
