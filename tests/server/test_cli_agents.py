"""`keepwarm agents` against a server on the fake generator."""

import errno
import http.server
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from commands import Done, keepwarm
from engines import fake_loaded
from keepwarm.cli import agents as module
from servers import FakeServer, fake_server

KEY = "sk-1f2e3d"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def ada(server: FakeServer) -> Iterator[str]:
    """An agent of two turns; all agents are gone afterwards."""
    for content in ("Hello world", "More"):
        chatted = keepwarm("chat", "ada", content, "--max-tokens", "4", url=server.url)
        assert chatted.code == 0, chatted
    yield "ada"
    for row in run(server, "ls", "--json").json:
        assert run(server, "rm", row["id"], "--yes").code == 0


def run(server: FakeServer, *arguments: str) -> Done:
    return keepwarm("agents", *arguments, url=server.url)


def one_sentence(done: Done) -> str:
    """What a refused command says, on stderr and without more."""
    assert done.code == 1
    assert done.out == ""
    assert done.err.startswith("keepwarm: ")
    assert done.err.count("\n") == 1
    return done.err


# -- looking ---------------------------------------------------------------------------------------


def test_no_agents_are_said_to_be_none(server: FakeServer) -> None:
    done = run(server, "ls")
    assert done.code == 0
    assert "keepwarm chat NAME" in done.err
    assert run(server, "ls", "--json").json == []


def test_ls_and_show(server: FakeServer, ada: str) -> None:
    text = run(server, "ls").out
    assert "ada" in text
    assert "hot" in text
    (row,) = run(server, "ls", "--json").json
    assert row["num_turns"] == 2
    shown = run(server, "show", ada)
    assert "overflow" in shown.out
    assert run(server, "show", ada, "--json").json["priority"] == 0


def test_a_long_name_stays_on_its_line_in_a_pipe(server: FakeServer, ada: str) -> None:
    assert run(server, "fork", ada, "n" * 128).code == 0
    done = keepwarm("agents", "ls", url=server.url, columns=40)
    assert len([line for line in done.out.splitlines() if "n" * 128 in line]) == 1


def test_ls_shows_every_page(server: FakeServer, ada: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAGE", 2)
    for name in ("bob", "cleo", "dan", "eve"):
        assert run(server, "fork", ada, name).code == 0
    names = [row["id"] for row in run(server, "ls", "--json").json]
    assert names == ["ada", "bob", "cleo", "dan", "eve"]


def test_turns(server: FakeServer, ada: str) -> None:
    text = run(server, "turns", ada).out
    assert "turn 1, " in text
    assert "Hello world" in text
    assert len(run(server, "turns", ada, "--json").json["turns"]) == 2


def test_what_was_said_does_not_steer_the_terminal(server: FakeServer) -> None:
    evil = "\x1b]0;owned\x07\x9b31m[red]plain[/red]"
    assert keepwarm("chat", "eve", evil, "--max-tokens", "1", url=server.url).code == 0
    text = run(server, "turns", "eve").out
    assert "[red]plain[/red]" in text
    assert not {"\x1b", "\x07", "\x9b"} & set(text)
    run(server, "rm", "eve", "--yes")


# -- changing --------------------------------------------------------------------------------------


def test_fork_and_rollback(server: FakeServer, ada: str) -> None:
    assert run(server, "fork", ada, "eve", "--at-turn", "1").out.startswith("eve: ")
    assert run(server, "show", "eve", "--json").json["num_turns"] == 1
    assert run(server, "rollback", ada, "0", "--json").json["num_turns"] == 0
    assert "'eve' exists" in one_sentence(run(server, "fork", ada, "eve"))


def test_park_prefetch_pin(server: FakeServer, ada: str) -> None:
    assert run(server, "park", ada).code == 0
    assert run(server, "prefetch", ada).code == 0
    assert run(server, "pin", ada).out.rstrip().endswith(", pinned")
    assert run(server, "unpin", ada, "--json").json["pinned"] is False


def test_set(server: FakeServer, ada: str) -> None:
    options = ("--priority", "-5", "--quota", "1.5GiB", "--overflow", "drop_oldest")
    assert run(server, "set", ada, *options).code == 0
    agent = run(server, "show", ada, "--json").json
    assert (agent["priority"], agent["quota_bytes"]) == (-5, 3 << 29)
    assert agent["overflow"] == "drop_oldest"
    assert "1,610,612,736" in run(server, "show", ada).out


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--quota", "much"),
        ("--quota", "-1"),
        ("--priority", "101"),
        ("--overflow", "explode"),
    ],
)
def test_set_used_wrongly(server: FakeServer, ada: str, options: tuple[str, ...]) -> None:
    assert run(server, "set", ada, *options).code == 2


@pytest.mark.parametrize("command", ["pin", "unpin", "set"])
def test_settings_of_an_unknown_agent_make_none(server: FakeServer, command: str) -> None:
    options = ("--priority", "1") if command == "set" else ()
    assert "no agent is named 'nobody'" in one_sentence(run(server, command, "nobody", *options))
    assert run(server, "ls", "--json").json == []


def test_verify(server: FakeServer, ada: str) -> None:
    assert "ada equals a cold run" in run(server, "verify", ada).out
    assert run(server, "verify", ada, "--json").json["passed"]


def test_verify_that_fails(server: FakeServer, ada: str) -> None:
    def damage(engine: object) -> None:
        line = next(iter(engine.book)).main.blocks  # type: ignore[attr-defined]
        line.slab.values[3] += 1

    server.call(damage)
    done = run(server, "verify", ada)
    assert "in blocks 0, which were dropped" in one_sentence(done)
    assert run(server, "verify", ada).code == 0


def test_rm_asks_or_wants_yes(server: FakeServer, ada: str) -> None:
    done = run(server, "rm", ada)
    assert done.code == 2
    assert "--yes" in done.err
    assert run(server, "show", ada).code == 0
    assert run(server, "rm", ada, "--yes", "--json").json == {"id": "ada", "deleted": True}
    assert "`keepwarm agents ls`" in one_sentence(run(server, "rm", ada, "--yes"))


@pytest.mark.parametrize("name", ["a/b", "../x", "", "a b", "\x1b[31m", "-x"])
def test_a_name_that_is_none_is_a_wrong_use(server: FakeServer, name: str) -> None:
    done = run(server, "show", "--", name)
    assert done.code == 2


def at_fsync(monkeypatch: pytest.MonkeyPatch, action: Callable[[], object]) -> None:
    """Do something at each fsync of the command, and at none of the server's threads."""
    fsync = os.fsync

    def acting(number: int) -> None:
        fsync(number)
        if threading.current_thread() is threading.main_thread():
            action()

    monkeypatch.setattr(os, "fsync", acting)


# -- files -----------------------------------------------------------------------------------------


def test_an_agent_travels(server: FakeServer, ada: str, folder: Path) -> None:
    done = run(server, "export", ada)
    assert done.code == 0, done
    path = folder / "ada.keepwarm"
    assert path.stat().st_mode & 0o777 == 0o600
    assert f"{path.stat().st_size:,} bytes" in done.out
    assert "exists already; delete it" in one_sentence(run(server, "import", str(path)))
    assert run(server, "import", str(path), "--as", "zoe").out.startswith("zoe is here, with 2")
    (turn, _) = run(server, "turns", "zoe", "--json").json["turns"]
    assert turn["messages"][0]["content"] == "Hello world"
    assert run(server, "verify", "zoe").code == 0
    assert [file.name for file in folder.iterdir()] == ["ada.keepwarm"]


def test_import_as_json(server: FakeServer, ada: str) -> None:
    exported = run(server, "export", ada, "x.keepwarm", "--json").json
    assert exported["file"] == "x.keepwarm"
    assert exported["left_out_tokens"] == 0
    result = run(server, "import", "x.keepwarm", "--as", "zoe", "--json").json
    assert result["agent_id"] == "zoe"


def test_a_file_is_never_replaced_without_force(server: FakeServer, ada: str, folder: Path) -> None:
    path = folder / "mine"
    path.write_text("precious")
    assert "--force" in one_sentence(run(server, "export", ada, str(path)))
    assert path.read_text() == "precious"
    assert run(server, "export", ada, str(path), "--force").code == 0
    assert path.read_bytes() != b"precious"


def test_a_file_that_appears_meanwhile_is_kept(
    server: FakeServer, ada: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder / "mine"
    at_fsync(monkeypatch, lambda: path.write_text("precious"))
    assert "exists already" in one_sentence(run(server, "export", ada, str(path)))
    assert [file.name for file in folder.iterdir()] == ["mine"]
    assert path.read_text() == "precious"


def test_an_export_that_cannot_be_written_leaves_nothing(
    server: FakeServer, ada: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    at_fsync(monkeypatch, full)
    assert "No space left on device; choose another" in one_sentence(run(server, "export", ada))
    assert list(folder.iterdir()) == []


def test_an_export_of_an_unknown_agent_leaves_nothing(server: FakeServer, folder: Path) -> None:
    assert "no agent is named" in one_sentence(run(server, "export", "nobody"))
    assert list(folder.iterdir()) == []


def test_exports_to_no_place(server: FakeServer, ada: str, folder: Path) -> None:
    assert "is a folder" in one_sentence(run(server, "export", ada, str(folder)))
    assert "make it first" in one_sentence(run(server, "export", ada, "missing/x"))


def test_an_import_of_anything_else(server: FakeServer, folder: Path) -> None:
    path = folder / "letter.txt"
    path.write_text("Dear server")
    assert f"{path}: cannot be imported" in one_sentence(run(server, "import", str(path)))
    assert run(server, "import", "missing").code == 2
    assert run(server, "import", str(folder)).code == 2


# -- servers that are none -------------------------------------------------------------------------


def free_url() -> str:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def test_no_server_answers() -> None:
    url = free_url()
    said = one_sentence(keepwarm("agents", "ls", url=url))
    assert said == (
        f"keepwarm: no server at {url}; start one with `keepwarm serve`, or set KEEPWARM_URL\n"
    )


@pytest.mark.parametrize("url", ["ftp://x", "localhost:8642", "http://", "http://[", "http://a:b"])
def test_what_is_no_address(url: str) -> None:
    assert keepwarm("agents", "ls", "--url", url).code == 2


def test_an_address_as_other_clients_write_it(server: FakeServer) -> None:
    assert keepwarm("agents", "ls", "--url", f"{server.url}/v1/", url="http://no").code == 0


@contextmanager
def stranger(status: int, body: bytes, *, promised: int | None = None) -> Iterator[str]:
    """A server that is not Keepwarm's. `promised`: as many bytes as it says there are."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(promised or len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.server_port}"
        finally:
            listening.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("status", "body"), [(200, b"<html>"), (404, b"{}"), (500, b"[1]"), (200, b"[]")]
)
def test_another_program_answers(status: int, body: bytes) -> None:
    with stranger(status, body) as url:
        said = one_sentence(keepwarm("agents", "ls", url=url))
    assert f"status {status}, but not as a Keepwarm server; check KEEPWARM_URL" in said


def test_a_server_that_hangs_up_in_an_export_leaves_nothing(folder: Path) -> None:
    with stranger(200, b"half", promised=8) as url:
        assert "hung up" in one_sentence(keepwarm("agents", "export", "ada", url=url))
    assert list(folder.iterdir()) == []


def test_keys(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    home = tmp_path / "home"
    caplog.set_level(logging.DEBUG)
    with fake_server(home, server__api_keys={"default": KEY}) as guarded:
        missing = one_sentence(keepwarm("agents", "ls", url=guarded.url))
        assert "the server wants an API key; set KEEPWARM_API_KEY" in missing
        wrong = one_sentence(keepwarm("agents", "ls", url=guarded.url, key="sk-other"))
        assert "other than this one" in wrong
        assert "sk-other" not in wrong
        assert keepwarm("agents", "ls", url=guarded.url, key=f" {KEY}\n").code == 0
        strange = keepwarm("agents", "ls", url=guarded.url, key="schlüssel")
        assert strange.code == 2
        assert "schlüssel" not in strange.err
    assert "/v1/agents" in caplog.text
    assert KEY not in caplog.text
    assert "sk-other" not in caplog.text


def test_an_agent_of_another_model_keeps_what_was_said(
    server: FakeServer, ada: str, tmp_path: Path
) -> None:
    assert run(server, "export", ada).code == 0
    with fake_server(tmp_path / "other", loaded=fake_loaded(fingerprint="other")) as other:
        done = run(other, "import", "ada.keepwarm")
        assert done.code == 0, done
        assert "computed anew" in done.out
        assert len(run(other, "turns", ada, "--json").json["turns"]) == 2
