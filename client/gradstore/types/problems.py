"""Errors, as RFC 9457 problems."""

from __future__ import annotations

from pydantic import Field

from gradstore.types.base import Body


class ProblemItem(Body):
    """One place where the input is wrong."""

    detail: str
    pointer: str | None = None
    """JSON pointer into the request body."""
    parameter: str | None = None
    """Name of the query, path or form parameter."""
    line: int | None = None
    """Line of the uploaded file, counted from 1."""


class Problem(Body):
    """An error as RFC 9457 `application/problem+json`; `detail` says what to do next."""

    type: str
    title: str
    status: int
    detail: str
    instance: str | None = None
    """The request's id (or the log's, for a failed job): quote it when asking for help."""
    errors: list[ProblemItem] = Field([])
    total_errors: int = 0
    """How many places are wrong; `errors` holds the first of them."""
