"""What `chat` and `agents` know of a server: where it is, how to ask, and what to say if it won't.

Every error is one sentence with a remedy.
"""

import json
import os
import sys
import unicodedata
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Self
from urllib.parse import quote, urlsplit

import typer

from keepwarm.core.errors import InvalidRequest, KeepwarmError

if TYPE_CHECKING:
    import httpx
    from rich.status import Status

DEFAULT_URL = "http://127.0.0.1:8642"
ANSWER_S = 120.0
CONNECT_S = 10.0
UNKNOWN_AGENT = "not_found"

_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
_REMEDIES = {
    "unauthenticated": "set KEEPWARM_API_KEY to one of the server's keys",
    UNKNOWN_AGENT: "`keepwarm agents ls` lists those that are there",
    "request_too_large": "raise the server's max_body_bytes or max_import_bytes",
    "rate_limited": "try again later",
}

_EVENTS = {"Accept": "text/event-stream"}

Url = Annotated[
    str, typer.Option(envvar="KEEPWARM_URL", metavar="URL", help="The server's address.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


class NoServer(KeepwarmError):
    """Nobody answers, or somebody who is no Keepwarm server."""


class Refused(KeepwarmError):
    """The server says no; `kind` is its word for why."""

    def __init__(self, message: str, kind: str = "") -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class ServerEvent:
    """One server-sent event."""

    name: str
    data: dict[str, Any]


class Client:
    """The agents API of one server."""

    def __init__(self, url: str) -> None:
        self.url = _base(url)
        self._http = _http_client(self.url)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def get(self, path: str, **query: str | int) -> dict[str, Any]:
        return self._json("GET", path, params=query)

    def put(self, path: str, body: Mapping[str, object]) -> dict[str, Any]:
        return self._json("PUT", path, json=body)

    def post(
        self, path: str, body: Mapping[str, object] | None = None, *, patient: bool = False
    ) -> dict[str, Any]:
        """`patient`: however long it takes."""
        return self._json("POST", path, json=body, timeout=_timeout(None if patient else ANSWER_S))

    def delete(self, path: str) -> dict[str, Any]:
        return self._json("DELETE", path)

    def find_agent(self, name: str) -> dict[str, Any] | None:
        """None: there is no such agent."""
        try:
            return self.get(agent_path(name))
        except Refused as error:
            if error.kind == UNKNOWN_AGENT:
                return None
            raise

    def upload(self, path: str, body: Iterator[bytes], num_bytes: int, **query: str) -> Any:
        """A POST of so many bytes as they come."""
        headers = {"Content-Length": str(num_bytes), "Content-Type": "application/x-tar"}
        return self._json(
            "POST", path, content=body, headers=headers, params=query, timeout=_timeout(None)
        )

    @contextmanager
    def download(self, path: str) -> "Iterator[httpx.Response]":
        """The answer's head; its body is read by whoever asked."""
        with (
            self._said_well(),
            self._http.stream("GET", path, timeout=_timeout(None)) as response,
        ):
            _check(response, self.url)
            yield response

    def events(self, path: str, body: Mapping[str, object]) -> Generator[ServerEvent, None, None]:
        """The events of a streamed reply. Ending the iterator early hangs up."""
        with (
            self._said_well(),
            self._http.stream(
                "POST", path, json=body, timeout=_timeout(None), headers=_EVENTS
            ) as response,
        ):
            _check(response, self.url)
            for event in _events(response.iter_bytes()):
                if event.name == "error":
                    raise _refusal(event.data)
                yield event

    def _json(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        with self._said_well():
            response = self._http.request(method, path, **options)
            _check(response, self.url)
        return _document(response.content, self.url)

    @contextmanager
    def _said_well(self) -> Iterator[None]:
        """What goes wrong on the way becomes a sentence with a remedy."""
        import httpx

        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise NoServer(
                f"no server at {self.url}; start one with `keepwarm serve`, or set KEEPWARM_URL"
            ) from error
        except httpx.TimeoutException as error:
            raise NoServer(
                f"the server at {self.url} did not answer in {ANSWER_S:g} s; try again later"
            ) from error
        except httpx.TransportError as error:
            raise NoServer(
                f"the server at {self.url} hung up; see its log, and send it again"
            ) from error


def agent_path(name: str, *more: str) -> str:
    """`name` is checked here, because a wrong one would be another path."""
    return "/".join(["/v1/agents", quote(name, safe=""), *more])


def valid_name(name: str) -> str:
    """A callback of Typer's: a wrong name is a wrong use of the command."""
    from keepwarm.engine import requests

    try:
        return requests.valid_name(name)
    except InvalidRequest as error:
        raise typer.BadParameter(error.problem) from error


AgentName = Annotated[
    str, typer.Argument(metavar="NAME", callback=valid_name, help="The agent's name.")
]


def write_json(value: object, *, indent: int | None = 2) -> None:
    sys.stdout.write(json.dumps(value, indent=indent) + "\n")
    sys.stdout.flush()


@contextmanager
def waiting(doing: str) -> "Iterator[Status | None]":
    """A spinner, where a person looks on."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    with console.status(f"[dim]{doing}[/]") as status:
        yield status


def counted(number: int, noun: str) -> str:
    """`1 turn`, `2 turns`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def for_terminal(text: str) -> str:
    """Without control characters: what was said may try to steer the terminal."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")


# -- inside ----------------------------------------------------------------------------------------


def _base(url: str) -> str:
    """The address as people write it, perhaps as OpenAI's clients want it."""
    try:
        parts = urlsplit(url)
        is_address = parts.scheme in {"http", "https"} and bool(parts.hostname)
        _ = parts.port
    except ValueError:
        is_address = False
    if not is_address:
        raise typer.BadParameter(
            f"{url!r} is no server's address; write it like {DEFAULT_URL}", param_hint="--url"
        )
    return url.rstrip("/").removesuffix("/v1")


def _http_client(url: str) -> "httpx.Client":
    import httpx

    try:
        return httpx.Client(
            base_url=url,
            headers=_key_header(),
            timeout=_timeout(ANSWER_S),
            # Reading the certificates takes longer than most commands.
            verify=url.startswith("https:"),
            # A proxy is for other machines.
            trust_env=urlsplit(url).hostname not in _LOOPBACK,
        )
    except httpx.InvalidURL as error:
        raise typer.BadParameter(f"{url!r} is no address: {error}", param_hint="--url") from error


def _timeout(read_s: float | None) -> "httpx.Timeout":
    import httpx

    return httpx.Timeout(read_s, connect=CONNECT_S)


def _key_header() -> dict[str, str]:
    key = os.environ.get("KEEPWARM_API_KEY", "").strip()
    if not key:
        return {}
    if not key.isascii() or not key.isprintable():
        raise typer.BadParameter("has characters that no key has", param_hint="KEEPWARM_API_KEY")
    return {"Authorization": f"Bearer {key}"}


def _check(response: "httpx.Response", url: str) -> None:
    """Raises Refused or NoServer unless the answer is a good one."""
    if response.is_success:
        return
    document = _document(response.read(), url, status=response.status_code)
    raise _refusal(document)


def _document(raw: bytes, url: str, status: int = 200) -> dict[str, Any]:
    try:
        document = json.loads(raw)
    except ValueError:
        document = None
    if isinstance(document, dict) and (status < 400 or isinstance(document.get("error"), dict)):
        return document
    raise NoServer(
        f"{url} answers with status {status}, but not as a Keepwarm server; check KEEPWARM_URL"
    )


def _refusal(document: Mapping[str, Any]) -> Refused:
    error = document["error"]
    kind = str(error.get("type", ""))
    message = for_terminal(str(error.get("message", "it says no"))).rstrip(".")
    message = message.removeprefix("body: ")
    if kind == "unauthenticated":
        message = "the server wants an API key" + (
            " other than this one" if os.environ.get("KEEPWARM_API_KEY") else ""
        )
    remedy = _REMEDIES.get(kind)
    return Refused(f"{message}; {remedy}" if remedy else message, kind)


def _events(chunks: Iterator[bytes]) -> Iterator[ServerEvent]:
    name, data = "", ""
    for line in _lines(chunks):
        if line.startswith("event:"):
            name = line.removeprefix("event:").strip()
        elif line.startswith("data:"):
            data += line.removeprefix("data:").strip()
        elif not line and data:
            yield ServerEvent(name, json.loads(data))
            name, data = "", ""


def _lines(chunks: Iterator[bytes]) -> Iterator[str]:
    """Ended by a newline only: httpx's own lines also end where a text has a U+2028."""
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line.decode().removesuffix("\r")
