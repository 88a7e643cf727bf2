"""From a gradients request to feature sets, and from these to scores and selections: every number checked by hand."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
from gradstore.types import GradientsRequest
from numpy.typing import NDArray

from datastore.errors import Ambiguous, GradientsMissing, InUse, InvalidInput, NotEnoughSpace, NotFound
from datastore.features import Features, Plan
from datastore.recipes import Query
from datastore.schema import DatasetRow
from tests.stores import Store

DIM = 16


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.services)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    catalog = "" if request.param == "sqlite" else request.getfixturevalue("postgres_server").database()
    store = Store.at(tmp_path / "store", catalog=catalog)
    for number in range(2):
        store.checkpoint(number)
    store.catalog.add_run(id="run_1", checkpoints=["ck_0", "ck_1"], name="warm-up")
    yield store
    store.catalog.close()


def numbers(checkpoint: str, start: int, stop: int, dim: int) -> NDArray[np.float32]:
    """Features that depend on the row and the checkpoint only."""
    rows = [np.random.default_rng([row, int(checkpoint[-1]), dim]).normal(size=dim) for row in range(start, stop)]
    return np.array(rows, np.float32)


def task_numbers(checkpoint: str, start: int, stop: int, dim: int) -> NDArray[np.float32]:
    return numbers(checkpoint, start + 1_000_000, stop + 1_000_000, dim)


def request(**changes: object) -> GradientsRequest:
    return GradientsRequest.model_validate({"run": "warm-up", "dims": [DIM], **changes})


def filled(store: Store, tmp_path: Path, rows: int = 2500) -> None:
    """A pool and a task with all their features."""
    store.pool(rows, name="pool")
    store.features.start(request(dataset="pool"))
    store.work(numbers)
    store.task({"algebra": 3, "history": 2}, folder=tmp_path / "task")
    store.features.start(request(task="target"))
    store.work(task_numbers)


def select(store: Store, **query: object):  # type: ignore[no-untyped-def]  # a Selection
    recipe, sources = store.recipes.resolve(Query(**{"tasks": ["target"], "pct": 0.05, **query}), path="/select")  # type: ignore[arg-type]
    store.scoring.start(recipe, sources)
    store.score()
    scores = store.scoring.known(recipe, sources)
    assert scores is not None
    return store.answers.select(recipe, sources, scores, limit=10_000)


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
    estimate = store.features.estimate(request(dataset=grown.id), tokens_per_row=3, size=None)
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
    return Overtaken(store.catalog, store.jobs, store.store, store.settings, meanwhile)


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
    estimate = store.features.estimate(more, tokens_per_row=3, size=None)
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
        store.features.estimate(request(**asked, dims=[8], weights=weights), tokens_per_row=3, size=None)
        for weights in (["*.mlp.*", "*.q_proj.*"], ["*.mlp.*"])
    )
    assert (again.basis, other.basis) == ("measured", None)


def test_rows_of_which_a_part_exists_are_counted_once(store: Store) -> None:
    store.pool(2000, name="pool")
    store.features.start(request(dataset="pool"))
    store.work(numbers)
    grown = store.pool(2200)
    both = request(dataset=grown.id, kinds=["adam", "sgd"])
    estimate = store.features.estimate(both, tokens_per_row=3, size=None)
    assert (estimate.rows, estimate.reused_rows) == (2 * (200 + 2200), 0)
    job, _ = store.features.start(both)
    store.work(numbers)
    assert_features_of(store, job.id, 2200)


def with_config(store: Store, folder: Path, text: str = '{"hidden_size": 24}') -> None:
    """A run of a model whose config.json is on this machine."""
    folder.mkdir()
    (folder / "config.json").write_text(text)
    for number in (5, 6):
        store.checkpoint(number, model=str(folder))
    store.catalog.add_run(id="run_2", checkpoints=["ck_5", "ck_6"], name="local")


def test_hidden_states_are_as_wide_as_the_model_and_the_same_however_they_are_asked_for(
    store: Store, tmp_path: Path
) -> None:
    with_config(store, tmp_path / "model")
    store.pool(10, name="pool")
    job, _ = store.features.start(request(dataset="pool", run="local", kinds=["hidden", "sgd"]))
    store.work(numbers)
    assert kinds_of(store, job.id) == [("hidden", None, 24), ("sgd", None, DIM)] * 2
    other = {"dims": [8], "seed": 3, "reduction": "sum", "projection": "rademacher", "adam": "exact"}
    alone, started = store.features.start(request(dataset="pool", run="local", kinds=["hidden"], **other))
    assert (alone.status, started) == ("succeeded", False)


@pytest.mark.parametrize("text", [None, "{}", "not JSON"])
def test_hidden_states_of_a_model_whose_width_is_not_known_are_refused(
    store: Store, tmp_path: Path, text: str | None
) -> None:
    store.pool(10, name="pool")
    if text is not None:
        with_config(store, tmp_path / "model", text)
    with pytest.raises(InvalidInput, match=r"config\.json"):
        store.features.start(request(dataset="pool", run="local" if text else "warm-up", kinds=["hidden"]))


def test_hidden_states_are_compared_with_hidden_states_and_gradients_with_gradients(
    store: Store, tmp_path: Path
) -> None:
    with_config(store, tmp_path / "model")
    store.pool(10, name="pool")
    task = store.task({"one": 2}, folder=tmp_path / "task")
    store.features.start(request(dataset="pool", run="local", kinds=["hidden", "adam"]))
    store.features.start(request(task="target", run="local"))
    store.work(numbers)
    recipe, _ = store.recipes.resolve(Query(tasks=["target"], k=1), path="/select")
    assert (recipe.kind, recipe.task_kind) == ("adam", "sgd"), "the task has no hidden states: there is one candidate"
    assert answered(store, Query(tasks=["target"], kind="hidden", k=1)) == [task.id]
    recipe, sources = store.recipes.resolve(Query(tasks=["target"], kind="hidden", k=1), path="/select")
    assert (recipe.task_kind, recipe.dim, recipe.adam, recipe.projection, recipe.seed) == ("hidden", 24, *[None] * 3)
    assert {one.kind for one in sources.tasks[task.id]} == {"hidden"}
    with pytest.raises(Ambiguous) as caught:
        store.recipes.resolve(Query(tasks=["target"], k=1), path="/select")
    answers = [store.recipes.resolve(asked(url), path="/select")[0].kind for url in caught.value.choices]
    assert sorted(answers) == ["adam", "hidden"]


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [("hidden", "dim", 24), ("hidden", "seed", 0), ("hidden", "reduction", "mean"), ("sgd", "adam", "less")],
)
def test_what_no_feature_of_the_kind_has_cannot_narrow_it(
    store: Store, tmp_path: Path, kind: str, name: str, value: object
) -> None:
    filled(store, tmp_path, rows=10)
    with pytest.raises(InvalidInput, match=f"have no {name}"):
        store.recipes.resolve(Query(tasks=["target"], k=1, kind=kind, **{name: value}), path="/select")  # type: ignore[arg-type]


def test_pool_and_task_have_one_reduction(store: Store, tmp_path: Path) -> None:
    filled(store, tmp_path, rows=10)
    store.features.start(request(task="target", reduction="sum"))
    store.work(task_numbers)
    recipe, sources = store.recipes.resolve(Query(tasks=["target"], k=1), path="/select")
    assert (recipe.reduction, sources.tasks[recipe.tasks[0]][0].reduction) == ("mean", "mean")
    pool = recipe.datasets[0]
    assert answered(store, Query(tasks=["target"], reduction="sum", datasets=["pool"], dim=DIM, k=1)) == [pool]


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
    monkeypatch.setattr("datastore.features.shutil.disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(NotEnoughSpace):
        store.features.start(request(dataset="pool"))
    assert store.jobs.page(limit=1).data == []


def test_a_selection_is_the_brute_force_one(store: Store, tmp_path: Path) -> None:
    filled(store, tmp_path)
    selection = select(store)
    weights = np.array([1e-4, 1e-4 / 2]) / (1e-4 + 1e-4 / 2)
    means = np.zeros((2500, 2))
    for weight, checkpoint in zip(weights, ("ck_0", "ck_1"), strict=True):
        pool = numbers(checkpoint, 0, 2500, DIM).astype(np.float64)
        target = task_numbers(checkpoint, 0, 5, DIM).astype(np.float64)
        pool /= np.linalg.norm(pool, axis=1, keepdims=True)
        target /= np.linalg.norm(target, axis=1, keepdims=True)
        similarity = pool @ target.T
        means += weight * np.stack([similarity[:, :3].mean(axis=1), similarity[:, 3:].mean(axis=1)], axis=1)
    expected = np.argsort(-means.max(axis=1), kind="stable")[:125]
    assert selection.count == 125
    assert len(set(expected) & {row.row for row in selection.data}) >= 124  # one tie within float16's rounding
    scores = np.array([row.score for row in selection.data])
    np.testing.assert_allclose(scores, means.max(axis=1)[[row.row for row in selection.data]], atol=2e-3)
    assert (np.diff(scores) <= 0).all()
    names = ["algebra", "history"]
    subtasks = [names[best] for best in means.argmax(axis=1)[[row.row for row in selection.data]]]
    assert sum(row.subtask == name for row, name in zip(selection.data, subtasks, strict=True)) >= 124
    assert [row.id for row in selection.data] == [str(row.row) for row in selection.data]
    assert selection.pool_origins == {"origin0": 834, "origin1": 833, "origin2": 833}


def test_a_selection_is_found_again_and_its_lines_are_the_original_rows(store: Store, tmp_path: Path) -> None:
    filled(store, tmp_path, rows=100)
    selection = select(store, pct=None, k=3)
    assert store.answers.read(selection.id, limit=2).data == selection.data[:2]
    assert store.answers.read(selection.id, limit=2, after=2).data == selection.data[2:]
    lines = list(store.answers.lines(selection.id))
    original = store.datasets.content(selection.recipe.datasets[0]).read_bytes().split(b"\n")
    assert lines == [original[row.row] for row in selection.data]
    assert store.answers.find(selection.recipe, limit=1) is not None


def test_left_out_rows_are_replaced_by_the_next_best(store: Store, tmp_path: Path) -> None:
    filled(store, tmp_path, rows=100)
    first = select(store, pct=None, k=5)
    second = select(store, pct=None, k=5, exclude=(first.id,))
    both = select(store, pct=None, k=10)
    assert [row.row for row in second.data] == [row.row for row in both.data[5:]]
    assert second.left_out == {"excluded": 5}
    assert second.pool == 95


def test_with_one_candidate_everything_but_the_task_may_be_left_out(store: Store, tmp_path: Path) -> None:
    filled(store, tmp_path, rows=50)
    recipe, _ = store.recipes.resolve(Query(tasks=["target"], k=1), path="/select")
    assert (recipe.run, recipe.kind, recipe.task_kind, recipe.dim) == ("run_1", "adam", "sgd", DIM)
    assert recipe.checkpoint_weights == pytest.approx([2 / 3, 1 / 3])


def test_several_candidates_are_listed_with_urls_that_answer(store: Store, tmp_path: Path) -> None:
    filled(store, tmp_path, rows=50)
    store.features.start(request(dataset="pool", kinds=["sgd"]))
    store.work(numbers)
    with pytest.raises(Ambiguous) as caught:
        store.recipes.resolve(Query(tasks=["target"], k=1), path="/select")
    assert len(caught.value.choices) == 2
    assert {"kind=adam" in choice for choice in caught.value.choices} == {True, False}
    assert store.recipes.resolve(Query(tasks=["target"], k=1, kind="sgd"), path="/select")[0].kind == "sgd"


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("adam", "exact"),
        ("reduction", "sum"),
        ("seed", 1),
        ("dtype", "float32"),
        ("projection", "rademacher"),
        ("template", "chat"),
        ("max_length", 32),
        ("precision", "bfloat16"),
        ("quantisation", "int8"),
    ],
)
def test_features_that_differ_in_one_thing_are_candidates_with_urls_of_their_own(
    store: Store, tmp_path: Path, name: str, other: object
) -> None:
    filled(store, tmp_path, rows=50)
    before = store.recipes.resolve(Query(tasks=["target"], k=1), path="/select")
    for owner in ({"dataset": "pool"}, {"task": "target"}):
        store.features.start(request(**owner, **{name: other}))
        store.work(numbers)
    with pytest.raises(Ambiguous) as caught:
        store.recipes.resolve(Query(tasks=["target"], k=1), path="/select")
    answers = [store.recipes.resolve(asked(url), path="/select") for url in caught.value.choices]
    assert [getattr(recipe, name) for recipe, _ in answers] == [getattr(before[0], name), other]
    assert answers[0] == before


def asked(url: str) -> Query:
    """The question of an URL of /select."""
    values = parse_qs(urlsplit(url).query)
    several = {"task": "tasks", "dataset": "datasets", "checkpoint": "checkpoints"}
    lists = {several[name]: value for name, value in values.items() if name in several}
    numbers = {name: int(values[name][0]) for name in ("dim", "seed", "max_length", "k") if name in values}
    words = {name: value[0] for name, value in values.items() if name not in {*several, *numbers}}
    return Query(**lists, **numbers, **words)  # type: ignore[arg-type]


def test_missing_features_are_answered_with_the_post_that_computes_them(store: Store, tmp_path: Path) -> None:
    store.task({"one": 2}, folder=tmp_path / "task")
    pool = store.pool(20, name="pool")
    with pytest.raises(GradientsMissing) as caught:
        store.recipes.resolve(Query(tasks=["target"], datasets=["pool"], k=1), path="/select")
    assert caught.value.body == {"dataset": pool.id, "run": "run_1"}
    store.features.start(GradientsRequest.model_validate({**caught.value.body, "dims": [DIM]}))
    store.work(numbers)
    with pytest.raises(GradientsMissing) as caught:
        store.recipes.resolve(Query(tasks=["target"], k=1), path="/select")
    store.features.start(GradientsRequest.model_validate(caught.value.body))
    store.work(task_numbers)
    assert store.recipes.resolve(Query(tasks=["target"], k=1), path="/select")[0].datasets == [pool.id]


def answered(store: Store, query: Query) -> list[str]:
    """Send the POST of every refusal until the question has its answer: the datasets and tasks that were sent."""
    sent: list[str] = []
    while len(sent) < 5:
        try:
            store.recipes.resolve(query, path="/select")
        except GradientsMissing as missing:
            wanted = GradientsRequest.model_validate(missing.body)
            store.features.start(wanted)
            sent.append(wanted.dataset or wanted.task or "")
            store.work(task_numbers if wanted.task else numbers)
        else:
            return sent
    raise AssertionError(f"the same question is refused after {sent}")


def test_of_several_pools_the_one_without_features_is_sent_with_the_parameters_of_the_others(
    store: Store, tmp_path: Path
) -> None:
    filled(store, tmp_path, rows=20)
    other = store.pool(10, name="other", first=100)
    assert answered(store, Query(tasks=["target"], datasets=["pool", "other"], k=1)) == [other.id]


def test_missing_features_of_a_task_are_sent_with_the_projection_of_the_pool(store: Store, tmp_path: Path) -> None:
    task = store.task({"one": 2}, folder=tmp_path / "task")
    store.pool(20, name="pool")
    parameters = store.catalog.checkpoint("ck_0").parameters
    store.features.start(request(dataset="pool", projection="none", dims=[parameters]))
    store.work(numbers)
    assert answered(store, Query(tasks=["target"], k=1)) == [task.id]


def test_an_unfinished_job_answers_nothing(store: Store, tmp_path: Path) -> None:
    store.pool(1500, name="pool")
    store.features.start(request(dataset="pool"))
    store.work(numbers, shards=3)
    store.task({"one": 2}, folder=tmp_path / "task")
    with pytest.raises(GradientsMissing):
        store.recipes.resolve(Query(tasks=["target"], k=1), path="/select")


def test_a_grown_pool_scores_like_one_computed_at_once(store: Store, tmp_path: Path) -> None:
    filled(store, tmp_path, rows=1500)
    grown = store.pool(1700)
    store.features.start(request(dataset=grown.id))
    store.work(numbers)
    other = Store.at(tmp_path / "other")
    for number in range(2):
        other.checkpoint(number)
    other.catalog.add_run(id="run_1", checkpoints=["ck_0", "ck_1"], name="warm-up")
    filled(other, tmp_path, rows=1700)
    pieces = select(store, datasets=(grown.id,))
    whole = select(other)
    assert [row.row for row in pieces.data] == [row.row for row in whole.data]
    np.testing.assert_allclose([row.score for row in pieces.data], [row.score for row in whole.data], atol=1e-6)
