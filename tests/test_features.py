"""From a gradients request to feature sets, however a dataset grew and whoever computed a part of them already."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pytest
from gradstore.types import GradientsRequest
from numpy.typing import NDArray

from datastore.errors import InUse, InvalidInput, NotEnoughSpace, NotFound
from datastore.features import Features, Plan
from datastore.schema import DatasetRow
from tests.stores import DIM, Store, numbers, request, with_config


def test_a_job_covers_every_row_of_every_checkpoint_once(store: Store) -> None:
    store.pool(2500, name="pool")
    job, started = store.features.start(request(dataset="pool", dims=[DIM, 8]))
    assert (started, job.progress.total) == (True, 5000)
    done = store.work(numbers)
    ranges = sorted((claim.payload["checkpoint"], claim.payload["start"], claim.payload["stop"]) for claim in done)
    spans = [(0, 1024), (1024, 2048), (2048, 2500)]
    assert ranges == [(checkpoint, *span) for checkpoint in ("ck_0", "ck_1") for span in spans]
    result = store.jobs.get(job.id).result
    assert result is not None
    found = result.model_dump()
    assert (found["rows"], found["computed_rows"], found["tokens"]) == (2500, 5000, 5000)
    assert [(one["checkpoint"], one["dim"]) for one in found["feature_sets"]] == [
        ("ck_0", DIM), ("ck_0", 8), ("ck_1", DIM), ("ck_1", 8),
    ]  # fmt: skip
    view = store.store.view(store.features.segments(found["feature_sets"][1]["id"]))
    np.testing.assert_allclose(view.features(0, 2500), numbers("ck_0", 0, 2500, 8), rtol=2e-3, atol=2e-3)


def test_asking_again_returns_what_exists(store: Store) -> None:
    store.pool(10, name="pool")
    first, _ = store.features.start(request(dataset="pool"))
    store.work(numbers)
    again, started = store.features.start(request(dataset="pool"))
    assert (again.id, again.status, started) == (first.id, "succeeded", False)


def test_fewer_dims_of_what_exists_are_nothing_new(store: Store) -> None:
    store.pool(10, name="pool")
    store.features.start(request(dataset="pool", dims=[DIM, 8]))
    store.work(numbers)
    job, started = store.features.start(request(dataset="pool", dims=[8]))
    assert (job.status, started) == ("succeeded", False)
    assert job.result is not None
    assert job.result.model_dump()["computed_rows"] == 0


def test_a_grown_dataset_computes_its_new_rows_only(store: Store) -> None:
    store.pool(2000, name="pool")
    store.features.start(request(dataset="pool"))
    store.work(numbers)
    grown = store.pool(2200)
    estimate = store.features.estimate(store.features.plan(request(dataset=grown.id)), tokens_per_row=3, size=None)
    assert (estimate.rows, estimate.reused_rows, estimate.tokens) == (400, 4000, 1200)
    job, _ = store.features.start(request(dataset=grown.id))
    assert job.progress.total == 400
    assert all(claim.payload["start"] == 2000 for claim in store.work(numbers))
    result = store.jobs.get(job.id).result
    assert result is not None
    for feature in result.model_dump()["feature_sets"]:
        view = store.store.view(store.features.segments(feature["id"]))
        expected = numbers(feature["checkpoint"], 0, 2200, DIM)
        np.testing.assert_allclose(view.features(0, 2200), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("deleted", [(2100,), (2100, 2200), (2200, 2100)])
def test_a_dataset_still_computes_its_new_rows_only_when_a_version_in_between_is_deleted(
    store: Store, deleted: tuple[int, ...]
) -> None:
    versions = {rows: store.pool(rows) for rows in (2000, 2100, 2200, 2300)}
    store.features.start(request(dataset=versions[2000].id))
    store.work(numbers)
    for rows in deleted:
        store.catalog.remove(DatasetRow, versions[rows].id)
    last = store.catalog.dataset(versions[2300].id)
    assert last.prefix == versions[2000 if len(deleted) == 2 else 2200].id
    job, _ = store.features.start(request(dataset=last.id))
    assert job.progress.total == 2 * 300
    store.work(numbers)
    assert_features_of(store, job.id, 2300)


def test_a_deleted_first_version_leaves_nothing_to_begin_with(store: Store) -> None:
    first, second = store.pool(10), store.pool(20)
    assert second.prefix == first.id
    store.catalog.remove(DatasetRow, first.id)
    assert store.catalog.dataset(second.id).prefix is None


def test_a_prefix_that_is_deleted_during_the_upload_is_not_recorded(store: Store) -> None:
    first = store.pool(10)
    store.catalog.remove(DatasetRow, first.id)
    late = store.catalog.add_dataset(
        id="ds_late", rows=20, bytes=10, origins={}, prefix=first.id, sources=first.sources, name=None, replace=False
    )
    assert late.prefix is None


def test_a_job_that_follows_a_deleted_one_takes_over_its_finished_shards(store: Store) -> None:
    store.pool(2500, name="pool")
    first, _ = store.features.start(request(dataset="pool", dims=[DIM]))
    store.features.start(request(dataset="pool", dims=[DIM], checkpoints=["ck_0"], run=None))
    store.work(numbers, shards=2)
    store.jobs.cancel(first.id)
    store.features.remove(first.id)
    again, _ = store.features.start(request(dataset="pool"))
    assert again.progress.done == 2048
    done = store.work(numbers)
    starts = [(claim.job, claim.payload["checkpoint"], claim.payload["start"]) for claim in done]
    assert (again.id, "ck_0", 0) not in starts
    assert store.jobs.get(again.id).status == "succeeded"


def test_deleting_a_job_keeps_the_segments_that_a_grown_dataset_refers_to(store: Store) -> None:
    store.pool(1500, name="pool")
    first, _ = store.features.start(request(dataset="pool"))
    store.work(numbers)
    grown = store.pool(1600)
    second, _ = store.features.start(request(dataset=grown.id))
    store.work(numbers)
    store.features.remove(first.id)
    result = store.jobs.get(second.id).result
    assert result is not None
    feature = result.model_dump()["feature_sets"][0]
    segments = store.features.segments(feature["id"])
    assert store.store.view(segments).features(0, 1600).shape == (1600, DIM)
    store.features.remove(second.id)
    with pytest.raises(NotFound):
        store.store.open(segments[0])


@dataclass(frozen=True)
class Overtaken(Features):
    """Features that somebody else changes between a request's plan and its job."""

    meanwhile: Callable[[], object]

    def plan(self, request: GradientsRequest) -> Plan:
        found = super().plan(request)
        self.meanwhile()
        return found


def overtaken(store: Store, meanwhile: Callable[[], object]) -> Features:
    own = {each.name: getattr(store.features, each.name) for each in fields(Features) if each.init}
    return Overtaken(**own, meanwhile=meanwhile)


def assert_features_of(store: Store, job: str, rows: int) -> None:
    """The job has succeeded, and every row of each of its feature sets is what was computed for it."""
    result = store.jobs.get(job).result
    assert result is not None
    for feature in result.model_dump()["feature_sets"]:
        view = store.store.view(store.features.segments(feature["id"]))
        expected = numbers(feature["checkpoint"], 0, rows, feature["dim"])
        np.testing.assert_allclose(view.features(0, rows), expected, rtol=2e-3, atol=2e-3)


def test_features_of_the_prefix_that_are_deleted_while_a_job_is_started_are_computed(store: Store) -> None:
    store.pool(2000, name="pool")
    first, _ = store.features.start(request(dataset="pool"))
    store.work(numbers)
    grown = store.pool(2200)
    job, _ = overtaken(store, lambda: store.features.remove(first.id)).start(request(dataset=grown.id))
    assert job.progress.total == 2 * 2200
    store.work(numbers)
    assert_features_of(store, job.id, 2200)


def test_features_that_are_deleted_while_another_job_for_them_is_started_are_computed(store: Store) -> None:
    store.pool(1100, name="pool")
    first, _ = store.features.start(request(dataset="pool", dims=[DIM, 8]))
    store.work(numbers)
    job, started = overtaken(store, lambda: store.features.remove(first.id)).start(request(dataset="pool"))
    assert (started, job.progress.total) == (True, 2 * 1100)
    store.work(numbers)
    assert_features_of(store, job.id, 1100)


def test_features_that_another_job_computes_while_one_is_started_are_not_computed_again(store: Store) -> None:
    store.pool(1100, name="pool")
    one = request(dataset="pool", run=None, checkpoints=["ck_0"])

    def meanwhile() -> None:
        store.features.start(one)
        store.work(numbers, shards=1)

    job, _ = overtaken(store, meanwhile).start(request(dataset="pool"))
    assert (job.progress.done, job.progress.total) == (1024, 2 * 1100)
    store.work(numbers)
    result = store.jobs.get(job.id).result
    assert result is not None
    assert result.model_dump()["computed_rows"] == 2 * 1100 - 1024
    assert_features_of(store, job.id, 1100)


def test_a_dataset_that_is_deleted_while_its_job_is_started_is_not_found(store: Store) -> None:
    pool = store.pool(10, name="pool")
    late = overtaken(store, lambda: store.catalog.remove(DatasetRow, pool.id))
    with pytest.raises(NotFound, match=pool.id):
        late.start(request(dataset="pool"))
    assert store.jobs.page(limit=1).data == []


def test_features_whose_files_cannot_be_deleted_are_still_recorded(store: Store) -> None:
    pool = store.pool(10, name="pool")
    job, _ = store.features.start(request(dataset="pool"))
    store.work(numbers)
    unfinished = store.settings.features / "unfinished"
    shutil.rmtree(unfinished)
    unfinished.write_text("in the way of what is deleted")
    with pytest.raises(OSError, match="unfinished"):
        store.features.remove(job.id)
    assert store.jobs.get(job.id).status == "succeeded"
    unfinished.unlink()
    store.features.remove(job.id)
    assert store.features.complete(datasets=[pool.id]) == []


def test_what_gradients_are_made_from_is_in_use(store: Store) -> None:
    store.pool(10, name="pool")
    job, _ = store.features.start(request(dataset="pool"))
    store.work(numbers)
    with pytest.raises(InUse, match=job.id):
        store.catalog.remove(DatasetRow, "pool")
    store.features.remove(job.id)
    store.catalog.remove(DatasetRow, "pool")


def kinds_of(store: Store, job: str) -> list[tuple[str, str | None, int]]:
    result = store.jobs.get(job).result
    assert result is not None
    return [(one["kind"], one["adam"], one["dim"]) for one in result.model_dump()["feature_sets"]]


def test_every_kind_form_and_dim_is_a_feature_set_of_its_own_from_one_pass(store: Store) -> None:
    store.pool(1100, name="pool")
    job, _ = store.features.start(request(dataset="pool", dims=[DIM, 8], kinds=["adam", "sgd"], adam="both"))
    assert job.progress.total == 2 * 1100
    done = store.work(numbers)
    assert [len(claim.payload["outputs"]) for claim in done] == [6] * 4
    forms = [("adam", "less"), ("adam", "exact"), ("sgd", None)]
    assert kinds_of(store, job.id) == [(*form, dim) for form in forms for dim in (DIM, 8)] * 2
    for changes in ({"kinds": ["sgd"]}, {"kinds": ["adam"], "adam": "exact"}, {}):
        alone, started = store.features.start(request(dataset="pool", **changes))
        assert (alone.status, started) == ("succeeded", False)


def test_of_more_kinds_only_those_that_are_missing_are_computed(store: Store) -> None:
    store.pool(1100, name="pool")
    store.features.start(request(dataset="pool"))
    store.work(numbers)
    more = request(dataset="pool", kinds=["sgd", "adam", "sign"], dims=[DIM, 8])
    estimate = store.features.estimate(store.features.plan(more), tokens_per_row=3, size=None)
    assert (estimate.rows, estimate.reused_rows) == (2 * 1100, 0)
    job, _ = store.features.start(more)
    outputs = [
        {(output["kind"], output["dim"]) for output in claim.payload["outputs"]} for claim in store.work(numbers)
    ]
    assert outputs == [{("sgd", DIM), ("sgd", 8), ("adam", 8), ("sign", DIM), ("sign", 8)}] * 4
    assert len(kinds_of(store, job.id)) == 12


def test_a_job_tells_how_fast_others_of_the_same_weights_are(store: Store) -> None:
    store.pool(1100, name="pool")
    store.checkpoint(6, method="none", has_moments=False)
    asked = {"dataset": "pool", "run": None, "checkpoints": ["ck_6"], "kinds": ["sgd"]}
    store.features.start(request(**asked, weights=["*.q_proj.*", "*.mlp.*"]))
    store.work(numbers)
    again, other = (
        store.features.estimate(
            store.features.plan(request(**asked, dims=[8], weights=weights)), tokens_per_row=3, size=None
        )
        for weights in (["*.mlp.*", "*.q_proj.*"], ["*.mlp.*"])
    )
    assert (again.basis, other.basis) == ("measured", None)


def test_rows_of_which_a_part_exists_are_counted_once(store: Store) -> None:
    store.pool(2000, name="pool")
    store.features.start(request(dataset="pool"))
    store.work(numbers)
    grown = store.pool(2200)
    both = request(dataset=grown.id, kinds=["adam", "sgd"])
    estimate = store.features.estimate(store.features.plan(both), tokens_per_row=3, size=None)
    assert (estimate.rows, estimate.reused_rows) == (2 * (200 + 2200), 0)
    job, _ = store.features.start(both)
    store.work(numbers)
    assert_features_of(store, job.id, 2200)


def test_hidden_states_are_as_wide_as_the_model_and_the_same_however_they_are_asked_for(
    store: Store, tmp_path: Path
) -> None:
    with_config(store, tmp_path / "model")
    store.pool(10, name="pool")
    job, _ = store.features.start(request(dataset="pool", run="local", kinds=["hidden", "sgd", "rds"]))
    store.work(numbers)
    assert kinds_of(store, job.id) == [("hidden", None, 24), ("sgd", None, DIM), ("rds", None, 24)] * 2
    other = {"dims": [8], "seed": 3, "reduction": "sum", "projection": "rademacher", "adam": "exact"}
    for kind in ("hidden", "rds"):
        alone, started = store.features.start(request(dataset="pool", run="local", kinds=[kind], **other))
        assert (alone.status, started) == ("succeeded", False)


def test_the_output_layers_gradient_is_projected_and_depends_on_no_weights_and_no_form_of_adam(store: Store) -> None:
    store.checkpoint(8, method="full")
    store.pool(10, name="pool")
    job, _ = store.features.start(request(dataset="pool", kinds=["output", "sgd"], dims=[8, 4]))
    store.work(numbers)
    assert kinds_of(store, job.id) == [("output", None, 8), ("output", None, 4), ("sgd", None, 8), ("sgd", None, 4)] * 2
    alone, started = store.features.start(request(dataset="pool", kinds=["output"], dims=[4], adam="exact"))
    assert (alone.status, started) == ("succeeded", False)
    for other in ({"seed": 3}, {"reduction": "sum"}, {"projection": "sjlt"}):
        assert store.features.start(request(dataset="pool", kinds=["output"], dims=[4], **other))[1]
    whole: dict[str, object] = {"dataset": "pool", "run": None, "checkpoints": ["ck_8"], "kinds": ["output"]}
    first, _ = store.features.start(request(**whole))  # a model without an adapter, of which no weights are named
    store.work(numbers)
    again, started = store.features.start(request(**whole, weights=["*"]))
    assert (again.id, started) == (first.id, False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kinds": ["output"], "projection": "none"}, "blocks, sjlt, fft or rademacher"),
        ({"kinds": ["output"], "projection": "reference"}, "blocks, sjlt, fft or rademacher"),
        ({"kinds": ["output", "logodds"]}, "in a pass of its own"),
    ],
)
def test_what_the_output_layers_gradient_does_not_go_with_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        request(dataset="pool", **changes)


@pytest.mark.parametrize("text", [None, "{}", "not JSON"])
def test_hidden_states_of_a_model_whose_width_is_not_known_are_refused(
    store: Store, tmp_path: Path, text: str | None
) -> None:
    store.pool(10, name="pool")
    if text is not None:
        with_config(store, tmp_path / "model", text)
    with pytest.raises(InvalidInput, match=r"config\.json"):
        store.features.start(request(dataset="pool", run="local" if text else "warm-up", kinds=["hidden"]))


def test_a_row_without_a_feature_is_named_with_its_reason(store: Store) -> None:
    def with_zero(checkpoint: str, start: int, stop: int, dim: int) -> NDArray[np.float32]:
        found = numbers(checkpoint, start, stop, dim)
        if checkpoint == "ck_1" and start == 1024:
            found[6] = 0
        return found

    store.pool(1100, name="pool")
    job, _ = store.features.start(request(dataset="pool"))
    store.work(with_zero)
    result = store.jobs.get(job.id).result
    assert result is not None
    found = result.model_dump()
    expected = {"row": 1030, "checkpoint": "ck_1", "kinds": ["adam"], "reason": "the gradient is zero"}
    assert found["excluded"] == [expected]
    assert [feature["excluded"] for feature in found["feature_sets"]] == [0, 1]
    both, _ = store.features.start(request(dataset="pool", kinds=["sgd", "adam"]))
    store.work(with_zero)
    result = store.jobs.get(both.id).result
    assert result is not None
    assert result.model_dump()["excluded"] == [expected | {"kinds": ["sgd", "adam"]}]
    assert result.model_dump()["total_excluded"] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"checkpoints": ["ck_9"], "run": None}, "no Adam moments", id="adam without moments"),
        pytest.param({"checkpoints": ["ck_8"], "run": None}, "say which of the model's weights", id="no adapter"),
        pytest.param({"projection": "none"}, r"dims=\[100\]", id="no projection, other dim"),
        pytest.param({"checkpoints": ["ck_0", "ck_7"], "run": None}, "different base models", id="two models"),
    ],
)
def test_what_cannot_be_computed_is_refused(store: Store, changes: dict[str, object], message: str) -> None:
    store.checkpoint(9, has_moments=False, moments_note="the folder holds no optimizer state")
    store.checkpoint(8, method="full")
    store.checkpoint(7, model="other")
    store.pool(10, name="pool")
    with pytest.raises(InvalidInput, match=message):
        store.features.start(request(dataset="pool", **changes))


def test_what_cannot_fit_on_the_disk_is_refused_before_it_starts(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.pool(10, name="pool")
    usage = shutil.disk_usage(store.settings.data)
    monkeypatch.setattr("datastore.usage.shutil.disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(NotEnoughSpace):
        store.features.start(request(dataset="pool"))
    assert store.jobs.page(limit=1).data == []
