"""Selections: read back what /select has answered, by id or name."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import Annotated

from fastapi import Query, Request, Response
from fastapi.responses import StreamingResponse
from gradstore.types import Explanations, Page, Rename, Selection
from gradstore.types import Request as RequestBody
from pydantic import ConfigDict, Field

from datastore.exports import uncalculated
from datastore.schema import SelectionRow
from service.dependencies import Backend, BackendDep, Paging, Reference
from service.files import wanted_type
from service.routing import noun

NDJSON = "application/x-ndjson"
CSV = "text/csv"

router = noun("selections")


@router.get("")
def list_selections(paging: Annotated[Paging, Query()], backend: BackendDep) -> Page[Selection]:
    """Selections, newest first, without their rows."""
    data, has_more = backend.answers.page(limit=paging.limit, after=paging.after)
    return Page[Selection](data=data, has_more=has_more)


@router.get("/{selection}")
def get_selection(
    selection: Reference,
    backend: BackendDep,
    limit: Annotated[int, Field(ge=0, le=10_000)] = 20,
    after: Annotated[int, Field(ge=0)] = 0,
) -> Selection:
    """A selection and a page of its rows: those after rank `after`."""
    return backend.answers.read(selection, limit=limit, after=after)


class ExplanationsWanted(RequestBody):
    """Which chosen rows are explained."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    limit: int = Field(10, ge=1, le=100)
    """How many at most."""
    after: int = Field(0, ge=0)
    """Rank after which the page begins: `next` of the page before."""
    origin: str | None = Field(None, max_length=4096)
    """Only rows of this origin."""
    q: str | None = Field(None, min_length=1, max_length=1000)
    """Only rows that hold this text, in any case of letters."""


@router.get("/{selection}/explanations")
def explain_selection(
    selection: Reference, wanted: Annotated[ExplanationsWanted, Query()], backend: BackendDep
) -> Explanations:
    """The chosen rows with their text, their score for every subtask, and the nearest validation example of each."""
    return backend.explaining.page(
        selection, after=wanted.after, limit=wanted.limit, origin=wanted.origin, text=wanted.q
    )


@router.patch("/{selection}")
def rename_selection(selection: Reference, body: Rename, backend: BackendDep) -> Selection:
    """Give a selection another name, or none."""
    return backend.answers.read(backend.catalog.rename(SelectionRow, selection, body.name), limit=0)


@router.delete("/{selection}", status_code=204)
def delete_selection(selection: Reference, backend: BackendDep) -> None:
    """Delete a selection that no fine-tune uses."""
    backend.answers.remove(selection)


@router.get("/{selection}/content", responses={200: {"content": {NDJSON: {}, CSV: {}}}}, response_class=Response)
def selection_content(selection: Reference, request: Request, backend: BackendDep) -> Response:
    """The original rows of a selection, best first; as `text/csv` their places and scores."""
    found = backend.answers.read(selection, limit=1)  # a row: that they are lost is told before an answer begins
    return as_csv(backend, found) if wanted_type(request, [NDJSON, CSV]) == CSV else as_ndjson(backend, found)


def as_ndjson(backend: Backend, selection: Selection) -> Response:
    """The chosen original rows, best first, one a line."""
    lines = (line + b"\n" for line in backend.answers.lines(selection.id))
    return _stream(lines, NDJSON, selection, "jsonl")


def as_csv(backend: Backend, selection: Selection) -> Response:
    """Where the chosen rows come from, and their scores: file, row, id and score, best first."""
    return _stream(_csv_lines(backend, selection), CSV, selection, "csv")


def _csv_lines(backend: Backend, selection: Selection) -> Iterator[bytes]:
    files = {id: _file_name(backend, id) for id in selection.recipe.datasets}
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(["file", "row", "id", "origin", "score", "task", "subtask"])
    for row in backend.answers.rows(selection.id):
        texts = (files[row.dataset], row.id, row.origin, row.task, row.subtask)
        file, id, origin, task, subtask = (text and uncalculated(text) for text in texts)
        writer.writerow([file, row.row, id, origin, repr(row.score), task, subtask])
        yield buffer.getvalue().encode()
        buffer.seek(0)
        buffer.truncate()


def _file_name(backend: Backend, dataset: str) -> str:
    """What a pool's user calls it: its name, else the file it was first uploaded from."""
    found = backend.catalog.dataset(dataset)
    return found.name or (found.sources[0].filename if found.sources else dataset)


def _stream(lines: Iterator[bytes], media_type: str, selection: Selection, suffix: str) -> Response:
    headers = {
        "Content-Disposition": f'attachment; filename="{selection.id}.{suffix}"',
        "Content-Location": f"/selections/{selection.id}",
    }
    return StreamingResponse(lines, media_type=media_type, headers=headers)
