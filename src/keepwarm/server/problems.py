"""Errors as clients are told of them: status, kind and message, for every dialect to write."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from keepwarm.core.errors import (
    AgentBusy,
    AgentExists,
    BadBundle,
    DamagedAgent,
    DeadlineExceeded,
    DeletionRefused,
    EngineBroke,
    EngineStopped,
    GeneratorFailed,
    InvalidRequest,
    KeepwarmError,
    KeyReused,
    ModelLoadError,
    ModelNotLoaded,
    ModelTooLarge,
    ModelUnavailable,
    NoAgentStore,
    NoRoomForModel,
    OtherWeights,
    PoolExhausted,
    PromptTooLong,
    QueueFull,
    QueueTimeout,
    RequestBroke,
    UnknownAgent,
    UnknownModel,
    VerifyInterrupted,
)


class Kind(StrEnum):
    """The kind of a problem, by which a client decides what to do."""

    INVALID = "invalid_request"
    UNSUPPORTED = "unsupported"
    TOO_LONG = "context_too_long"
    NEVER_FITS = "never_fits"
    UNAUTHENTICATED = "unauthenticated"
    FORBIDDEN = "forbidden"
    NOT_FOUND = "not_found"
    EXISTS = "agent_exists"
    BUSY = "agent_busy"
    CONFLICT = "conflict"
    TOO_LARGE = "request_too_large"
    RATE_LIMITED = "rate_limited"
    QUEUE_FULL = "queue_full"
    OVERLOADED = "overloaded"
    MODEL_UNAVAILABLE = "model_unavailable"
    TIMEOUT = "timeout"
    STORAGE = "storage_refused"
    DAMAGED = "agent_damaged"
    INTERNAL = "internal_error"


@dataclass(frozen=True, slots=True)
class Problem:
    """An error as dialects write it; `param` names the field that is wrong."""

    status: int
    kind: Kind
    message: str
    param: str | None = None
    retry_after_s: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


class Unsupported(InvalidRequest):
    """The request needs something that this server cannot do."""


class TransferFailed(KeepwarmError):
    """The server's disk stood in the way of an export or an import."""

    def __init__(self, problem: str) -> None:
        super().__init__(f"the agent could not be written or read: {problem}")


class NotAllowed(KeepwarmError):
    """The request was refused before it was read: its key, its Host, its size, its rate."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.message)
        self.problem = problem


_STATUS: tuple[tuple[type[Exception], int, Kind], ...] = (
    (Unsupported, 400, Kind.UNSUPPORTED),
    (PromptTooLong, 400, Kind.TOO_LONG),
    (InvalidRequest, 400, Kind.INVALID),
    (UnknownAgent, 404, Kind.NOT_FOUND),
    (UnknownModel, 404, Kind.NOT_FOUND),
    (AgentExists, 409, Kind.EXISTS),
    (AgentBusy, 409, Kind.BUSY),
    (VerifyInterrupted, 409, Kind.BUSY),
    (KeyReused, 409, Kind.CONFLICT),
    (OtherWeights, 409, Kind.CONFLICT),
    (ModelNotLoaded, 409, Kind.CONFLICT),
    (NoRoomForModel, 503, Kind.MODEL_UNAVAILABLE),
    (ModelTooLarge, 400, Kind.NEVER_FITS),
    (ModelUnavailable, 503, Kind.MODEL_UNAVAILABLE),
    (ModelLoadError, 503, Kind.MODEL_UNAVAILABLE),
    (QueueFull, 429, Kind.QUEUE_FULL),
    (QueueTimeout, 503, Kind.OVERLOADED),
    (PoolExhausted, 503, Kind.OVERLOADED),
    (EngineStopped, 503, Kind.OVERLOADED),
    (EngineBroke, 503, Kind.OVERLOADED),
    (DeadlineExceeded, 504, Kind.TIMEOUT),
    (BadBundle, 400, Kind.INVALID),
    (NoAgentStore, 400, Kind.UNSUPPORTED),
    (TransferFailed, 507, Kind.INTERNAL),
    (DeletionRefused, 507, Kind.STORAGE),
    (DamagedAgent, 410, Kind.DAMAGED),
    (GeneratorFailed, 500, Kind.INTERNAL),
    (RequestBroke, 500, Kind.INTERNAL),
)
_RETRY_AFTER_S = {
    Kind.QUEUE_FULL: 2,
    Kind.OVERLOADED: 5,
    Kind.BUSY: 1,
    Kind.MODEL_UNAVAILABLE: 30,
}
_NO_SUCH_PATH = (
    "nothing is served at this path; OpenAI's clients want /v1 as their base (their chats are at "
    "/v1/chat/completions), Anthropic's the server itself (/v1/messages); /docs shows every path"
)
_KIND_OF_STATUS = {401: Kind.UNAUTHENTICATED, 403: Kind.FORBIDDEN, 404: Kind.NOT_FOUND}


def problem_of(error: Exception) -> Problem:
    """Say what a client is told whose request ended with this error."""
    problem = _problem_of(error)
    param = None if problem.param is None else _encodable(problem.param)
    return replace(problem, message=_encodable(problem.message), param=param)


def _problem_of(error: Exception) -> Problem:
    if isinstance(error, NotAllowed):
        return error.problem
    if isinstance(error, RequestValidationError):
        return _of_validation(error)
    if isinstance(error, HTTPException):
        return _of_http(error)
    if isinstance(error, ClientDisconnect):
        return Problem(400, Kind.INVALID, "the body broke off", "body")
    for error_type, status, kind in _STATUS:
        if isinstance(error, error_type):
            param = error.field if isinstance(error, InvalidRequest) else None
            retry_after_s = _RETRY_AFTER_S.get(kind)
            if isinstance(error, ModelUnavailable):
                retry_after_s = max(math.ceil(error.retry_s), 1)
            return Problem(status, kind, str(error), param, retry_after_s)
    # Starlette raises any other error again, and uvicorn logs it and closes the connection.
    headers = {"Connection": "close"}
    message = "an error inside the server; its log has the details"
    return Problem(500, Kind.INTERNAL, message, headers=headers)


def _of_http(error: HTTPException) -> Problem:
    """Describe the framework's own errors: an unknown path, a wrong method, an unreadable body."""
    if isinstance(error.__cause__, KeepwarmError):  # it was raised while the body was read
        return _problem_of(error.__cause__)
    kind = _KIND_OF_STATUS.get(error.status_code, Kind.INVALID)
    param = "body" if error.status_code == 400 else None
    message = _NO_SUCH_PATH if error.status_code == 404 else str(error.detail)
    return Problem(error.status_code, kind, message, param, headers=dict(error.headers or {}))


def _of_validation(error: RequestValidationError) -> Problem:
    """Describe the first field that is wrong, by its path in the body."""
    first = error.errors()[0]
    where, *path = (str(part) for part in first["loc"])
    if first["type"] == "json_invalid":
        return Problem(400, Kind.INVALID, f"the body is not JSON: {first['ctx']['error']}", "body")
    param = ".".join(path) or where
    return Problem(400, Kind.INVALID, f"{param}: {first['msg']}", param)


def _encodable(text: str) -> str:
    """Escape half surrogate pairs, which clients may send and messages may quote."""
    return text.encode("utf-8", "backslashreplace").decode()
