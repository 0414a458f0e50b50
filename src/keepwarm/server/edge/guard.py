"""Checks every request before it is read: its id, its host and page, its key, its rate, its size.

Plain ASGI: Starlette's own middleware would put a queue between a stream and its client.
"""

import logging
import math
import re
import secrets
import time
from collections.abc import Callable
from contextvars import ContextVar

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from keepwarm.server.edge.body import BoundedBody, too_large
from keepwarm.server.edge.decoding import readable
from keepwarm.server.edge.keys import ANONYMOUS, OWNER, Keyring
from keepwarm.server.edge.origins import Origins
from keepwarm.server.edge.rate import RateLimit
from keepwarm.server.edge.scope_keys import REQUEST_ID, ROLE
from keepwarm.server.problems import Kind, NotAllowed, Problem
from keepwarm.server.settings import ServerConfig

request_id_of_context: ContextVar[str] = ContextVar("request_id", default="")

HEALTH_PATHS = frozenset({"/health", "/health/live", "/health/ready"})
DOCS_FOLDER = "/docs-files"
DOCS_FILES = (f"{DOCS_FOLDER}/swagger-ui-bundle.js", f"{DOCS_FOLDER}/swagger-ui.css")
OPEN_PATHS = HEALTH_PATHS | {"/", "/docs", *DOCS_FILES, "/openapi.json", "/favicon.ico"}
"""Paths that are answered without a key: they show nothing of any agent."""
POLLED_PATHS = HEALTH_PATHS | {"/metrics", "/v1/stats"}
"""Paths that monitors poll; their log lines have the level DEBUG."""
IMPORT_ROUTE = ("POST", "/v1/agents/import")
"""The only route whose body goes to the disk, and may be larger than memory."""

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_access = logging.getLogger("keepwarm.access")


class Guard:
    """Wraps the whole application.

    `refuse` writes a problem in the dialect of the request's path. `observe` is called with the
    route, the status and the seconds of every request.
    """

    def __init__(
        self,
        app: ASGIApp,
        config: ServerConfig,
        *,
        refuse: Callable[[Scope, Problem], Response],
        observe: Callable[[str, int, float], None],
    ) -> None:
        self._app = app
        self._config = config
        self._refuse = refuse
        self._observe = observe
        self._origins = Origins(config)
        self._keyring = Keyring(config)
        self._limit = RateLimit(config.rate_per_minute) if config.rate_per_minute else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["method"] == "HEAD":
            # HEAD is answered like GET; uvicorn, which keeps the original scope, sends no body.
            scope = {**scope, "method": "GET"}
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"
        scope[REQUEST_ID] = request_id
        request_id_of_context.set(request_id)
        watched = _Watched(send, request_id)
        started = time.perf_counter()
        try:
            await self._let_in(scope, headers, receive, watched)
        except NotAllowed as error:
            await self._refuse(scope, error.problem)(scope, receive, watched)
        finally:
            self._note(scope, watched.status, time.perf_counter() - started)

    async def _let_in(self, scope: Scope, headers: Headers, receive: Receive, send: Send) -> None:
        if scope["path"] not in HEALTH_PATHS:
            self._origins.check_host(headers)
        self._origins.check_page(scope, headers)
        client = self._check_key(scope, headers)
        self._check_rate(scope, client)
        limit = self._limit_of_body(scope)
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > limit:
            raise NotAllowed(too_large(limit))
        body = BoundedBody(receive, max_bytes=limit, patience_s=self._config.body_timeout_s)
        await self._app(scope, readable(scope, body, max_bytes=limit), send)

    def _check_key(self, scope: Scope, headers: Headers) -> str:
        """Set the caller's role in the scope; returns the name that its rate is counted under."""
        address = scope["client"][0] if scope.get("client") else ""
        scope[ROLE] = ANONYMOUS if self._keyring else OWNER
        if not self._keyring or scope["path"] in OPEN_PATHS:
            return address
        role = self._keyring.role_of(headers)
        if role is None:
            self._check_rate(scope, f"guesses:{address}")
            message = "no valid API key; send it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'"
            raise NotAllowed(Problem(401, Kind.UNAUTHENTICATED, message))
        scope[ROLE] = role
        return f"key:{role.namespace}"

    def _check_rate(self, scope: Scope, client: str) -> None:
        if self._limit is None or scope["path"] in OPEN_PATHS:
            return
        wait_s = self._limit.wait_s(client)
        if wait_s > 0.0:
            message = f"more than {self._limit.per_minute} requests in a minute"
            retry_after_s = math.ceil(wait_s)
            raise NotAllowed(Problem(429, Kind.RATE_LIMITED, message, retry_after_s=retry_after_s))

    def _limit_of_body(self, scope: Scope) -> int:
        is_import = (scope["method"], scope["path"]) == IMPORT_ROUTE
        return self._config.max_import_bytes if is_import else self._config.max_body_bytes

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "other")
        self._observe(route, status, seconds)
        level = logging.DEBUG if scope["path"] in POLLED_PATHS else logging.INFO
        facts = (scope["method"], scope["path"], status, 1e3 * seconds)
        _access.log(level, "%s %s %d %.1f ms", *facts)


class _Watched:
    """Passes messages on to the client, adds the request's id, and remembers the status."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self._request_id = request_id
        self.status = 499
        """499 until an answer begins: the client disconnected before it."""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["X-Request-ID"] = self._request_id
            headers["request-id"] = self._request_id  # by this name Anthropic's clients read it
            headers["X-Content-Type-Options"] = "nosniff"
        await self._send(message)
