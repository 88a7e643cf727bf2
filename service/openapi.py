"""The OpenAPI document: FastAPI's, with the answers that every route can give."""

from __future__ import annotations

import ast
import inspect
import textwrap
from http import HTTPStatus
from itertools import pairwise
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from gradstore import types
from gradstore.types import (
    AdapterRegister,
    AnnotationRequest,
    CheckpointRegister,
    ImportRequest,
    Problem,
    StreamRequest,
    TaskRegister,
)
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from service import forms, problems
from service.idempotency import HEADER

DESCRIPTION = "Computes the gradient of every training example once, keeps it, and answers which examples help a task."
BEYOND_FASTAPI: tuple[type[BaseModel], ...] = (
    *(Problem, TaskRegister, CheckpointRegister, AdapterRegister, ImportRequest),
    *(AnnotationRequest, StreamRequest),
)
"""Models that routes name by hand."""

CONFLICTING = {
    "/select", "/scores", "/checkpoints/{reference}/content", "/finetunes/{reference}/content",
    "/gradients/{reference}/rows", "/gradients/{reference}/features", "/jobs/{reference}",
    "/annotations/{reference}/rows", "/scores/distribution", "/overlaps", "/selections/{selection}/explanations",
}  # fmt: skip
"""Paths whose GET can answer 409."""


def starting(job: Any, *, dry_run: bool = False, estimate: Any = types.Estimate) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that answers 202 with a job of this kind, and a dry run with an estimate."""
    finished = "The same job has finished before"
    return {
        200: {
            "model": job | estimate if dry_run else job,
            "description": f"{finished}; or, with `dry_run`, what it would cost." if dry_run else f"{finished}.",
        },
        202: {
            "description": "The job has been started, or is at work.",
            "headers": {
                "Location": {"description": "The job.", "schema": {"type": "string"}},
                "Retry-After": {"description": "Seconds until it is worth asking.", "schema": {"type": "integer"}},
            },
        },
    }


def document(app: FastAPI) -> dict[str, Any]:
    """The document, made once."""
    if app.openapi_schema is None:
        schema = get_openapi(title="gradstore", version=app.version, description=DESCRIPTION, routes=app.routes)
        _, definitions = models_json_schema(
            [(model, "validation") for model in BEYOND_FASTAPI], ref_template="#/components/schemas/{model}"
        )
        components = schema.setdefault("components", {})
        components["schemas"] = definitions["$defs"] | components.get("schemas", {})
        for unused in ("HTTPValidationError", "ValidationError"):
            components["schemas"].pop(unused, None)
        for name, model_schema in components["schemas"].items():
            _describe(model_schema, getattr(types, name.partition("_")[0], None))
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        schema["security"] = [{}, {"key": []}]
        for path, operations in schema["paths"].items():
            for method, operation in operations.items():
                _complete(operation, path=path, method=method)
        app.openapi_schema = schema
    return app.openapi_schema


def upload(fields: type[BaseModel], *, file: str, also_json: type[BaseModel] | None = None) -> dict[str, Any]:
    """The `openapi_extra` of a route that takes a form with files called `file`, or a JSON body instead."""
    schema = fields.model_json_schema()
    _describe(schema, fields)
    binary = {"type": "string", "contentMediaType": "application/octet-stream"}
    many = {"type": "array", "items": binary, "minItems": 1}
    schema["properties"] = {file: many if file.endswith("s") else binary, **schema["properties"]}
    schema["required"] = [file, *schema.get("required", [])]
    content: dict[str, Any] = {forms.MEDIA_TYPE: {"schema": schema}}
    if also_json is not None:
        content["application/json"] = {"schema": {"$ref": f"#/components/schemas/{also_json.__name__}"}}
    return {"requestBody": {"required": True, "content": content}}


def _complete(operation: dict[str, Any], *, path: str, method: str) -> None:
    """Add the problems a route can answer with, and the header that every POST takes."""
    statuses = {400, 401, 403, 404, 422, 429, 500, 503}
    if "requestBody" in operation:
        statuses |= {413, 415}
    if method != "get" or path in CONFLICTING:
        statuses.add(409)
    if method == "post":
        statuses.add(507)
        operation.setdefault("parameters", []).append(
            {
                "name": HEADER,
                "in": "header",
                "required": False,
                "description": "A text of your own: sent again with it, the request gets its first answer.",
                "schema": {"type": "string", "minLength": 1, "maxLength": 255},
            }
        )
    answers = operation.setdefault("responses", {})
    answers.pop("422", None)
    for status in sorted(statuses):
        problem = {
            "description": HTTPStatus(status).phrase,
            "content": {problems.MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
        }
        answers.setdefault(str(status), problem)


def _describe(schema: dict[str, Any], model: object) -> None:
    """Put the docstrings that stand below a model's fields into its schema.

    pydantic can do so too, when a model is defined; that would cost every import of the client 30 ms.
    """
    if not (isinstance(model, type) and issubclass(model, BaseModel)):
        return
    for base in reversed(model.__mro__):
        if issubclass(base, BaseModel) and base is not BaseModel:
            for name, text in _docstrings(base).items():
                schema.get("properties", {}).get(name, {}).setdefault("description", text)


def _docstrings(model: type[BaseModel]) -> dict[str, str]:
    if "[" in model.__name__:  # a generic with its parameters has no source of its own
        return {}
    body = ast.parse(textwrap.dedent(inspect.getsource(model))).body[0]
    found = {}
    for field, text in pairwise(getattr(body, "body", [])):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
            found[field.target.id] = inspect.cleandoc(ast.literal_eval(text.value))
    return found
