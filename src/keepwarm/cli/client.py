"""Asks a server over HTTP, for `chat`, `agents` and `models`. Its errors say what to do."""

import json
import os
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Self
from urllib.parse import quote, urlsplit

import typer

from keepwarm.cli.terminal import for_terminal
from keepwarm.core.errors import InvalidRequest, KeepwarmError

if TYPE_CHECKING:
    import httpx

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
    """Nothing answers at the address, or something that is not a Keepwarm server."""


class Refused(KeepwarmError):
    """The server refused; `kind` is its name for the reason."""

    def __init__(self, message: str, kind: str = "") -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class ServerEvent:
    """A server-sent event, with its data."""

    name: str
    data: dict[str, Any]


class Client:
    """The HTTP API of one server. Its methods raise Refused and NoServer."""

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
        """Post and return the answer's JSON; `patient` waits however long it takes."""
        return self._json("POST", path, json=body, timeout=_timeout(None if patient else ANSWER_S))

    def delete(self, path: str) -> dict[str, Any]:
        return self._json("DELETE", path)

    def find_agent(self, name: str) -> dict[str, Any] | None:
        """Get the agent; None if there is no agent of this name."""
        try:
            return self.get(agent_path(name))
        except Refused as error:
            if error.kind == UNKNOWN_AGENT:
                return None
            raise

    def upload(
        self, path: str, body: Iterator[bytes], num_bytes: int, **query: str
    ) -> dict[str, Any]:
        """Post a body of `num_bytes` as it comes."""
        headers = {"Content-Length": str(num_bytes), "Content-Type": "application/x-tar"}
        return self._json(
            "POST", path, content=body, headers=headers, params=query, timeout=_timeout(None)
        )

    @contextmanager
    def download(self, path: str) -> "Iterator[httpx.Response]":
        """Get a response whose body the caller reads."""
        with (
            self._explained(),
            self._http.stream("GET", path, timeout=_timeout(None)) as response,
        ):
            _check(response, self.url)
            yield response

    def events(self, path: str, body: Mapping[str, object]) -> Generator[ServerEvent, None, None]:
        """Post, and yield the events of the answer. Closing the iterator disconnects."""
        with (
            self._explained(),
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
        with self._explained():
            response = self._http.request(method, path, **options)
            _check(response, self.url)
        return _document(response.content, self.url)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn errors of the connection into NoServer, which says what to do."""
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
    """Write the path of an agent, or of an action on it."""
    return "/".join(["/v1/agents", quote(name, safe=""), *more])


def valid_name(name: str) -> str:
    """Check the name, as a callback of Typer's. Raises BadParameter."""
    from keepwarm.engine import requests

    try:
        return requests.valid_name(name)
    except InvalidRequest as error:
        raise typer.BadParameter(error.problem) from error


AgentName = Annotated[
    str, typer.Argument(metavar="NAME", callback=valid_name, help="The agent's name.")
]


# -- inside ----------------------------------------------------------------------------------------


def _base(url: str) -> str:
    """Take the address as people write it, perhaps with the `/v1` of OpenAI's clients."""
    try:
        parts = urlsplit(url)
        is_address = parts.scheme in {"http", "https"} and bool(parts.hostname)
        _ = parts.port
    except ValueError:
        is_address = False
    if not is_address:
        raise typer.BadParameter(
            f"{url!r} is not a server's address; write it like {DEFAULT_URL}", param_hint="--url"
        )
    return url.rstrip("/").removesuffix("/v1")


def _http_client(url: str) -> "httpx.Client":
    import httpx

    try:
        return httpx.Client(
            base_url=url,
            headers=_key_header(),
            timeout=_timeout(ANSWER_S),
            # Reading the certificates takes longer than most commands run.
            verify=url.startswith("https:"),
            # A proxy is for other machines.
            trust_env=urlsplit(url).hostname not in _LOOPBACK,
        )
    except httpx.InvalidURL as error:
        raise typer.BadParameter(
            f"{url!r} is not an address: {error}", param_hint="--url"
        ) from error


def _timeout(read_s: float | None) -> "httpx.Timeout":
    import httpx

    return httpx.Timeout(read_s, connect=CONNECT_S)


def _key_header() -> dict[str, str]:
    key = os.environ.get("KEEPWARM_API_KEY", "").strip()
    if not key:
        return {}
    if not key.isascii() or not key.isprintable():
        raise typer.BadParameter(
            "has characters that keys cannot have", param_hint="KEEPWARM_API_KEY"
        )
    return {"Authorization": f"Bearer {key}"}


def _check(response: "httpx.Response", url: str) -> None:
    """Raise Refused or NoServer unless the response is a success."""
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
    message = for_terminal(str(error.get("message", "it refused"))).rstrip(".")
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
    """Split at newlines only: httpx's own lines also end where a text has a U+2028."""
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line.decode().removesuffix("\r")
