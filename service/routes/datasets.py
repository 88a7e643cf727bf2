"""Datasets: pools of examples, uploaded as files."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Annotated, Literal

from fastapi import Query, Request, Response
from fastapi.responses import FileResponse
from gradstore.types import Dataset, ExampleRows, Lengths, Name, Named, Page, Rename, UploadedDataset
from gradstore.types import Request as RequestBody
from pydantic import ConfigDict, Field

from datastore import browsing
from datastore.datasets import Ingested
from datastore.errors import NotFound
from datastore.schema import DatasetRow
from service.dependencies import Backend, BackendDep, Paging, Reference
from service.forms import Form, form_of
from service.openapi import upload
from service.routing import noun
from service.uploads import store_and_record

router = noun("datasets")


class DatasetForm(RequestBody):
    """The fields beside the file."""

    name: Name | None = None
    on_error: Literal["fail", "skip"] = "fail"
    """`skip` takes the good rows and reports the others."""
    append_to: Named | None = None
    """Dataset whose rows come before those of the file."""
    replace: bool = False
    """Take the name from the dataset that has it."""


@router.post(
    "",
    status_code=201,
    openapi_extra=upload(DatasetForm, file="file"),
    responses={200: {"model": UploadedDataset, "description": "The same rows were stored already."}},
)
def upload_dataset(backend: BackendDep, request: Request, response: Response) -> UploadedDataset:
    """Store the rows of a file: JSONL, JSON array or Parquet, plain or gzipped."""
    form: Form = form_of(request)
    fields = form.read(DatasetForm, files=["file"])
    file = form.only_file("file")
    catalog = backend.catalog
    base = catalog.dataset(fields.append_to).id if fields.append_to is not None else None

    def store() -> Ingested:
        with file.path.open("rb") as rows:
            return backend.datasets.ingest(
                rows, filename=file.name, on_error=fields.on_error, append_to=base, known=catalog.dataset_sizes()
            )

    def record(stored: Ingested) -> Dataset:
        return catalog.add_dataset(
            id=stored.id,
            rows=stored.rows,
            bytes=stored.bytes,
            origins=stored.origins,
            prefix=stored.prefix,
            sources=stored.sources,
            name=fields.name,
            replace=fields.replace,
        )

    stored, dataset, new = store_and_record(
        catalog, DatasetRow, store=store, record=record, look=backend.datasets.look, delete=_deleter(backend)
    )
    response.status_code = 201 if new else 200
    response.headers["Location"] = f"/datasets/{dataset.id}"
    return UploadedDataset(**dict(dataset), created=new, report=stored.report)


@router.get("")
def list_datasets(backend: BackendDep, paging: Annotated[Paging, Query()]) -> Page[Dataset]:
    """A page of datasets, newest first."""
    return backend.catalog.datasets(limit=paging.limit, after=paging.after)


@router.get("/{reference}")
def get_dataset(backend: BackendDep, reference: Reference) -> Dataset:
    """A dataset and the files it came from."""
    return backend.catalog.dataset(reference)


class Source(RequestBody):
    """Which bytes of a dataset are asked for."""

    source: str | None = None
    """SHA-256 of an upload; without it, all rows, one line each."""


@router.get(
    "/{reference}/content",
    response_class=FileResponse,
    responses={
        200: {"description": "The rows.", "content": {"application/x-ndjson": {"schema": {"type": "string"}}}},
        206: {"description": "The range asked for with `Range`."},
        416: {"description": "The range lies outside the content."},
    },
)
def get_dataset_content(backend: BackendDep, reference: Reference, wanted: Annotated[Source, Query()]) -> FileResponse:
    """The original rows, one line each and byte for byte; with `source` one upload as it was sent."""
    dataset = backend.catalog.dataset(reference)
    if wanted.source is None:
        return FileResponse(
            backend.datasets.content(dataset.id),
            media_type="application/x-ndjson",
            filename=f"{dataset.name or dataset.id}.jsonl",
            headers={"ETag": f'"{dataset.id}"'},
        )
    source = next((source for source in dataset.sources if source.sha256 == wanted.source), None)
    if source is None:
        raise NotFound("source", wanted.source, collection=f"/datasets/{dataset.id}")
    return FileResponse(
        backend.datasets.source(source.sha256),
        media_type="application/octet-stream",
        filename=source.filename,
        headers={"ETag": f'"{source.sha256}"'},
    )


class RowsWanted(RequestBody):
    """Which rows of a dataset are looked at."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    limit: int = Field(20, ge=1, le=1000)
    """How many at most."""
    after: int = Field(0, ge=0)
    """Rows before the page: `next` of the page before."""
    origin: str | None = Field(None, max_length=4096)
    """Only rows of this origin."""
    q: str | None = Field(None, min_length=1, max_length=1000)
    """Only rows that hold this text, in any case of letters."""


@router.get("/{reference}/rows")
def list_dataset_rows(backend: BackendDep, reference: Reference, wanted: Annotated[RowsWanted, Query()]) -> ExampleRows:
    """A page of a dataset's rows with their text."""
    dataset = backend.catalog.dataset(reference).id
    return browsing.page(
        backend.datasets, dataset, after=wanted.after, limit=wanted.limit, origin=wanted.origin, text=wanted.q
    )


@router.get("/{reference}/lengths")
def get_dataset_lengths(
    backend: BackendDep, reference: Reference, bins: Annotated[int, Query(ge=1, le=200)] = 40
) -> Lengths:
    """How long a dataset's rows are, in bytes, by origin: at most so many `bins`."""
    return browsing.lengths(backend.datasets, backend.catalog.dataset(reference).id, bins=bins)


@router.patch("/{reference}")
def rename_dataset(backend: BackendDep, reference: Reference, body: Rename) -> Dataset:
    """Give a dataset another name, or none."""
    return backend.catalog.dataset(backend.catalog.rename(DatasetRow, reference, body.name))


@router.delete("/{reference}", status_code=204)
def delete_dataset(backend: BackendDep, reference: Reference) -> None:
    """Delete a dataset and the uploads that no other dataset has; 409 while something needs it."""
    backend.catalog.remove(DatasetRow, reference, delete_files=_deleter(backend))


def _deleter(backend: Backend) -> Callable[[str], None]:
    """What deletes a dataset's files, and its uploads except those that other datasets have."""

    def delete(id: str) -> None:
        with suppress(NotFound):  # a record whose files are lost can be deleted, too
            backend.datasets.delete(id, keep_sources=backend.catalog.sources_of_others(id))
        backend.scoring.cache.delete(id)

    return delete
