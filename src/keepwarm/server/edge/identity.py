"""Finds the agent that a standard client means, in whichever header or field it names it."""

import hashlib
import json
import re
from collections.abc import Mapping

from keepwarm.engine.requests import NAME, valid_name

EXPLICIT = "x-agent-id"
SESSION_HEADERS = ("x-session-id", "session-id", "session_id", "x-claude-code-session-id")

_MAX_READABLE = 96
_SESSION_AT_END = re.compile(r"_session_([0-9a-f-]{36})")


def agent_of(headers: Mapping[str, str], *fields: object) -> str | None:
    """Find the agent's name in the header `X-Agent-ID`, else a session's header, else in `fields`.

    `X-Agent-ID` must be a valid name; any other text is turned into one. None: there is no name.
    Raises InvalidRequest.
    """
    explicit = headers.get(EXPLICIT)
    if explicit is not None:
        return valid_name(explicit)
    named = (*(headers.get(name) for name in SESSION_HEADERS), *fields)
    return next((name_of(value) for value in named if isinstance(value, str) and value), None)


def session_of(user_id: str | None) -> str | None:
    """Find the session that Claude Code names in `metadata.user_id`, beside device and account.

    Newer versions send JSON with a `session_id`, older ones a string that ends with the session.
    """
    if user_id is None:
        return None
    found = _SESSION_AT_END.search(user_id[-64:])
    if found is not None and user_id.endswith(found[0]):
        return found[1]
    try:
        named = json.loads(user_id)
    except (ValueError, RecursionError):
        return None
    session = named.get("session_id") if isinstance(named, dict) else None
    return session if isinstance(session, str) else None


def name_of(value: str) -> str:
    """Return the value where it is a valid name, else a readable name with the value's digest."""
    if re.fullmatch(NAME, value):
        return value
    readable = re.sub(r"[^A-Za-z0-9._:@+-]+", "-", value).strip("-._:@+")[:_MAX_READABLE]
    digest = hashlib.sha256(value.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    return f"{readable or 'agent'}-{digest}"
