"""Whether an answer is what the server's OpenAPI description says."""

from functools import cache
from typing import Any

import httpx
from fastapi import FastAPI
from fastapi.routing import APIRoute
from jsonschema import Draft202012Validator

from keepwarm.server.app import ROUTERS


@cache
def _api() -> tuple[list[APIRoute], dict[str, Any]]:
    """Return the routes in order, and their description, in which every field must be listed."""
    api = FastAPI()
    for router in ROUTERS:
        api.include_router(router)
    document = api.openapi()
    for schema in document["components"]["schemas"].values():
        if "properties" in schema:
            schema.setdefault("additionalProperties", False)
    routes = [route for router in ROUTERS for route in router.routes]
    return [route for route in routes if isinstance(route, APIRoute)], document


def check_described(response: httpx.Response) -> None:
    """Check a response, as one of `event_hooks`; streams and paths without a route are left out."""
    kind = response.headers.get("content-type", "")
    schema = _schema_of(response, kind.partition(";")[0])
    if schema is None or not kind.startswith("application/json"):
        return
    response.read()
    _, document = _api()
    Draft202012Validator({**schema, "components": document["components"]}).validate(response.json())


def _schema_of(response: httpx.Response, kind: str) -> dict[str, Any] | None:
    method, path = response.request.method, response.request.url.path
    routes, document = _api()
    for route in routes:
        if (
            method in (route.methods or ())
            and route.path_regex.match(path)
            and route.include_in_schema
        ):
            answers = document["paths"][route.path_format][method.lower()]["responses"]
            content = answers.get(str(response.status_code), answers["default"])["content"]
            assert kind in content, f"{method} {path} answers with {kind or 'nothing'}"
            schema: dict[str, Any] = content[kind].get("schema", {})
            return schema
    return None
