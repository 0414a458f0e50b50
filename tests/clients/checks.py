"""What the Python clients' checks share: they run one after another, each with a line that says so.

Imported by scripts that run on a client's own Python, so nothing here needs more than that has.
"""

import asyncio
import inspect
import json
import sys
import traceback
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

Check = Callable[..., Any]


@dataclass(frozen=True)
class Target:
    """All that a client is configured with."""

    base_url: str
    key: str
    model: str


def target() -> Target:
    return Target(*sys.argv[1:4])


def get(to: Target, path: str) -> Any:
    """Keepwarm's own API, which the clients do not know."""
    request = urllib.request.Request(  # noqa: S310 - a server of the test's own
        f"{to.base_url}{path}", headers={"Authorization": f"Bearer {to.key}"}
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=60) as response:
        return json.load(response)


def check_all_is_cached(cached: int, prompt: int, reply: int) -> None:
    """Check that a second turn found the first's prompt and reply, but for its last token."""
    assert prompt + reply - 1 <= cached <= prompt + reply, (cached, prompt, reply)


def run(*checks: Check) -> None:
    """Ends the process with 1 when one fails; the others run all the same."""
    # One loop for all, because clients keep their connections.
    with asyncio.Runner() as loop:
        failed = [check.__name__ for check in checks if not _passes(check, loop)]
    if failed:
        _say(f"FAILED: {', '.join(failed)}")
        sys.exit(1)


@contextmanager
def raises(error_type: type[BaseException]) -> Iterator[list[Any]]:
    """What is done inside must end with an error of this type, which is then in the list."""
    caught: list[Any] = []
    try:
        yield caught
    except error_type as error:
        caught.append(error)
        return
    raise AssertionError(f"no {error_type.__name__}")


def _passes(check: Check, loop: asyncio.Runner) -> bool:
    try:
        shown = loop.run(check()) if inspect.iscoroutinefunction(check) else check()
    except Exception:  # noqa: BLE001 - reported, and the next check runs
        _say(f"  FAIL {check.__name__}\n{traceback.format_exc()}")
        return False
    _say(f"  ok   {check.__name__}{_details(shown)}")
    return True


def _details(shown: object) -> str:
    if shown is None:
        return ""
    parts: Sequence[object] = shown if isinstance(shown, tuple) else (shown,)
    return ": " + ", ".join(map(str, parts))


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
