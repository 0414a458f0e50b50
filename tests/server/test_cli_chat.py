"""`keepwarm chat` against a server on the fake generator: said once, piped, and in a terminal."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from commands import Done, Terminal, keepwarm, terminal
from engines import FakeFactory
from keepwarm.cli.chat import summary
from servers import FakeServer, fake_server
from waiting import wait_until

PARAGRAPH_SEPARATOR = "\u2029"
EVIL = f"a\x85b{PARAGRAPH_SEPARATOR}c\x1b[31m\r\nd"
LONG = 80_000


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeServer]:
    """Every reply is EVIL, over and over, with heartbeats between its tokens."""
    factory = FakeFactory(script=list(EVIL.encode()), pause_s=0.002)
    options = {"factory": factory, "server__heartbeat_s": 0.001}
    with fake_server(tmp_path_factory.mktemp("home"), **options) as opened:
        yield opened


def chat(server: FakeServer, *arguments: str, stdin: bytes = b"") -> Done:
    return keepwarm("chat", *arguments, url=server.url, stdin=stdin)


def turns(server: FakeServer, name: str) -> list[list[str]]:
    """Each turn's new messages, by their text."""
    document = keepwarm("agents", "turns", name, "--json", url=server.url).json
    return [[message["content"] for message in turn["messages"]] for turn in document["turns"]]


# -- said once -------------------------------------------------------------------------------------


def test_a_message_makes_an_agent_that_goes_on(server: FakeServer) -> None:
    first = chat(server, "ada", "Hello", "--system", "Be brief.", "--max-tokens", "3")
    assert first.code == 0, first
    assert "none · 0/" in first.err
    assert "cut at its longest" in first.err
    second = chat(server, "ada", "More", "--max-tokens", "3")
    assert second.err.startswith("hot · ")
    assert [turn[-2] for turn in turns(server, "ada")] == ["Hello", "More"]
    assert turns(server, "ada")[0][0] == "Be brief."


def test_text_is_passed_on_as_it_is_without_a_terminal(server: FakeServer) -> None:
    done = chat(server, "raw", "Hello", "--max-tokens", str(len(EVIL.encode())))
    assert done.out == EVIL + "\n"


def test_a_piped_message(server: FakeServer) -> None:
    message = "Zwei\nZeilen\n"
    done = chat(server, "pipe", "--max-tokens", "1", stdin=message.encode())
    assert done.code == 0, done
    assert turns(server, "pipe")[0][0] == message


def test_json_is_one_line_a_reply(server: FakeServer) -> None:
    done = chat(server, "jane", "Hello", "--max-tokens", "3", "--json")
    (line,) = done.out.splitlines()
    assert json.loads(line)["turn"] == 1
    assert done.err == ""


@pytest.mark.parametrize("stdin", [b"", b" \n", b"\xff\xfe"])
def test_nothing_to_say_is_a_wrong_use(server: FakeServer, stdin: bytes) -> None:
    assert chat(server, "nobody", stdin=stdin).code == 2
    assert chat(server, "nobody", " ").code == 2
    assert chat(server, "nobody", "\udcff").code == 2
    assert chat(server, "no/body", "Hello").code == 2
    assert keepwarm("agents", "show", "nobody", url=server.url).code == 1


def test_another_system_prompt_is_refused(server: FakeServer) -> None:
    chat(server, "sue", "Hello", "--system", "One.", "--max-tokens", "1")
    assert chat(server, "sue", "Hello", "--system", "One.", "--max-tokens", "1").code == 0
    done = chat(server, "sue", "Hello", "--system", "Two.", "--max-tokens", "1")
    assert done.code == 1
    assert "leave --system out" in done.err


def test_an_error_in_the_stream_is_one_sentence(tmp_path: Path) -> None:
    factory = FakeFactory(fail_at=[[4]])
    with fake_server(tmp_path, factory=factory) as failing:
        done = keepwarm("chat", "ada", "Hello", "--max-tokens", "9", url=failing.url)
    assert done.code == 1
    assert done.err.startswith("keepwarm: the model failed")
    assert done.err.count("\n") == 1


def test_a_reply_in_numbers() -> None:
    end = {
        "cache": {"tier": "warm"},
        "usage": {"cached_tokens": 4096, "prompt_tokens": 4210, "completion_tokens": 11},
        "timing": {"first_token_s": 0.25, "total_s": 1.25},
        "finish_reason": "stop",
        "dropped_turns": 1,
        "durable": False,
    }
    assert summary(end) == (
        "warm · 4,096/4,210 tokens cached · first token 250 ms · 10.0 tokens/s · "
        "forgot its oldest 1 turn · not on disk yet"
    )


# -- in a terminal ---------------------------------------------------------------------------------


def say(shell: Terminal, text: str) -> None:
    shell.wait_for(r"> $")
    shell.type(text)


def test_a_conversation(server: FakeServer) -> None:
    with terminal("chat", "tess", "--max-tokens", "14", url=server.url) as shell:
        shell.wait_for("tess is new here")
        say(shell, "Hello\n")
        shown = shell.wait_for("tokens/s")
        assert "ab" in shown
        assert "d" in shown
        assert not {"\x85", "\x9b"} & set(shown)
        assert "\x1b[31m" not in shown
        say(shell, "two \\\nlines\n")
        shell.wait_for(r"hot · .*tokens/s")
        say(shell, "\n")
        say(shell, "\x04")
        assert shell.end() == 0
    assert turns(server, "tess")[1][0] == "two \nlines"
    with terminal("chat", "tess", url=server.url) as shell:
        shell.wait_for(r"tess remembers 2 turns, \d+ tokens \(hot\)")
        say(shell, "\x04")
        assert shell.end() == 0


def test_ctrl_c_stops_the_reply_and_not_the_chat(server: FakeServer) -> None:
    with terminal("chat", "carl", "--max-tokens", str(LONG), url=server.url) as shell:
        say(shell, "Talk for ever\n")
        shell.wait_for("dab")
        shell.interrupt()
        shell.wait_for("stopped")
        wait_until(lambda: not server.engine.num_requests)
        say(shell, "not sent")
        # Python's readline sees a signal only while it waits for a key, so not before the echo.
        shell.wait_for("not sent")
        shell.interrupt()
        shell.wait_for("Ctrl-D ends the chat")
        say(shell, "\x04")
        assert shell.end() == 0
    (turn,) = turns(server, "carl")
    assert turn[0] == "Talk for ever"
    assert 0 < len(turn[1]) < LONG


def test_an_error_ends_the_reply_and_not_the_chat(tmp_path: Path) -> None:
    factory = FakeFactory(fail_at=[[4]])
    with (
        fake_server(tmp_path, factory=factory) as failing,
        terminal("chat", "ada", "--max-tokens", "5", url=failing.url) as shell,
    ):
        say(shell, "Hello\n")
        shell.wait_for("keepwarm: the model failed")
        say(shell, "Again\n")
        shell.wait_for("tokens/s")
        say(shell, "\x04")
        assert shell.end() == 0


def test_looking_makes_no_agent(server: FakeServer) -> None:
    with terminal("chat", "typo", url=server.url) as shell:
        say(shell, "\x04")
        assert shell.end() == 0
    assert keepwarm("agents", "show", "typo", url=server.url).code == 1


def test_rm_asks_in_a_terminal(server: FakeServer) -> None:
    chat(server, "gone", "Hello", "--max-tokens", "1")
    for answer, code in (("n", 1), ("y", 0)):
        with terminal("agents", "rm", "gone", url=server.url) as shell:
            shell.wait_for(r"Delete gone with its 1 turn, \d+ tokens\? \[y/N\]")
            shell.type(f"{answer}\n")
            assert shell.end() == code
