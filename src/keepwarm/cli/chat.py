"""`keepwarm chat`: a conversation with one agent, which remembers earlier ones."""

import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.status import Status

from keepwarm.cli.client import (
    DEFAULT_URL,
    AgentName,
    AsJson,
    Client,
    NoServer,
    Refused,
    ServerEvent,
    Url,
    agent_path,
)
from keepwarm.cli.terminal import counted, for_terminal, waiting, write_json
from keepwarm.core.errors import KeepwarmError

PROMPT = "> "
CONTINUED = "… "


def chat(
    name: AgentName,
    message: Annotated[
        str | None, typer.Argument(help="A message to send; by default standard input, or a chat.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="The system prompt of a new agent.")] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="The longest reply; by default the rest of the context."),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, max=100.0, help="0 is greedy; by default the server's.")
    ] = None,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Talk to an agent, which remembers. Ctrl-C stops a reply, Ctrl-D ends the chat."""
    options = {"max_tokens": max_tokens, "temperature": temperature}
    with Client(url) as client:
        talk = Chat(client, name, system, options, as_json=as_json)
        if message is None and sys.stdin.isatty():
            talk.converse()
        else:
            talk.say(message if message is not None else _piped())


class Chat:
    """A conversation with one agent, which is created with its first message."""

    def __init__(
        self,
        client: Client,
        name: str,
        system: str | None,
        options: dict[str, Any],
        *,
        as_json: bool = False,
    ) -> None:
        self._client = client
        self._name = name
        self._system = system
        self._options = {key: value for key, value in options.items() if value is not None}
        self._as_json = as_json
        self._aside = Console(stderr=True, highlight=False)
        self._agent = client.find_agent(name)
        self._check_system()

    def converse(self) -> None:
        """Send what is typed, until Ctrl-D. An error ends the reply and not the chat."""
        self._greet()
        for message in self._messages():
            try:
                self.say(message)
            except KeyboardInterrupt:
                self._note("\nstopped; the agent remembers what it had said so far")
            except (KeepwarmError, typer.BadParameter) as error:
                self._aside.print(f"keepwarm: {error}", style="red", markup=False, soft_wrap=True)

    def say(self, message: str) -> None:
        """Send one message and show its reply. Raises Refused, NoServer, BadParameter."""
        _check_message(message)
        self._create_if_new()
        body = {"content": message, "stream": True, **self._options}
        events = self._client.events(agent_path(self._name, "messages"), body)
        with closing(events), waiting("waits") as status:
            end = self._shown(events, status)
        if self._as_json:
            write_json(end, indent=None)
            return
        sys.stdout.write("\n")
        sys.stdout.flush()
        self._note(summary(end))

    def _shown(self, events: Iterator[ServerEvent], status: Status | None) -> dict[str, Any]:
        """Show the reply as it comes, and return its last event's data."""
        for event in events:
            if event.name == "progress" and status is not None:
                done, total = event.data["done_tokens"], event.data["total_tokens"]
                status.update(f"[dim]reads {done:,} of {total:,} tokens[/]")
            elif event.name == "delta":
                if status is not None:
                    status.stop()
                self._show_text(event.data["text"])
            elif event.name == "completed":
                return event.data
        raise NoServer(f"the server at {self._client.url} hung up halfway; send the message again")

    def _show_text(self, text: str) -> None:
        if self._as_json:
            return
        sys.stdout.write(for_terminal(text) if sys.stdout.isatty() else text)
        sys.stdout.flush()

    def _messages(self) -> Iterator[str]:
        """Yield the messages that are typed; a backslash at its end continues a line."""
        with suppress(ImportError):
            import readline  # noqa: F401 - gives `input` a history, and keys to edit with
        lines: list[str] = []
        while True:
            try:
                line = input(CONTINUED if lines else PROMPT)
            except EOFError:
                self._note("")
                return
            except KeyboardInterrupt:
                lines = []
                self._note("\nCtrl-D ends the chat")
                continue
            lines.append(line.removesuffix("\\"))
            if line.endswith("\\"):
                continue
            message, lines = "\n".join(lines), []
            if message.strip():
                yield message

    def _greet(self) -> None:
        if self._agent is None:
            self._note(f"{self._name} is new here. Ctrl-C stops a reply, Ctrl-D ends the chat.")
            return
        turns = counted(self._agent["num_turns"], "turn")
        tokens = counted(self._agent["context_tokens"], "token")
        tier = self._agent["tier"]
        self._note(f"{self._name} remembers {turns}, {tokens} ({tier}).")
        if tier == "cold":
            with suppress(Refused):  # only a head start: the first message brings its KV as well
                self._client.post(agent_path(self._name, "prefetch"))

    def _create_if_new(self) -> None:
        if self._agent is None:
            body = {} if self._system is None else {"system": self._system}
            self._agent = self._client.put(agent_path(self._name), body)

    def _check_system(self) -> None:
        if self._agent is None or self._system in (None, self._agent["system"]):
            return
        raise Refused(
            f"{self._name} has a different system prompt; leave --system out, or choose another "
            "name for a new agent"
        )

    def _note(self, text: str) -> None:
        self._aside.print(text, style="dim", markup=False, soft_wrap=True)


def summary(end: dict[str, Any]) -> str:
    """Write one line about a reply: what was reused, how long it took, and warnings."""
    usage, timing = end["usage"], end["timing"]
    parts = [
        end["cache"]["tier"],
        f"{usage['cached_tokens']:,}/{usage['prompt_tokens']:,} tokens cached",
    ]
    first_s = timing["first_token_s"]
    if first_s is not None:
        parts.append(f"first token {1e3 * first_s:,.0f} ms")
        rest_s = timing["total_s"] - first_s
        if usage["completion_tokens"] > 1 and rest_s > 0:
            parts.append(f"{(usage['completion_tokens'] - 1) / rest_s:.1f} tokens/s")
    if end["finish_reason"] == "length":
        parts.append("cut at its longest")
    if end["dropped_turns"]:
        parts.append(f"forgot its oldest {counted(end['dropped_turns'], 'turn')}")
    if not end["durable"]:
        parts.append("not on disk yet")
    return " · ".join(parts)


def _piped() -> str:
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise typer.BadParameter("is not UTF-8", param_hint="standard input") from error
    if not text.strip():
        raise typer.BadParameter("is empty; give a message", param_hint="standard input")
    return text


def _check_message(message: str) -> None:
    """Raise BadParameter for a message that is not UTF-8, or blank."""
    try:
        message.encode()
    except UnicodeEncodeError as error:
        raise typer.BadParameter("the message is not UTF-8") from error
    if not message.strip():
        raise typer.BadParameter("the message is empty")
