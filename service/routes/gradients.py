"""Gradients: jobs that compute features and keep them."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from fastapi import Query, Request, Response
from fastapi.responses import JSONResponse
from gradstore.types import FeatureRows, GradientsJob, GradientsRequest
from gradstore.types import Request as RequestBody
from pydantic import Field

from datastore import feature_rows
from service.dependencies import BackendDep, Reference
from service.estimates import of_gradients
from service.files import NPY, PARQUET, SAFETENSORS, Format, npy, parquet, safetensors, wanted_format
from service.openapi import starting
from service.routes.jobs import look_and_name, started
from service.routing import noun

router = noun("gradients")


@router.post("", status_code=202, response_model=GradientsJob, responses=starting(GradientsJob, dry_run=True))
def create_gradients(backend: BackendDep, body: GradientsRequest, response: Response) -> GradientsJob | Response:
    """Compute the projected gradients of a dataset or of a task's validation rows; what exists is not computed again.

    `dry_run=true` answers what it would cost, and starts nothing.
    """
    if body.dry_run:
        return JSONResponse(of_gradients(backend, body).model_dump(mode="json"))
    job, _ = backend.features.start(body)
    return started(backend, job, response, model=GradientsJob)


look_and_name(router, kind="gradients", model=GradientsJob, one="A gradients job, and what it left in the store.")


class RowsQuery(RequestBody):
    """Which rows are shown, and how."""

    feature_set: str | None = Field(None, min_length=1, max_length=255)
    """Id of one of the job's feature sets; may be left out where there is one."""
    limit: int = Field(20, ge=0, le=10_000)
    after: int = Field(0, ge=0)
    """How many rows come before the page."""
    format: Format | None = None
    """By default what `Accept` asks for, else JSON."""


@router.get(
    "/{reference}/rows",
    response_model=FeatureRows,
    responses={200: {"content": {NPY: {}, PARQUET: {}, SAFETENSORS: {}}}},
)
def gradients_rows(
    request: Request, reference: Reference, parameters: Annotated[RowsQuery, Query()], backend: BackendDep
) -> Response:
    """What is known of the rows of a feature set beside their features: norms, loss, tokens, why a row has none.

    The job is one that makes feature sets: gradients, an import or a conversion. A name is a gradients job's first.
    409 before the job has succeeded, and where it has several feature sets and none is named.
    """
    job = backend.jobs.of_features(reference)
    feature_set = backend.features.of_job(job, parameters.feature_set, path=request.url.path)
    view = backend.features.view(feature_set)
    match wanted_format(request, parameters.format):
        case "npy":
            return npy(feature_rows.array(view), f"{feature_set.id}-rows")
        case "safetensors":
            found = feature_rows.array(view)
            columns = {name: np.ascontiguousarray(found[name]) for name in found.dtype.names or ()}
            described = backend.cards.of_features(feature_set, start=0, stop=view.rows).model_dump_json()
            return safetensors(columns, f"{feature_set.id}-rows", metadata=described)
        case "parquet":
            return parquet(feature_rows.table(view), f"{feature_set.id}-rows")
    start, stop = parameters.after, parameters.after + parameters.limit
    data = feature_rows.page(view, start, stop)
    rows = FeatureRows(feature_set=feature_set, data=data, has_more=start + len(data) < view.rows)
    return JSONResponse(rows.model_dump(mode="json"))


@router.delete("/{reference}", status_code=204)
def delete_gradients(backend: BackendDep, reference: Reference) -> None:
    """Delete a gradients job and the features that no other job has; 409 while it is at work."""
    backend.features.remove(reference)
