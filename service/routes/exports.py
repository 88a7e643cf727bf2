"""Exports: a selection's rows in the formats of tables and of trainers, its provenance card, and features as arrays."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator
from functools import partial
from typing import Annotated, Literal

from fastapi import Query, Request, Response
from fastapi.responses import StreamingResponse
from gradstore.types import ExportFormat, Provenance, Selection, Trainer
from gradstore.types import Request as RequestBody
from pydantic import Field
from starlette.responses import Content
from starlette.types import Send

from datastore import exports, feature_files, training_files
from datastore.provenance import card
from service import zips
from service.dependencies import Backend, BackendDep, Reference
from service.files import NPY, PARQUET, SAFETENSORS, ArrayQuery, array, tag, wanted_type
from service.routes.selections import CSV, NDJSON
from service.routing import Router

ZIP = "application/zip"
MARKDOWN = "text/markdown"
READ = 1 << 20  # bytes of a stored file at a time
MEDIA_TYPES: dict[str, str] = {"jsonl": NDJSON, "csv": CSV, "parquet": PARQUET}

router = Router(tag="exports")


class BegunResponse(StreamingResponse):
    """A stream whose first piece is made before the headers leave, so that what is wrong by then is a problem.

    Nothing is made where no body is sent: for HEAD, and for 304.
    """

    async def stream_response(self, send: Send) -> None:
        """Send headers and pieces. Raises what the first piece raises."""
        pieces = aiter(self.body_iterator)
        self.body_iterator = _continued(await anext(pieces, b""), pieces)
        await super().stream_response(send)


class ExportQuery(RequestBody):
    """In which form rows are wanted."""

    format: ExportFormat = "jsonl"
    """A table (`jsonl`, `csv`, `parquet`), or a zip for a trainer (`trl`, `axolotl`, `llama-factory`)."""
    scores: bool = True
    """Whether rank, score, task, subtask and place come along: as columns, or in a zip as `selection.parquet`."""


@router.get(
    "/selections/{selection}/export",
    response_class=Response,
    responses={200: {"content": {NDJSON: {}, CSV: {}, PARQUET: {}, ZIP: {}}}},
)
def export_selection(
    selection: Reference, parameters: Annotated[ExportQuery, Query()], backend: BackendDep
) -> Response:
    """The chosen original rows, best first, as a file, with where they come from.

    422 where the rows have too many different fields for the columns of a table.
    """
    found = backend.answers.read(selection, limit=1)  # a row: that they are lost is told before an answer begins
    provenance = backend.cards.of(found)
    wanted, scores = parameters.format, parameters.scores
    suffix = wanted if wanted in MEDIA_TYPES else f"{wanted}.zip"
    headers = {
        "Content-Disposition": f'attachment; filename="{found.id}.{suffix}"',
        "ETag": tag(wanted, str(scores), provenance.model_dump_json()),
        "Link": f'</selections/{found.id}/provenance>; rel="describedby"; type="application/json"',
    }
    body = _body(backend, found, provenance, wanted, scores=scores)
    return BegunResponse(body, media_type=MEDIA_TYPES.get(wanted, ZIP), headers=headers)


@router.get(
    "/selections/{selection}/provenance",
    response_model=Provenance,
    responses={200: {"content": {MARKDOWN: {"schema": {"type": "string"}}}}},
)
def selection_provenance(
    request: Request,
    selection: Reference,
    backend: BackendDep,
    format: Literal["json", "markdown"] | None = None,
) -> Response:
    """What selected these rows, from what, for what, when and how; as `text/markdown` a page to read."""
    provenance = backend.cards.of(backend.answers.read(selection, limit=0))
    accepted = wanted_type(request, [MARKDOWN])
    if format == "markdown" or (format is None and accepted == MARKDOWN):
        return Response(card(provenance), media_type=MARKDOWN)
    return Response(provenance.model_dump_json(), media_type="application/json")


class FeaturesQuery(ArrayQuery):
    """Which features are wanted, and how."""

    feature_set: str | None = Field(None, min_length=1, max_length=255)
    """Id of one of the job's feature sets; may be left out where there is one."""


@router.get(
    "/gradients/{reference}/features",
    response_class=Response,
    responses={200: {"content": {NPY: {}, SAFETENSORS: {}}}},
)
def gradients_features(
    request: Request, reference: Reference, parameters: Annotated[FeaturesQuery, Query()], backend: BackendDep
) -> Response:
    """The features of a feature set, float32 (rows, dim); NaN where a row has none.

    The job is one that makes feature sets: gradients, an import or a conversion. A name is a gradients job's first.
    409 before the job has succeeded, and where it has several feature sets and none is named.
    """
    job = backend.jobs.of_features(reference)
    feature_set = backend.features.of_job(job, parameters.feature_set, path=request.url.path)
    view = backend.features.view(feature_set)
    start, stop = parameters.span(feature_set.id, view.rows)
    described = backend.cards.of_features(feature_set, start=start, stop=stop).model_dump_json()
    numbers = feature_files.of_features(view)
    form = parameters.form(request)
    if form == "safetensors":
        file = feature_files.safetensors(numbers, start, stop, name="features", metadata={"gradstore": described})
    else:
        file = feature_files.npy(numbers, start, stop)
    return array(file, feature_set.id, form, tag=tag(form, str(start), str(stop), described), of=job)


async def _continued(first: Content, rest: AsyncIterator[Content]) -> AsyncIterator[Content]:
    yield first
    async for piece in rest:
        yield piece


def _body(
    backend: Backend, selection: Selection, provenance: Provenance, wanted: ExportFormat, *, scores: bool
) -> Iterator[bytes]:
    lines = partial(backend.answers.rows_and_lines, selection.id)
    match wanted:
        case "jsonl":
            return exports.jsonl(lines, scores=scores)
        case "csv":
            return exports.table_csv(lines, scores=scores)
        case "parquet":
            return exports.parquet(lines, scores=scores, metadata=provenance.model_dump_json())
        case _:
            return zips.stream_files(_folder(backend, selection, provenance, wanted, scores=scores))


def _folder(
    backend: Backend, selection: Selection, provenance: Provenance, trainer: Trainer, *, scores: bool
) -> Iterator[tuple[str, Iterable[bytes]]]:
    yield from training_files.files(trainer, partial(backend.answers.rows_and_examples, selection.id), provenance)
    if scores:
        with backend.answers.table(selection.id).open("rb") as file:
            yield "selection.parquet", iter(partial(file.read, READ), b"")
