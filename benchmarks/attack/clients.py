"""A client that changes agents of its own, and knows what each of them must be.

It creates, talks, forks, rolls back, changes settings, imports and deletes, one after the other.
"""

import http.client
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Self

from benchmarks.server.wire import HOST
from keepwarm.bench.requiring import require

ANSWER_S = 60.0
MAX_AGENTS = 8
"""How many agents a client has before it deletes one instead of creating another."""
SETTINGS = ("system", "priority", "pinned", "quota_bytes", "overflow")

Document = dict[str, Any]
Turns = tuple[tuple[str, ...], ...]
"""What was said in each turn, message after message."""


@dataclass(frozen=True, slots=True)
class Known:
    """An agent as answers have described it."""

    settings: tuple[Any, ...]
    turns: Turns = ()


@dataclass(frozen=True, slots=True)
class Change:
    """A request for a change.

    `allows` says what it may have made of its agent when it was not answered, `acknowledge` takes
    its answer.
    """

    kind: str
    name: str
    method: str
    path: str
    body: Document | bytes | None
    allows: Callable[[Known | None], bool]
    acknowledge: Callable[[Document], None]


class Asker:
    """One connection to the server. Raises OSError and HTTPException when the server is gone."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection(HOST, port, timeout=ANSWER_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def __call__(self, method: str, path: str, body: Document | bytes | None = None) -> Document:
        document: Document = json.loads(self.raw(method, path, body))
        return document

    def raw(self, method: str, path: str, body: Document | bytes | None = None) -> bytes:
        """Return the answer's body. Raises PathNotTaken for one that is not 2xx."""
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        kind = "application/x-tar" if isinstance(body, bytes) else "application/json"
        self._connection.request(method, path, data, {"Content-Type": kind} if data else {})
        answer = self._connection.getresponse()
        content = answer.read()
        require(200 <= answer.status < 300, f"{method} {path}: {answer.status} {content[:300]!r}")
        return content

    def look(self, name: str) -> Known:
        """Return the agent as the server has it."""
        settings = settings_of(self("GET", agent_path(name)))
        rows = self("GET", agent_path(name, "turns"))["turns"]
        turns = tuple(tuple(str(m["content"]) for m in row["messages"]) for row in rows)
        return Known(settings, turns)


class Client:
    """A client whose agents' names begin with its own. Belongs to one thread at a time."""

    def __init__(self, name: str, seed: int) -> None:
        self.name = name
        self.bundle = b""
        self.bundled = Known(())
        self.pending: Change | None = None
        self._rng = random.Random(seed)  # noqa: S311 - for reproduction, not for secrets
        self._known: dict[str, Known] = {}
        self._gone: set[str] = set()
        self._number = 0

    def __repr__(self) -> str:
        return f"Client({self.name!r}, {len(self._known)} agents)"

    # -- what is known ---------------------------------------------------------------------------

    def names(self, present: set[str]) -> list[str]:
        """Return the names of its agents: those that it knows, those that are gone, and those that
        are there.
        """
        pending = {self.pending.name} if self.pending is not None else set()
        there = {name for name in present if name.startswith(f"{self.name}-")}
        return sorted(self._known.keys() | self._gone | pending | there)

    def problem_with(self, name: str, actual: Known | None) -> str:
        """Return why `actual` is not what was acknowledged; empty where it is."""
        expected = self._known.get(name)
        if actual == expected:
            return ""
        if self.pending is not None and self.pending.name == name and self.pending.allows(actual):
            return ""
        return f"{name} is {actual}, and was acknowledged as {expected}"

    def go_on_with(self, name: str, actual: Known | None) -> None:
        """Take `actual` for what the agent is now."""
        self._known.pop(name, None)
        if actual is not None:
            self._known[name] = actual

    # -- changes ---------------------------------------------------------------------------------

    def choose(self) -> Change:
        """Draw the next change of one of its agents."""
        makers = [self._create, self._import]
        if len(self._known) >= MAX_AGENTS:
            makers = [self._delete]
        elif self._known:
            makers += [self._message, self._message, self._settings]
            makers += [self._rollback, self._fork, self._delete]
        return self._rng.choice(makers)()

    def _new_name(self) -> str:
        self._number += 1
        return f"{self.name}-{self._number}"

    def _any(self) -> str:
        return self._rng.choice(sorted(self._known))

    def _some_settings(self) -> Document:
        return {
            "priority": self._rng.randint(-100, 100),
            "pinned": self._rng.random() < 0.2,
            "overflow": self._rng.choice(("error", "drop_oldest")),
        }

    def _some_turns(self, name: str) -> Turns:
        """Draw how many of the agent's first turns are kept, and return those."""
        turns = self._known[name].turns
        return turns[: self._rng.randint(0, len(turns))]

    def _keep(self, name: str, document: Document, turns: Turns) -> None:
        self._known[name] = Known(settings_of(document), turns)

    def _create(self) -> Change:
        name = self._new_name()
        body = {"system": f"You are {name}.", **self._some_settings()}

        def allows(actual: Known | None) -> bool:
            return actual is None or not actual.turns

        def acknowledge(document: Document) -> None:
            self._keep(name, document, ())

        return Change("create", name, "PUT", agent_path(name), body, allows, acknowledge)

    def _settings(self) -> Change:
        name, body = self._any(), self._some_settings()
        turns = self._known[name].turns

        def allows(actual: Known | None) -> bool:
            return actual is not None and actual.turns == turns

        def acknowledge(document: Document) -> None:
            self._keep(name, document, turns)

        return Change("settings", name, "PUT", agent_path(name), body, allows, acknowledge)

    def _message(self) -> Change:
        name = self._any()
        before = self._known[name]
        said = f"{self._rng.getrandbits(32):x} " * self._rng.choice((1, 5, 60))
        opening = (before.settings[0],) if not before.turns and before.settings[0] else ()

        def allows(actual: Known | None) -> bool:
            if actual is None or actual.settings != before.settings:
                return False
            *earlier, (*new, _) = actual.turns or ((),)
            return (tuple(earlier), tuple(new)) == (before.turns, (*opening, said))

        def acknowledge(document: Document) -> None:
            turn = (*opening, said, str(document["message"]["content"]))
            self._known[name] = replace(before, turns=(*before.turns, turn))

        path, body = agent_path(name, "messages"), message(said)
        return Change("turn", name, "POST", path, body, allows, acknowledge)

    def _rollback(self) -> Change:
        name = self._any()
        kept = self._some_turns(name)

        def allows(actual: Known | None) -> bool:
            return actual is not None and actual.turns == kept

        def acknowledge(document: Document) -> None:
            self._keep(name, document, kept)

        path, body = agent_path(name, "rollback"), {"turn": len(kept)}
        return Change("rollback", name, "POST", path, body, allows, acknowledge)

    def _fork(self) -> Change:
        name, new = self._any(), self._new_name()
        kept = self._some_turns(name)

        def allows(actual: Known | None) -> bool:
            return actual is None or actual.turns == kept

        def acknowledge(document: Document) -> None:
            self._keep(new, document, kept)

        path, body = agent_path(name, "fork"), {"new_id": new, "at_turn": len(kept)}
        return Change("fork", new, "POST", path, body, allows, acknowledge)

    def _delete(self) -> Change:
        name = self._any()

        def allows(actual: Known | None) -> bool:
            return actual is None

        def acknowledge(_: Document) -> None:
            del self._known[name]
            self._gone.add(name)

        return Change("delete", name, "DELETE", agent_path(name), None, allows, acknowledge)

    def _import(self) -> Change:
        name = self._new_name()

        def allows(actual: Known | None) -> bool:
            return actual in (None, self.bundled)

        def acknowledge(_: Document) -> None:
            self._known[name] = self.bundled

        path = f"/v1/agents/import?id={name}"
        return Change("import", name, "POST", path, self.bundle, allows, acknowledge)


def agent_path(name: str, *more: str) -> str:
    return "/".join(("/v1/agents", name, *more))


def message(content: str) -> Document:
    return {"content": content, "max_tokens": 6, "temperature": 0}


def settings_of(document: Document) -> tuple[Any, ...]:
    """Return the settings in an agent's document."""
    return tuple(document[name] for name in SETTINGS)
