"""From the engine's events to Anthropic's, and problems as its clients know them."""

import msgspec

from keepwarm.server.problems import Kind, Problem

_TYPES = {
    Kind.UNAUTHENTICATED: "authentication_error",
    Kind.FORBIDDEN: "permission_error",
    Kind.NOT_FOUND: "not_found_error",
    Kind.TOO_LARGE: "request_too_large",
    Kind.RATE_LIMITED: "rate_limit_error",
    Kind.QUEUE_FULL: "rate_limit_error",
    Kind.OVERLOADED: "overloaded_error",
    Kind.TIMEOUT: "timeout_error",
    Kind.INTERNAL: "api_error",
}


def error_body(problem: Problem, request_id: str) -> bytes:
    error = {
        "type": _TYPES.get(problem.kind, "invalid_request_error"),
        "message": problem.message,
    }
    return msgspec.json.encode({"type": "error", "error": error, "request_id": request_id})
