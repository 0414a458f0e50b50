"""The page at `/`, in a browser, against servers on the fake generator and one that lies."""

import http.server
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from browser import Page, browser_page
from keepwarm.server.operations.routes import PAGE_POLICY
from servers import FakeServer, fake_server

pytestmark = pytest.mark.slow

KEY = "sk-5a5a5a"
EVIL = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
VISIBLE = "!document.getElementById('content').hidden"


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser_page(tmp_path_factory.mktemp("browser")) as page:
        yield page


@pytest.fixture
def page(tab: Page) -> Page:
    tab.send("Emulation.clearDeviceMetricsOverride")
    tab.send("Emulation.setEmulatedMedia", features=[])
    tab.open("about:blank")
    tab.complaints.clear()
    return tab


def say(server: FakeServer, name: str) -> None:
    with server.client() as client:
        body = {"content": "Hello world", "max_tokens": 8}
        client.put(f"/v1/agents/{name}", json={})
        assert client.post(f"/v1/agents/{name}/messages", json=body).status_code == 200


def test_it_needs_nothing_from_elsewhere_and_writes_no_html() -> None:
    html = files("keepwarm.web").joinpath("index.html").read_text("utf-8")
    assert set(re.findall(r"https?://[^'\" ]+", html)) == {"http://www.w3.org/2000/svg"}
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", html)
    assert not re.findall(r"<script src|<link rel=\"stylesheet|@import|url\(", html)


def test_the_docs_need_nothing_from_elsewhere(page: Page, tmp_path: Path) -> None:
    with fake_server(tmp_path, server__api_keys=f"a={KEY}") as server:
        page.open(f"{server.url}/docs")
        page.wait_for("document.querySelectorAll('.opblock').length > 20")
        assert not page.complaints
        loaded = page.value("performance.getEntriesByType('resource').map((r) => r.name)")
        assert len(loaded) >= 3
        assert all(url.startswith((server.url, "data:")) for url in loaded), loaded


def test_what_it_shows(page: Page, tmp_path: Path) -> None:
    with fake_server(tmp_path) as server:
        page.open(server.url)
        page.wait_for(VISIBLE)
        assert "None yet" in page.text("#content")
        assert page.text("#model") == "fake"
        say(server, "ada")
        say(server, "bob")
        with server.client() as client:
            assert client.put("/v1/agents/bob", json={"pinned": True}).status_code == 200
            assert client.post("/v1/agents/bob/park").status_code == 200
        page.wait_for_text("#rows", "bob")
        page.wait_for_text("#rows", "pinned")
        rows = page.text("#rows")
        assert re.search(r"ada\s+hot\s", rows)
        assert re.search(r"bob\s+(warm|cold)\s", rows)
        assert "slab, " in page.text("#memory-legend")
        assert "of 4.0 MiB" in page.text("#memory-budget")
        assert "of 20.0 GiB" in page.text("#disk-budget")
        assert page.text("#running") == "0"
        assert page.text("#state") == "serving"
        assert "The disk refuses" not in page.text("body")
        page.wait_for("document.getElementById('decoded-line').getAttribute('points').length > 9")
        assert page.complaints == []


def test_a_user_sees_its_own_agents(page: Page, tmp_path: Path) -> None:
    with fake_server(tmp_path, server__api_keys={"default": "admin", "team": KEY}) as server:
        for key in ("admin", KEY):
            with server.client(headers={"x-api-key": key}) as client:
                client.put(f"/v1/agents/of-{key}", json={})
        page.open(server.url)
        page.wait_for("!document.getElementById('door').hidden")
        page.value(f"sessionStorage.setItem('keepwarm.key', '{KEY}')")
        page.open(server.url)
        page.wait_for(VISIBLE)
        page.wait_for_text("#rows", f"of-{KEY}")
        assert "of-admin" not in page.text("#rows")
        assert page.value("document.getElementById('house').hidden") is True
        assert page.text("#state") == "serving"


def test_rates_come_from_two_looks(page: Page) -> None:
    stats = _stats()
    with liar(stats) as url:
        page.open(url)
        page.wait_for_text("#decoded", "0")
        stats["batch"]["decoded_tokens"] += 30_000
        stats["batch"]["prefilled_tokens"] += 60_000
        page.wait_for("document.getElementById('decoded').innerText.includes(',')")
        decoded, prefilled = (
            int(page.text(selector).replace(",", "")) for selector in ("#decoded", "#prefilled")
        )
        assert 1_000 < decoded < 40_000
        assert abs(prefilled - 2 * decoded) < 10
        stats["batch"]["decoded_tokens"] = 5  # another server: no rate below nothing
        page.wait_for_text("#decoded", "0")
        assert "-" not in page.text("#content")


def test_names_and_faults_are_text(page: Page) -> None:
    stats = _stats()
    stats["models"][0]["id"] = EVIL
    stats["store"]["fault"] = EVIL
    stats["agents"] = [_agent(EVIL, tier=EVIL)]
    stats["pool"]["bytes_by_kind"] = {EVIL: 5}
    stats["num_agents"] = 1
    with liar(stats) as url:
        page.open(url)
        page.wait_for(VISIBLE)
        for selector in ("#model", "#fault", "#rows", "#memory-legend"):
            assert EVIL in page.text(selector)
        assert page.value("document.querySelectorAll('img, script').length") == 1
        assert page.value("document.title") == "Keepwarm"
        assert page.complaints == []


def test_a_key_is_asked_for_and_kept_for_the_tab(page: Page, tmp_path: Path) -> None:
    with fake_server(tmp_path, server__api_keys={"default": KEY}) as server:
        page.open(server.url)
        page.wait_for_text("#door", "needs an API key")
        assert page.value(VISIBLE) is False
        _enter(page, "sk-wrong")
        page.wait_for_text("#door", "does not accept this key")
        _enter(page, "schlüssel")
        page.wait_for_text("#door", "not a valid key")
        _enter(page, KEY)
        page.wait_for(VISIBLE)
        assert page.text("#state") == "serving"
        assert KEY not in page.value("document.documentElement.outerHTML")
        assert KEY in page.value("JSON.stringify(sessionStorage)")
        assert page.value("localStorage.length") == 0
        page.send("Page.reload")
        page.wait_for("document.getElementById('state').innerText === 'serving'")
        page.value("document.getElementById('forget').click()")
        page.wait_for_text("#door", "Open")
        assert page.value("sessionStorage.length") == 0


def test_a_server_that_has_gone(page: Page, tmp_path: Path) -> None:
    with fake_server(tmp_path) as server:
        page.open(server.url)
        page.wait_for(VISIBLE)
    page.wait_for_text("#gone", "This page tries again")
    assert page.text("#state") == "no answer"


def test_a_server_that_comes_back(page: Page) -> None:
    stats = _stats()
    stats["status"] = 503
    with liar(stats) as url:
        page.open(url)
        page.wait_for_text("#gone", "The server says: it is stopping")
        del stats["status"]
        page.wait_for(VISIBLE)
        assert "tries again" not in page.text("body")


def test_on_a_phone_nothing_sticks_out(page: Page) -> None:
    stats = _stats()
    stats["agents"] = [_agent("n" * 128), _agent("ada", pinned=True, running=True, private=True)]
    stats["num_agents"] = 2
    stats["models"][0]["id"] = "mlx-community/" + "Q" * 60
    with liar(stats) as url:
        page.send(
            "Emulation.setDeviceMetricsOverride",
            width=360,
            height=740,
            deviceScaleFactor=2,
            mobile=True,
        )
        page.open(url)
        page.wait_for(VISIBLE)
        assert page.value("document.scrollingElement.scrollWidth") <= 360


def test_light_and_dark(page: Page) -> None:
    grounds = set()
    with liar(_stats()) as url:
        for scheme in ("light", "dark"):
            features = [{"name": "prefers-color-scheme", "value": scheme}]
            page.send("Emulation.setEmulatedMedia", features=features)
            page.open(url)
            page.wait_for(VISIBLE)
            grounds.add(page.value("getComputedStyle(document.body).backgroundColor"))
    assert len(grounds) == 2


def _enter(page: Page, key: str) -> None:
    page.wait_for("!document.getElementById('door').hidden")
    page.value(f"document.getElementById('key').value = {key!r}")
    page.value("document.getElementById('key-form').requestSubmit()")


def _stats() -> dict[str, Any]:
    """What `/v1/stats` says, as `test_what_it_shows` sees it for real."""
    return {
        "version": "0.1.0",
        "models": [{"id": "fake", "state": "ready", "context_length": 8192}],
        "num_waiting": 0,
        "num_running": 0,
        "pool": {
            "budget_bytes": 1 << 30,
            "used_bytes": 0,
            "peak_bytes": 0,
            "bytes_by_kind": {},
            "num_by_kind": {},
        },
        "batch": {
            "steps": 0,
            "decoded_tokens": 100,
            "prefilled_tokens": 100,
            "preemptions": 0,
            "generator_failures": 0,
        },
        "store": {
            "fault": None,
            "num_faults": 0,
            "num_damaged": 0,
            "num_records": 0,
            "disk_bytes": 0,
            "budget_bytes": 1 << 30,
            "queued_bytes": 0,
        },
        "num_agents": 0,
        "agents": [],
    }


def _agent(name: str, **more: Any) -> dict[str, Any]:
    agent = {
        "id": name,
        "tier": "hot",
        "context_tokens": 123_456,
        "held_tokens": 123_456,
        "num_turns": 1_234,
        "running": False,
        "pinned": False,
        "private": False,
    }
    return {**agent, **more}


@contextmanager
def liar(stats: dict[str, Any]) -> Iterator[str]:
    """Serves the page under its own policy, and whatever statistics the test wants."""
    html = files("keepwarm.web").joinpath("index.html").read_bytes()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status = stats.get("status", 200)
            body = json.dumps(stats if status == 200 else _STOPPING).encode()
            kind = "application/json"
            if self.path == "/":
                status, body, kind = 200, html, "text/html; charset=utf-8"
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Content-Security-Policy", PAGE_POLICY)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


_STOPPING = {"error": {"type": "overloaded", "message": "it is stopping"}}
