"""The API's description tells the truth: the OpenAPI document, and docs/api.md."""

from __future__ import annotations

import re
from typing import Any

import pytest
from gradstore import types
from pydantic import BaseModel, ConfigDict, TypeAdapter

from datastore import errors
from datastore.settings import Settings
from service import problems
from service.app import create_app
from tests.conftest import REPOSITORY
from tests.serving import Service

PAGE = (REPOSITORY / "docs" / "api.md").read_text()
EXAMPLES = re.findall(r"```json (request|answer) (\w+)\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The OpenAPI document."""
    return create_app(Settings(data=tmp_path_factory.mktemp("store"))).openapi()


def operations(document: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {
        (method.upper(), path): operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }


def test_the_served_document_is_the_apps(shared_service: Service, document: dict[str, Any]) -> None:
    assert shared_service.http.get("/openapi.json").json()["paths"] == document["paths"]


def test_every_route_is_on_the_page_and_no_other(document: dict[str, Any]) -> None:
    told = re.findall(r"^### `([A-Z]+) (\S+)`$", PAGE, re.MULTILINE)
    assert sorted(told) == sorted(operations(document))
    assert len(set(told)) == len(told)


@pytest.mark.parametrize(("direction", "model", "text"), EXAMPLES, ids=[f"{way} {name}" for way, name, _ in EXAMPLES])
def test_every_example_of_the_page_is_what_the_api_takes_or_gives(direction: str, model: str, text: str) -> None:
    kind: Any = getattr(types, model)
    TypeAdapter(kind).validate_json(text)
    if direction == "answer" and not model.endswith("Job"):
        strict = type(model, (kind,), {"model_config": ConfigDict(extra="forbid")})
        assert set(strict.model_fields) == set(strict.model_validate_json(text).model_dump(exclude_unset=True))


def test_every_route_that_takes_json_shows_a_body(document: dict[str, Any]) -> None:
    for (method, path), operation in operations(document).items():
        if "application/json" in operation.get("requestBody", {}).get("content", {}):
            section = PAGE.partition(f"### `{method} {path}`")[2].partition("\n### ")[0]
            assert "```json request" in section, (method, path)


def test_every_error_is_on_the_page(document: dict[str, Any]) -> None:
    def below(kind: type[Exception]) -> set[type[Exception]]:
        return {kind}.union(*(below(child) for child in kind.__subclasses__()))

    modules = {errors.__name__, problems.__name__}
    found = below(errors.GradstoreError) | below(problems.Refused)
    kinds = {kind for kind in found if kind.__module__ in modules} - {errors.GradstoreError, problems.Refused}
    names = {"-".join(re.findall("[A-Z][a-z]*", kind.__name__)).lower() for kind in kinds}
    assert names <= set(re.findall(r"`([a-z-]+)`", PAGE))


def test_every_error_has_a_status() -> None:
    def below(kind: type[Exception]) -> set[type[Exception]]:
        return set(kind.__subclasses__()).union(*(below(child) for child in kind.__subclasses__()))

    for kind in below(errors.GradstoreError) | below(problems.Refused):
        assert any(base in problems.STATUS for base in kind.__mro__), kind


def test_every_answer_has_a_schema_and_every_error_is_a_problem(document: dict[str, Any]) -> None:
    for where, operation in operations(document).items():
        for status, answer in operation["responses"].items():
            if int(status) >= 400:
                schema = answer.get("content", {}).get("application/problem+json", {}).get("schema")
                assert schema == {"$ref": "#/components/schemas/Problem"} or status == "416", (where, status)
            elif status == "200":
                assert answer.get("content"), where


def test_every_post_takes_an_idempotency_key(document: dict[str, Any]) -> None:
    for (method, path), operation in operations(document).items():
        headers = [parameter["name"] for parameter in operation.get("parameters", []) if parameter["in"] == "header"]
        assert headers == (["Idempotency-Key"] if method == "POST" else []), path


def test_every_reference_in_the_document_leads_somewhere(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]

    def references(node: Any) -> set[str]:
        if isinstance(node, dict):
            own = {node["$ref"]} if isinstance(node.get("$ref"), str) else set()
            return own.union(*(references(value) for value in node.values()))
        return set().union(*(references(value) for value in node)) if isinstance(node, list) else set()

    assert {reference.rpartition("/")[2] for reference in references(document)} <= set(schemas)
    assert "HTTPValidationError" not in schemas


def test_started_jobs_are_documented_with_their_headers(document: dict[str, Any]) -> None:
    for path in (
        "/gradients", "/finetunes", "/evaluations", "/validations", "/comparisons", "/predictors", "/cascades",
    ):  # fmt: skip
        assert set(document["paths"][path]["post"]["responses"]["202"]["headers"]) == {"Location", "Retry-After"}


def test_the_document_says_what_fields_mean(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    assert "longest stored dataset" in schemas["Dataset"]["properties"]["prefix"]["description"]
    assert "longest stored dataset" in schemas["UploadedDataset"]["properties"]["prefix"]["description"]
    form = document["paths"]["/datasets"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert "skip" in form["properties"]["on_error"]["description"]
    assert form["required"] == ["file"]


def test_models_of_requests_and_answers_are_in_the_document(document: dict[str, Any]) -> None:
    schemas = set(document["components"]["schemas"])
    requests = {
        name
        for name, kind in vars(types).items()
        if isinstance(kind, type) and issubclass(kind, types.Request) and kind is not types.Request
    }
    assert requests <= schemas
    assert issubclass(types.Problem, BaseModel)
    assert "Problem" in schemas


def test_status_codes_of_errors_stand_in_one_module() -> None:
    folder = REPOSITORY / "service"
    written = {
        path.relative_to(folder).as_posix(): numbers
        for path in folder.rglob("*.py")
        if (numbers := re.findall(r"status(?:_code)?=\s*([45]\d\d)", path.read_text()))
    }
    assert set(written) <= {"problems.py"}, written
