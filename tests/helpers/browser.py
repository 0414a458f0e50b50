"""Headless Chromium, driven over its debugging pipe: no driver, no library.

Where Chromium is missing, it is installed as root on Debian and its derivatives.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import pytest

from waiting import PATIENCE_S, wait_until

INSTALL_S = 240.0
PROGRAMS = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
)
OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--no-first-run",
    "--no-proxy-server",
    "--remote-debugging-pipe",
)


def chromium() -> str:
    """Find or install Chromium and return its path. Skips the test where neither works."""
    found = _found()
    if found is None and os.geteuid() == 0 and shutil.which("apt-get"):
        _install()
        found = _found()
    if found is None:
        pytest.skip("THE PAGE IS NOT TESTED: there is no Chromium here; install it to test it")
    return found


def _found() -> str | None:
    return next((path for path in map(shutil.which, PROGRAMS) if path), None)


def _install() -> None:
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    install = ["apt-get", "install", "-qq", "-y", "--no-install-recommends", "chromium"]
    for command in (install, ["apt-get", "update", "-qq"], install):
        done = subprocess.run(
            command,
            env=environment,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=INSTALL_S,
            check=False,
        )
        if command is install and done.returncode == 0:
            return


@dataclass(slots=True)
class Page:
    """A tab. `complaints` are console messages, exceptions and violations of the page's policy."""

    orders: IO[bytes]
    answers: IO[bytes]
    session: str = ""
    number: int = 0
    complaints: list[str] = field(default_factory=list)

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        self.number += 1
        order = {"id": self.number, "method": method, "params": params}
        if self.session:
            order["sessionId"] = self.session
        self.orders.write(json.dumps(order).encode() + b"\0")
        self.orders.flush()
        while (answer := self._next()).get("id") != self.number:
            self._note(answer)
        assert "error" not in answer, answer
        result: dict[str, Any] = answer["result"]
        return result

    def open(self, url: str) -> None:
        """Start loading the page; `wait_for` waits for what it shows."""
        self.send("Page.navigate", url=url)

    def value(self, expression: str) -> Any:
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait_for(self, expression: str) -> Any:
        """Wait until the expression is true; return its value."""
        script = f"(() => {{ try {{ return {expression}; }} catch {{}} }})()"
        return wait_until(
            lambda: self.value(script),
            explain=lambda: f"{expression} is not true: {self.text('body')}",
        )

    def wait_for_text(self, selector: str, text: str) -> None:
        self.wait_for(f"document.querySelector({selector!r}).innerText.includes({text!r})")

    def text(self, selector: str) -> str:
        """Return the text that a person sees: hidden text is left out."""
        return str(self.value(f"document.querySelector({selector!r}).innerText"))

    def _next(self) -> dict[str, Any]:
        raw = bytearray()
        while (byte := self.answers.read(1)) != b"\0":
            assert byte, "the browser has ended"
            raw += byte
        message: dict[str, Any] = json.loads(raw)
        return message

    def _note(self, event: dict[str, Any]) -> None:
        params = event.get("params", {})
        if event.get("method") == "Log.entryAdded":
            self.complaints.append(params["entry"]["text"])
        elif event.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(str(params["exceptionDetails"]))


@contextmanager
def browser_page(folder: Path) -> Iterator[Page]:
    """Start a browser whose files are in `folder`, and open a tab."""
    program = chromium()
    their_orders, our_orders = os.pipe()
    our_answers, their_answers = os.pipe()
    # The browser reads orders from its descriptor 3 and writes answers to 4.
    redirect = f'exec "$0" "$@" 3<&{their_orders} 4>&{their_answers}'
    with (
        os.fdopen(our_orders, "wb") as orders,
        os.fdopen(our_answers, "rb") as answers,
        (folder / "browser.log").open("wb") as log,
    ):
        process = subprocess.Popen(
            ["bash", "-c", redirect, program, *OPTIONS, f"--user-data-dir={folder / 'profile'}"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=(their_orders, their_answers),
        )
        os.close(their_orders)
        os.close(their_answers)
        try:
            yield _new_page(Page(orders, answers))
        finally:
            process.kill()
            process.wait(PATIENCE_S)


def _new_page(page: Page) -> Page:
    target = page.send("Target.createTarget", url="about:blank")["targetId"]
    attached = page.send("Target.attachToTarget", targetId=target, flatten=True)
    page.session = attached["sessionId"]
    for domain in ("Page", "Runtime", "Log"):
        page.send(f"{domain}.enable")
    return page
