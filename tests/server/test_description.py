"""`/openapi.json`: it says what is answered. All tests' clients compare, see `check_described`."""

from pathlib import Path

import httpx
import pytest
from jsonschema import ValidationError

from description import check_described
from servers import fake_server


def test_every_answer_has_a_shape(tmp_path: Path) -> None:
    with fake_server(tmp_path) as server, server.client() as client:
        document = client.get("/openapi.json").json()
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            answers = operation["responses"]
            assert "422" not in answers, f"{method} {path}: a wrong body is a 400 here"
            for status, answer in answers.items():
                assert answer["description"]
                for kind, content in answer["content"].items():
                    assert content["schema"], f"{method} {path}: {status} {kind}"


def answer_to(method: str, path: str, **answer: object) -> httpx.Response:
    request = httpx.Request(method, f"http://localhost{path}")
    return httpx.Response(**answer, request=request)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "document",
    [
        {"id": "ada", "deleted": True, "more": 1},
        {"id": "ada", "deleted": "yes"},
        {"id": None, "deleted": True},
        [],
    ],
)
def test_what_is_not_described_is_found(document: object) -> None:
    right = {"id": "ada", "deleted": True}
    check_described(answer_to("DELETE", "/v1/agents/ada", status_code=200, json=right))
    with pytest.raises(ValidationError):
        check_described(answer_to("DELETE", "/v1/agents/ada", status_code=200, json=document))
    with pytest.raises(ValidationError):
        check_described(answer_to("DELETE", "/v1/agents/ada", status_code=404, json=right))
    with pytest.raises(AssertionError):
        check_described(answer_to("DELETE", "/v1/agents/ada", status_code=200, text="gone"))
