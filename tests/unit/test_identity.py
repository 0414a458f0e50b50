"""Whose request it is, in the ways in which clients say it."""

import json

import pytest

from keepwarm.core.errors import InvalidRequest
from keepwarm.server.edge.identity import agent_of, name_of, session_of

SESSION = "2a8f7c1e-53d4-4b6f-9a0c-1e2d3c4b5a69"
DEVICE = "d" * 64
CLAUDE_CODE = json.dumps({"device_id": DEVICE, "account_uuid": "", "session_id": SESSION})
HEADERS = {
    "x-agent-id": "explicit",
    "x-session-id": "first",
    "session-id": "second",
    "x-claude-code-session-id": "third",
}


def named(headers: dict[str, str], user_id: str | None = None) -> str | None:
    """Return the agent that a request over Anthropic's API names."""
    return agent_of(headers, session_of(user_id), user_id)


def test_the_order() -> None:
    left = dict(HEADERS)
    found = []
    for header in HEADERS:
        found.append(named(left, CLAUDE_CODE))
        del left[header]
    assert found == ["explicit", "first", "second", "third"]
    assert named(left, CLAUDE_CODE) == SESSION
    assert named(left, "somebody") == "somebody"
    assert named(left) is None


def test_the_session_of_an_older_claude_code() -> None:
    assert named({}, f"user_{DEVICE}_account__session_{SESSION}") == SESSION
    assert named({}, f"user_{DEVICE}_account_{SESSION}_session_{SESSION}") == SESSION


@pytest.mark.parametrize(
    "user_id",
    [
        "{}",
        "[]",
        '"text"',
        "{broken",
        '{"session_id": 7}',
        '{"session_id": ""}',
        '{"session_id": null}',
        "[" * 5_000,
        f"_session_{SESSION} ",
        "user",
    ],
)
def test_what_names_no_session_is_a_name_as_it_is(user_id: str) -> None:
    assert named({}, user_id) == name_of(user_id)


def test_a_session_that_is_no_name_gets_one() -> None:
    name = named({}, json.dumps({"session_id": "so long/and so odd"}))
    assert name is not None
    assert name.startswith("so-long-and-so-odd-")


def test_what_is_explicit_is_not_bent() -> None:
    with pytest.raises(InvalidRequest):
        named({"x-agent-id": "so odd"})
