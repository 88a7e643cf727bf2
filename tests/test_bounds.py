"""What hostile numbers and pools without a usable row come to, of the resources that learn from stored features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gradstore.types import (
    AnnotationRequest,
    CascadeRequest,
    EstimatesRequest,
    EstimateValidationRequest,
    FinetuneRequest,
    GradientsRequest,
    PredictorRequest,
    ProjectorConfig,
    ProjectorRequest,
    Request,
    StreamRequest,
)
from gradstore.types.estimates import MAX_GROUPS
from pydantic import ValidationError

from datastore.errors import Conflict, InvalidInput
from datastore.predictors import KERNEL_ROWS, models_of
from tests.serving import Service, problem_of
from tests.workplace import Workplace, numbered

POOL: dict[str, Any] = {"dataset": "pool", "task": "target"}
SUBSETS: dict[str, Any] = {"dataset": "pool", "tasks": ["target"]}
HIDDEN: dict[str, Any] = {"kind": "hidden", "dataset": "pool", "checkpoint": "base"}
TRAINED: dict[str, Any] = {"estimates": "mine", "model": "org/base"}


@pytest.mark.parametrize(
    ("request_type", "body", "field", "value", "bound"),
    [
        (StreamRequest, HIDDEN, "layers", [10**9], "less than 1000"),
        (StreamRequest, HIDDEN, "layers", [-1], "greater than or equal to 0"),
        (ProjectorConfig, {}, "validation_fraction", 0.999, r"at most 0\.9"),
        (ProjectorConfig, {"width": 4096}, "blocks", 64, "at most 134,217,728"),
        (EstimatesRequest, SUBSETS, "scale", 1e308, "less than or equal to 1000000"),
        (EstimatesRequest, SUBSETS, "abs_scale", 1e308, "less than or equal to 1000000"),
        (EstimatesRequest, SUBSETS, "c", 1e308, "less than or equal to 1000000"),
        (EstimatesRequest, SUBSETS, "c", 1e-320, "greater than or equal to 0.000000000001"),
        (EstimatesRequest, SUBSETS, "dim", 10**30, "less than or equal to 1048576"),
        (EstimatesRequest, SUBSETS, "seed", 1 << 32, "less than 4294967296"),
        (EstimatesRequest, SUBSETS, "max_length", 10**30, "less than or equal to 1048576"),
        (EstimatesRequest, SUBSETS, "subsets", [["a"] * (MAX_GROUPS + 1)], "at most 10000 items"),
        (EstimateValidationRequest, TRAINED, "scales", [1e308], "less than or equal to 1000000"),
        (EstimateValidationRequest, TRAINED, "batch_size", 10**30, "less than or equal to 1048576"),
        (EstimateValidationRequest, TRAINED, "device_batch_size", 10**30, "less than or equal to 1048576"),
        (FinetuneRequest, {"dataset": "pool", "model": "m"}, "batch_size", 10**30, "less than or equal to 1048576"),
        (PredictorRequest, POOL, "dim", 10**30, "less than or equal to 1048576"),
        (PredictorRequest, POOL, "seed", 1 << 32, "less than 4294967296"),
        (PredictorRequest, POOL, "max_length", 10**30, "less than or equal to 1048576"),
        (PredictorRequest, POOL, "checkpoints", ["a"] * 1001, "at most 1000 items"),
        (CascadeRequest, {**POOL, "budget": 0.2}, "checkpoints", ["a"] * 1001, "at most 1000 items"),
    ],
)
def test_a_number_beyond_its_bound_is_refused_with_the_bound(
    request_type: type[Request], body: dict[str, Any], field: str, value: object, bound: str
) -> None:
    request_type.model_validate(body)
    with pytest.raises(ValidationError, match=bound):
        request_type.model_validate({**body, field: value})


@pytest.mark.parametrize("path", ["/annotations/x/rows", "/embeddings/x/rows", "/estimates/x/subsets"])
def test_a_page_after_more_rows_than_there_can_be_is_refused(service: Service, path: str) -> None:
    refused = problem_of(service.http.get(path, params={"after": 10**30}), 422)
    assert [error.parameter for error in refused.errors] == ["after"]


def test_a_kernel_is_not_learnt_from_more_rows_than_its_matrix_has_room_for() -> None:
    auto = PredictorRequest.model_validate(POOL)
    assert "kernel" in models_of(auto, rows=KERNEL_ROWS)
    assert "kernel" not in models_of(auto, rows=KERNEL_ROWS + 1)
    with pytest.raises(InvalidInput, match=r"^/model: .* at most 20,000"):
        models_of(PredictorRequest.model_validate({**POOL, "model": "kernel"}), rows=KERNEL_ROWS + 1)


# Nothing that is usable -----------------------------------------------------------------------------------------------

ROWS = 20


@pytest.fixture
def place(tmp_path: Path) -> Workplace:
    """A pool of which truncation leaves no answer, and a task that has gradients."""
    place = Workplace.at(tmp_path)
    long = "why " * 100
    place.pool(({**row, "prompt": long, "id": str(n)} for n, row in enumerate(numbered(range(ROWS)))), name="pool")
    place.task(2)
    place.checkpoint()
    for owner in ({"dataset": "pool"}, {"task": "target"}):
        place.done(gradients(place, **owner))
        place.done(gradients(place, **owner, kinds=["logodds"]))
    return place


def gradients(place: Workplace, **changes: Any) -> GradientsRequest:
    checkpoint = place.context.catalog.checkpoints(limit=1).data[0].id
    values = {"checkpoints": [checkpoint], "kinds": ["sgd"], "dims": [32], "dtype": "float32", "max_length": 64}
    return GradientsRequest.model_validate({**values, **changes})


def test_of_a_pool_without_a_usable_row_nothing_is_learnt_estimated_or_trained(place: Workplace) -> None:
    context = place.context
    sets = context.features.complete(datasets=[context.catalog.dataset("pool").id])
    assert [(each.rows, each.excluded) for each in sets] == [(ROWS, ROWS)] * 2
    with pytest.raises(Conflict, match=r"^0 of 20 rows of ds_.* 10 are needed: GET /gradients"):
        context.predictors.start(
            PredictorRequest.model_validate({**POOL, "kind": "sgd", "features": ["text"], "fraction": 0.9})
        )
    with pytest.raises(Conflict, match=r"no row of ds_.* has a feature in feat_.*max_length"):
        context.estimates.start(EstimatesRequest.model_validate({**SUBSETS, "clusters": 2, "group_by": "cluster"}))
    job = context.jobs.page(kind="gradients", limit=10, after=None).data[-1]
    stream, _ = context.streams.start(StreamRequest(kind="gradients", gradients=job.id))
    assert stream.status == "succeeded"
    assert stream.result is not None
    assert stream.result.model_dump()["present_rows"] == 0
    labels, _ = context.annotations.start(AnnotationRequest(dataset="pool", by="origin"))
    request = ProjectorRequest.model_validate({"streams": {"gradients": stream.id}, "annotations": labels.id})
    for asked in (context.projectors.start, context.projectors.estimate):
        with pytest.raises(Conflict, match=r"at most 0 rows have an annotation and all streams.* at least 10"):
            asked(request)
    assert context.jobs.page(kind="predictor", limit=1, after=None).data == []


def test_a_cascade_of_such_a_pool_ends_with_what_is_missing_in_words(place: Workplace) -> None:
    body = {**POOL, "budget": 0.5, "features": ["text"], "model": "ridge", "kind": "sgd"}
    checkpoint = place.context.catalog.checkpoints(limit=1).data[0].id
    request = CascadeRequest.model_validate({**body, "checkpoints": [checkpoint]})
    job, _ = place.context.cascades.start(request)
    place.work()
    done = place.job(job.id)
    assert done.status == "failed"
    assert done.error is not None
    assert "no row of the sample has a gradient: GET /gradients/grad_" in done.error.detail
    assert "Traceback" not in done.error.model_dump_json()


def test_hidden_states_of_such_a_pool_are_a_stream_of_absent_rows(place: Workplace) -> None:
    checkpoint = place.context.catalog.checkpoints(limit=1).data[0].id
    request = StreamRequest(kind="hidden", dataset="pool", checkpoint=checkpoint, max_length=64)
    job, _ = place.context.streams.start(request)
    place.work()
    done = place.job(job.id)
    assert done.status == "succeeded", done.error
    matrix, present = place.context.streams.matrix(job.id)
    assert len(matrix) == ROWS
    assert done.result is not None
    assert done.result.model_dump()["present_rows"] == int(present.sum()) == np.count_nonzero(present)
