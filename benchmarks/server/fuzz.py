"""Requests made from the server's own description, right and wrong, and how it answers them.

An answer is right if it is no unstated 5xx, an error has its dialect's shape, a 400 names a field,
and the server is still there afterwards.
"""

import http.client
import json
import random
import string
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from benchmarks.server.wire import HOST
from keepwarm.bench.requiring import require

TIMEOUT_S = 30.0
STATED = frozenset({503, 504, 507})
"""Server errors that a client is promised: overload, time that has run out, a full disk."""
AGENTS = ("ada", "eve", "bob")
_MAX_DEPTH = 4
_ODD: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    1 << 70,
    1e308,
    0.5,
    "",
    " ",
    "\ud800",
    "a/b",
    "x" * 300,
    "<|im_end|>",
    [],
    {},
    [[]],
    {"\udfff": None},
)
_CONTENT_TYPES = ("text/plain", "application/x-www-form-urlencoded", "", "application/json;x")


@dataclass(slots=True)
class FuzzReport:
    """How often each status was answered, and what was wrong."""

    statuses: Counter[int] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Sent:
    """A request as it was made."""

    method: str
    path: str
    body: bytes | None
    headers: Mapping[str, str]

    def __str__(self) -> str:
        return f"{self.method} {self.path} {dict(self.headers)} {(self.body or b'')[:300]!r}"


class Maker:
    """Makes values of schemas: mostly right, sometimes not."""

    def __init__(self, description: Mapping[str, Any], rng: random.Random) -> None:
        self._schemas = description.get("components", {}).get("schemas", {})
        self._operations = [
            (method.upper(), path, operation)
            for path, methods in description["paths"].items()
            for method, operation in methods.items()
        ]
        self._rng = rng

    def request(self) -> Sent:
        """Make a request for any of the described operations."""
        method, template, operation = self._rng.choice(self._operations)
        path, query = template, []
        headers: dict[str, str] = {}
        for parameter in operation.get("parameters", ()):
            value = self._parameter(parameter)
            if parameter["in"] == "path":
                path = path.replace(f"{{{parameter['name']}}}", _quoted(value) or "-")
            elif self._rng.random() < 0.4 and parameter["in"] == "query":
                query.append(f"{parameter['name']}={_quoted(value)}")
            elif self._rng.random() < 0.3 and parameter["in"] == "header":
                headers[parameter["name"]] = _header_safe(value)
        body = self._body(operation)
        if body is not None:
            odd = self._rng.random() < 0.03
            kind = self._rng.choice(_CONTENT_TYPES) if odd else "application/json"
            headers["Content-Type"] = kind
        return Sent(method, path + ("?" + "&".join(query) if query else ""), body, headers)

    def _parameter(self, parameter: Mapping[str, Any]) -> str:
        if self._rng.random() < 0.6 and parameter["in"] == "path":
            return self._rng.choice(AGENTS)
        value = self.value(parameter.get("schema", {}))
        return value if isinstance(value, str) else json.dumps(value)

    def _body(self, operation: Mapping[str, Any]) -> bytes | None:
        content = operation.get("requestBody", {}).get("content", {})
        schema = content.get("application/json", {}).get("schema")
        if schema is None:
            return bytes(self._rng.randbytes(40)) if content else None
        data = json.dumps(self._bounded(self.value(schema))).encode()
        if self._rng.random() < 0.04:
            return data[: self._rng.randrange(len(data))]
        return data

    def _bounded(self, body: Any) -> Any:
        """Give the body the right model and a short reply, most of the time: or only errors would
        come.
        """
        if isinstance(body, dict):
            if "model" in body and self._rng.random() < 0.95:
                body["model"] = "fake"
            if body.get("max_tokens") is None or self._rng.random() < 0.9:
                body["max_tokens"] = self._rng.randrange(1, 6)
            for name in ("tools", "tool_choice", "functions", "function_call", "response_format"):
                if self._rng.random() < 0.8:
                    body.pop(name, None)
        return body

    def value(self, schema: Mapping[str, Any], depth: int = 0) -> Any:
        """Make a value of the schema, and now and then an odd one."""
        if self._rng.random() < 0.02:
            return self._rng.choice(_ODD)
        if "$ref" in schema:
            return self.value(self._schemas[schema["$ref"].rpartition("/")[2]], depth)
        for key in ("anyOf", "oneOf"):
            if key in schema:
                return self.value(self._rng.choice(schema[key]), depth)
        if "enum" in schema:
            return self._rng.choice(schema["enum"])
        if "const" in schema:
            return schema["const"]
        return self._of_type(schema, depth)

    def _of_type(self, schema: Mapping[str, Any], depth: int) -> Any:
        kind = schema.get("type")
        if kind == "object":
            return self._object(schema, depth)
        if kind == "array":
            most = 3 if depth < _MAX_DEPTH else 0
            least = min(schema.get("minItems", 0), 1)
            number = self._rng.randint(least, max(most, least))
            return [self.value(schema.get("items", {}), depth + 1) for _ in range(number)]
        if kind == "integer":
            low = int(schema.get("minimum", -2))
            return self._rng.randint(low, max(low, min(int(schema.get("maximum", 9)), 9)))
        if kind == "number":
            return self._rng.uniform(schema.get("minimum", -1.0), schema.get("maximum", 2.0))
        makers = {"boolean": lambda: self._rng.random() < 0.5, "null": lambda: None}
        return makers.get(kind or "", self._text)()

    def _object(self, schema: Mapping[str, Any], depth: int) -> dict[str, Any]:
        required = schema.get("required", ())
        made = {
            name: self.value(part, depth + 1)
            for name, part in schema.get("properties", {}).items()
            if self._rng.random() < (0.98 if name in required else 0.25)
        }
        if self._rng.random() < 0.05:
            made[self._text()] = self._rng.choice(_ODD)
        return made

    def _text(self) -> str:
        alphabet = string.ascii_letters + string.digits + " .-_:\n<|>é語\U0001f600\x00"
        return "".join(self._rng.choices(alphabet, k=self._rng.randrange(1, 24)))


class Fuzzer:
    """Sends what is made, on connections that are kept, and judges the answers."""

    def __init__(self, port: int, *, seed: int) -> None:
        self.report = FuzzReport()
        self._connection = http.client.HTTPConnection(HOST, port, timeout=TIMEOUT_S)
        description = json.loads(self._ask(Sent("GET", "/openapi.json", None, {}))[1])
        # A seed makes the same requests again, which is what it is for.
        self._maker = Maker(description, random.Random(seed))  # noqa: S311

    def run(self, number: int) -> FuzzReport:
        """Send `number` requests and judge the answers."""
        for _ in range(number):
            sent = self._maker.request()
            started = time.monotonic()
            try:
                status, body = self._ask(sent)
            except (OSError, http.client.HTTPException) as error:
                self._note(sent, f"broke off after {time.monotonic() - started:.1f} s: {error!r}")
                self._connection.close()
                continue
            self.report.statuses[status] += 1
            problem = _problem(status, body, sent)
            if problem is not None:
                self._note(sent, problem)
        status, _ = self._ask(Sent("GET", "/health", None, {}))
        require(status == 200, f"the server is not well after {number} requests: {status}")
        self._connection.close()
        return self.report

    def _ask(self, sent: Sent) -> tuple[int, bytes]:
        self._connection.request(sent.method, sent.path, body=sent.body, headers=dict(sent.headers))
        response = self._connection.getresponse()
        return response.status, response.read()

    def _note(self, sent: Sent, problem: str) -> None:
        self.report.problems.append(f"{problem}: {sent}")


def run_fuzz(port: int, number: int, *, seed: int) -> FuzzReport:
    """Send `number` requests to a server on the fake generator."""
    return Fuzzer(port, seed=seed).run(number)


def _problem(status: int, body: bytes, sent: Sent) -> str | None:
    if status >= 500 and status not in STATED:
        return f"{status} {body[:300]!r}"
    if status < 400:
        return None
    try:
        document = json.loads(body)
        error = document["error"]
        message = error["message"]
    except (ValueError, KeyError, TypeError):
        return f"{status} has no error in its body, but {body[:300]!r}"
    is_anthropic = document.get("type") == "error"
    if status == 400 and not is_anthropic and not error.get("param"):
        return f"400 names no field: {message}"
    return None


def _quoted(value: str) -> str:
    return quote(value.encode("utf-8", "surrogatepass"), safe="")


def _header_safe(value: str) -> str:
    return "".join(c for c in value if c.isascii() and c.isprintable()).strip()
