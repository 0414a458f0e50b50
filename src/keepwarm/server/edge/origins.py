"""Refuses hosts and web pages that are not allowed: a page must not use its visitor's server."""

import re
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import Scope

from keepwarm.server.problems import Kind, NotAllowed, Problem
from keepwarm.server.settings import LOOPBACK, ServerConfig

LOCAL_DOMAINS = (".localhost", ".internal")
"""Public DNS has no names in them, so no page can make one point here. Containers know their host
as `host.docker.internal`."""
OWN_SITES = frozenset({"same-origin", "none"})
"""Values of `Sec-Fetch-Site` for Keepwarm's own page, and for an address that was typed. A page on
another port of this machine sends `same-site`."""
QUIET_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})

_EXPORT = re.compile(r"/agents/[^/]+/+export/*")


class Origins:
    """Knows which hosts and pages are answered; the checks raise NotAllowed for all others."""

    def __init__(self, config: ServerConfig) -> None:
        self._takes_any_host = not config.is_loopback
        self._hosts = {_name_of(host) for host in config.allowed_hosts}
        self._pages = frozenset(config.allowed_origins)

    def check_host(self, headers: Headers) -> None:
        """Refuse unknown hosts: a page's own name may be made to point here (DNS rebinding)."""
        given = headers.getlist("host")
        host = _name_of(given[0]) if len(given) == 1 else ""
        if not host:
            problem = "a request must name its server in one Host header"
            raise NotAllowed(Problem(400, Kind.INVALID, problem, "Host"))
        if self._takes_any_host or host in self._hosts or _is_local(host):
            return
        problem = f"the Host {host!r} is not allowed; add it to server.allowed_hosts"
        raise NotAllowed(Problem(403, Kind.FORBIDDEN, problem))

    def check_page(self, scope: Scope, headers: Headers) -> None:
        """Refuse pages that are not allowed, also where they could not read the answer."""
        origin = headers.get("origin")
        if self._is_allowed(origin, headers.get("host", "")):
            return
        if origin is not None:
            problem = f"the origin {origin!r} is not allowed; add it to server.allowed_origins"
            raise NotAllowed(Problem(403, Kind.FORBIDDEN, problem))
        site = headers.get("sec-fetch-site", "none")
        if site not in OWN_SITES and _does_work(scope):
            problem = "another page sent this, and its browser does not say which"
            raise NotAllowed(Problem(403, Kind.FORBIDDEN, problem))

    def _is_allowed(self, origin: str | None, host: str) -> bool:
        if "*" in self._pages:
            return True
        return origin is not None and (
            origin in self._pages or origin.partition("://")[2] == host != ""
        )


def _is_local(host: str) -> bool:
    return host in LOOPBACK or host.endswith(LOCAL_DOMAINS)


def _does_work(scope: Scope) -> bool:
    """Whether the request changes something, or costs more than a look."""
    return scope["method"] not in QUIET_METHODS or bool(_EXPORT.search(scope["path"]))


def _name_of(host: str) -> str:
    """Return the host without its port and DNS's final dot; empty where it is not a name."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
    return name.removesuffix(".")
