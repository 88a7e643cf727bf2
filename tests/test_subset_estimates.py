"""Estimates over features whose worth is known: some labels lead the target's answers up, others down."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from gradstore.types import (
    AnnotationRequest,
    Capability,
    EstimatesRequest,
    EstimatesResult,
    EstimateValidationRequest,
    EstimateValidationResult,
    SelectionRecipe,
)
from numpy.typing import NDArray
from pydantic import ValidationError

from datastore import backups, estimate_plans, gradex, taxonomies
from datastore.doctor import examine
from datastore.errors import Ambiguous, Conflict, Damaged, GradientsMissing, InUse, InvalidInput, NotFound
from datastore.gradex import Pool, TargetRows
from datastore.leases import Claim
from datastore.parameters import Query
from datastore.schema import DatasetRow
from datastore.trainings import Measured, Training
from tests.stores import DIM, Store, request
from tests.test_recipes import asked

POOL = 60
SUBTASKS = {"a": 6, "b": 4}
LABELS = {str(row): f"group{row % 6}" for row in range(POOL)}
GOOD = {"group0", "group1", "group2"}


def pool_numbers(_: str, start: int, stop: int, dim: int) -> NDArray[np.float32]:
    """Rows of the good labels lead one way, the others the other way."""
    rows = [np.random.default_rng([row, dim]).normal(size=dim) + worth(row) / 2 for row in range(start, stop)]
    return np.array(rows, np.float32)


def worth(row: int) -> int:
    return 1 if LABELS[str(row)] in GOOD else -1


def target_numbers(_: str, start: int, stop: int, dim: int) -> NDArray[np.float32]:
    rows = [np.random.default_rng([1_000_000 + row, dim]).normal(0.5, 0.5, dim) for row in range(start, stop)]
    return np.array(rows, np.float32)


@dataclass(frozen=True)
class World:
    """A store with the log-odds features of a pool and a task, and no worker."""

    store: Store
    folder: Path

    @classmethod
    def at(cls, folder: Path, **changes: Any) -> World:
        model = folder / "model"
        model.mkdir(parents=True)
        (model / "config.json").write_text('{"hidden_size": 24}')
        world = cls(Store.at(folder / "store", allowed_roots=(folder,)), folder)
        for number in range(2):
            world.store.checkpoint(number, model=str(model))
        world.store.pool(POOL, name="pool")
        world.store.task(SUBTASKS, folder=folder / "task")
        world.compute(**changes)
        return world

    def compute(self, **changes: Any) -> None:
        numbers = {"dataset": ("pool", pool_numbers), "task": ("target", target_numbers)}
        for owner, (name, found) in numbers.items():
            asked = {owner: name, "kinds": ["logodds"], "dtype": "float32", "run": None, "checkpoints": ["ck_0"]}
            self.store.features.start(request(**{**asked, **changes}))
            self.store.work(found)

    def request(self, **changes: Any) -> EstimatesRequest:
        values = {"dataset": "pool", "tasks": ["target"], "group_by": "label", "labels": LABELS, "abs_scale": 2.0}
        return EstimatesRequest.model_validate({**values, **changes})

    def claim(self) -> Claim:
        claim = self.store.jobs.claim("test", kinds=["estimates"])
        assert claim is not None, "no subsets wait"
        return claim

    def work(self) -> None:
        while (claim := self.store.jobs.claim("test", kinds=["estimates"])) is not None:
            assert self.store.estimates.finish(claim, self.store.estimates.work(claim))

    def done(self, **changes: Any) -> tuple[str, EstimatesResult]:
        job, _ = self.store.estimates.start(self.request(**changes))
        self.work()
        return job.id, self.store.estimates.finished(job.id)[1]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World.at(tmp_path)


def by_hand(subset: list[str], *, c: float, length: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Losses and accuracies of a subset: of the subtasks, and of all rows."""
    mine = [row for row in range(POOL) if LABELS[str(row)] in subset]
    features = pool_numbers("", 0, POOL, DIM).astype(np.float64)[mine]
    weights = gradex.fit(Pool.of(features, np.zeros(len(mine), np.int64), count=1), np.ones((1, 1), bool), c=c).weights
    factor = length / (np.sqrt(100 / DIM) * np.linalg.norm(weights))
    rows = target_numbers("", 0, 10, DIM).astype(np.float64)
    after = rows[:, 0] + factor * rows @ weights[0]
    parts = [slice(0, 6), slice(6, 10), slice(0, 10)]
    return (
        np.array([np.logaddexp(0, -after[part]).mean() for part in parts]),
        np.array([(after[part] > 0).mean() for part in parts]),
    )


# Subsets --------------------------------------------------------------------------------------------------------------


def test_a_subset_is_estimated_as_its_rows_and_the_step_say(world: World) -> None:
    subsets = [["group0", "group4"], ["group3"], ["group1", "group2", "group5"]]
    id, result = world.done(subsets=subsets, c=0.05)
    assert [(target.task, target.subtask, target.rows) for target in result.targets] == [
        (world.store.catalog.task("target").id, name, rows) for name, rows in (("a", 6), ("b", 4), (None, 10))
    ]
    rows = target_numbers("", 0, 10, DIM).astype(np.float64)
    assert result.targets[-1].loss == pytest.approx(np.logaddexp(0, -rows[:, 0]).mean())
    page = world.store.estimates.subsets(id, after=0, limit=10)
    assert not page.has_more
    for subset, found in zip(subsets, page.data, strict=True):
        losses, accuracies = by_hand(subset, c=0.05, length=2.0)
        np.testing.assert_allclose([each.loss for each in found.estimates], losses)
        np.testing.assert_allclose([each.accuracy for each in found.estimates], accuracies)
        assert [result.groups[group].label for group in found.groups] == subset
        assert (found.rows, found.missing_rows, found.length) == (10 * len(subset), 0, pytest.approx(2.0))
        assert 0 < found.fit_loss < np.log(2)


def test_subsets_are_drawn_by_the_seed_and_pages_go_on_where_the_last_one_ends(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    id, result = world.done(count=11, fraction=0.5)
    whole = world.store.estimates.subsets(id, after=0, limit=100).data
    assert result.subsets == 11
    assert {len(subset.groups) for subset in whole} == {3}
    assert len({tuple(subset.groups) for subset in whole}) > 5
    monkeypatch.setattr(estimate_plans, "SHARD_SUBSETS", 4)
    other, _ = world.done(count=11, fraction=0.5, c=1.1e-4)
    assert other != id
    parts = [world.store.estimates.subsets(other, after=after, limit=6) for after in (0, 6)]
    assert [part.has_more for part in parts] == [True, False]
    again = [subset for part in parts for subset in part.data]
    assert [subset.groups for subset in again] == [subset.groups for subset in whole]
    assert [subset.subset for subset in again] == list(range(11))
    labels = {str(row): f"{row:02}" for row in range(50)}
    many, _ = world.done(count=3, labels=labels, fraction=0.58)  # of floats 0.58 · 50 is 28.999…
    assert {len(subset.groups) for subset in world.store.estimates.subsets(many, after=0, limit=3).data} == {29}
    seeded, _ = world.done(count=11, draw_seed=1)
    assert [subset.groups for subset in world.store.estimates.subsets(seeded, after=0, limit=100).data] != [
        subset.groups for subset in whole
    ]


def test_shards_and_workers_change_no_estimate(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = world.done(count=9)
    monkeypatch.setattr(estimate_plans, "SHARD_SUBSETS", 2)
    second, _ = world.done(count=9)
    assert first != second
    one, other = (world.store.estimates.arrays(id) for id in (first, second))
    np.testing.assert_array_equal(one["members"], other["members"])
    np.testing.assert_allclose(one["losses"], other["losses"], rtol=1e-8)


def test_good_groups_are_told_from_bad_ones_however_they_are_compared(world: World) -> None:
    for search in ("ensemble", "surrogate", "forward-scan", "stepwise", "backward"):
        own = {} if search in ("forward-scan", "stepwise", "backward") else {"count": 60}
        for metric in ("loss", "accuracy"):
            _, result = world.done(search=search, metric=metric, abs_scale=1.0, **own)
            scores = {group.label: group.score or 0.0 for group in result.groups}
            good, bad = ([scores[label] for label in sorted(scores) if (label in GOOD) == one] for one in (True, False))
            if metric == "loss":
                assert min(good) > max(bad), (search, scores)
            else:
                assert np.mean(good) >= np.mean(bad), (search, scores)
            if result.chosen is not None:
                chosen = {result.groups[group].label for group in result.chosen}
                assert chosen & GOOD
                assert result.trace
                if metric == "loss":
                    assert chosen <= GOOD


def test_an_ensemble_is_the_mean_of_the_subsets_of_the_page_and_a_surrogate_tells_them(world: World) -> None:
    id, result = world.done(count=60, abs_scale=1.0)
    subsets = world.store.estimates.subsets(id, after=0, limit=100).data
    losses = np.array([subset.estimates[-1].loss for subset in subsets])
    for group in result.groups:
        mine = np.array([group.group in subset.groups for subset in subsets])
        assert group.subsets == mine.sum()
        assert group.mean == pytest.approx(losses[mine].mean())
        assert group.score == pytest.approx(-losses[mine].mean())
    assert result.surrogate is not None
    assert result.surrogate.held_out == 12
    assert result.surrogate.spearman > 0.8
    assert result.surrogate.relative_rss < 0.05


def test_a_scan_tries_each_group_once_and_its_trace_has_the_losses_of_its_subsets(world: World) -> None:
    id, result = world.done(search="forward-scan", c=0.05)
    subsets = world.store.estimates.subsets(id, after=0, limit=100).data
    assert result.subsets == len(result.trace) == 6
    kept: list[int] = []
    best = np.inf
    for step, subset in zip(result.trace, subsets, strict=True):
        assert subset.groups == sorted([*kept, step.group])
        assert step.value == pytest.approx(subset.estimates[-1].loss)
        assert step.kept == (step.value <= best)
        if step.kept:
            kept, best = [*kept, step.group], step.value
    assert result.chosen == sorted(kept)
    assert result.chosen_value == pytest.approx(best)


def test_estimates_that_differ_in_how_groups_are_compared_share_their_subsets(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = world.done(count=20)

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("these subsets are estimated")

    monkeypatch.setattr(gradex, "fit", never)
    second, result = world.done(count=20, search="surrogate", metric="accuracy")
    assert second != first
    assert result.subsets == 20
    assert result.groups[0].coefficient is not None
    world.store.estimates.remove(first)
    assert world.store.estimates.subsets(second, after=0, limit=3).data


# Groups and rows ------------------------------------------------------------------------------------------------------


def test_groups_are_origins_by_default(world: World) -> None:
    _, result = world.done(group_by="origin", labels=None, count=4)
    assert [(group.label, group.rows) for group in result.groups] == [(f"origin{n}", 20) for n in range(3)]


def test_groups_may_be_clusters_of_the_features(world: World) -> None:
    id, result = world.done(group_by="cluster", labels=None, clusters=5, count=4)
    assert [group.label for group in result.groups] == list("01234")
    assert sum(group.rows for group in result.groups) == POOL
    assert result.groups[0].group == 0
    assert world.store.estimates.start(world.request(group_by="cluster", labels=None, clusters=5, count=4))[0].id == id


def annotated(world: World, capabilities: dict[str, list[str]], **changes: Any) -> str:
    """An annotation of the pool with these labels by id."""
    names = sorted({name for labels in capabilities.values() for name in labels})
    taxonomy = taxonomies.record(world.store.catalog, [Capability(name=name) for name in names])
    file = world.folder / "labels.jsonl"
    file.write_text("".join(json.dumps({"id": id, "categories": found}) + "\n" for id, found in capabilities.items()))
    request = AnnotationRequest.model_validate({"dataset": "pool", "taxonomy": taxonomy.id, **changes})
    return world.store.annotations.upload(request, file)[0].id


def test_groups_may_be_the_labels_of_an_annotation(world: World) -> None:
    labels = {str(row): ["even"] if row % 2 == 0 else ["odd"] for row in range(POOL)}
    labels |= {"4": ["even", "four"], "44": ["four", "even"]}
    annotation = annotated(world, labels)
    by_hand = {id: " + ".join(sorted(found)) for id, found in labels.items()}
    _, told = world.done(group_by="annotation", labels=None, annotations=annotation, subsets=[["odd"], ["even + four"]])
    _, same = world.done(labels=by_hand, subsets=[["odd"], ["even + four"]])
    assert {group.label: (group.rows, group.score) for group in told.groups} == {
        group.label: (group.rows, group.score) for group in same.groups
    }
    assert {group.label: group.rows for group in told.groups} == {"even": 28, "even + four": 2, "odd": 30}
    with pytest.raises(InUse):
        world.store.annotations.remove(annotation)


def test_an_annotation_that_does_not_cover_the_pool_is_refused(world: World) -> None:
    labels = {str(row): ["even"] if row % 2 == 0 else ["odd"] for row in range(POOL)}
    gap = annotated(world, {id: found for id, found in labels.items() if id != "7"})
    asked = {"group_by": "annotation", "labels": None, "count": 3}
    with pytest.raises(InvalidInput, match="no label of 1 of 60 rows, the first of them row 7") as told:
        world.store.estimates.start(world.request(**asked, annotations=gap))
    assert [error.pointer for error in told.value.errors] == ["/annotations"]
    nothing = annotated(world, labels | {"9": []})
    with pytest.raises(InvalidInput, match="row 9"):
        world.store.estimates.start(world.request(**asked, annotations=nothing))
    world.store.pool(POOL + 1, name="other")
    elsewhere = annotated(world, labels, dataset="other", on_error="skip")
    with pytest.raises(InvalidInput, match="annotate the pool"):
        world.store.estimates.start(world.request(**asked, annotations=elsewhere))
    with pytest.raises(NotFound):
        world.store.estimates.start(world.request(**asked, annotations="nothing"))


def test_rows_without_a_label_or_a_feature_are_counted_and_have_no_score(tmp_path: Path) -> None:
    def with_zeros(name: str, start: int, stop: int, dim: int) -> NDArray[np.float32]:
        rows = pool_numbers(name, start, stop, dim)
        rows[[0, 7]] = 0
        return rows

    world = World.at(tmp_path)
    world.store.features.start(
        request(dataset="pool", kinds=["logodds"], dtype="float32", run=None, checkpoints=["ck_1"])
    )
    world.store.work(with_zeros)
    world.store.features.start(
        request(task="target", kinds=["logodds"], dtype="float32", run=None, checkpoints=["ck_1"])
    )
    world.store.work(target_numbers)
    labels = {id: label for id, label in LABELS.items() if id != "5"}
    id, result = world.done(checkpoint="ck_1", labels=labels, count=12)
    assert (result.rows, result.missing_rows, result.ungrouped_rows) == (POOL - 3, 2, 1)
    assert [group.rows for group in result.groups] == [9, 9, 10, 10, 10, 9]
    page = world.store.estimates.subsets(id, after=0, limit=12).data
    for subset in page:
        assert subset.rows + subset.missing_rows == 10 * len(subset.groups) - (5 in subset.groups)
    [scores], valid = world.store.estimates.row_scores(id, [world.store.catalog.task("target").id])
    assert np.flatnonzero(~valid).tolist() == [0, 5, 7]
    assert len(set(scores[valid].tolist())) == 6


def test_a_step_may_be_measured_by_the_adapters_length(world: World) -> None:
    tensors = {
        "base_model.model.q_proj.lora_A.weight": np.full((2, 3), 2.0, np.float16),
        "base_model.model.q_proj.lora_B.weight": np.ones((3, 2), np.float32),
        "base_model.model.norm.weight": np.full(7, 9.0, np.float32),
    }
    folder = world.store.settings.checkpoints / "ck_0" / "adapter"
    folder.mkdir(parents=True)
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors")
    id, result = world.done(abs_scale=None, scale=0.5, count=3)
    assert result.adapter_length == pytest.approx(np.sqrt(6 * 4 + 6))
    lengths = [subset.length for subset in world.store.estimates.subsets(id, after=0, limit=3).data]
    np.testing.assert_allclose(lengths, 0.5 * np.sqrt(30))
    plain, result = world.done(abs_scale=None, rescale=False, count=3)
    assert result.adapter_length is None
    arrays = world.store.estimates.arrays(plain)
    np.testing.assert_allclose(arrays["lengths"], np.sqrt(100 / DIM) * np.linalg.norm(arrays["weights"], axis=1))


# Jobs and requests ----------------------------------------------------------------------------------------------------


def test_what_is_asked_for_again_is_the_same(world: World) -> None:
    job, begun = world.store.estimates.start(world.request(name="mine", count=5))
    assert begun
    assert job.id.startswith("est_")
    assert (job.progress.total, job.progress.unit) == (5, "subsets")
    pool, task = world.store.catalog.dataset("pool").id, world.store.catalog.task("target").id
    same, _ = world.store.estimates.start(world.request(dataset=pool, tasks=[task, "target"], count=5))
    assert (same.id, same.name) == (job.id, "mine")
    for changes in ({"count": 6}, {"c": 1.0}, {"draw_seed": 1}, {"abs_scale": 3.0}, {"search": "surrogate"}):
        assert world.store.estimates.start(world.request(**{"count": 5, **changes}))[0].id != job.id
    with pytest.raises(Conflict, match="can be read once it has succeeded"):
        world.store.estimates.subsets("mine", after=0, limit=1)


def test_features_that_are_missing_are_told_with_the_post_that_computes_them(world: World) -> None:
    world.store.task({"c": 2}, folder=world.folder / "other", name="other")
    with pytest.raises(GradientsMissing, match="POST /gradients") as told:
        world.store.estimates.start(world.request(tasks=["target", "other"]))
    body = dict(told.value.body)
    assert (body["task"], body["kinds"], body["dims"]) == (world.store.catalog.task("other").id, ["logodds"], [DIM])
    world.store.features.start(request(**{"run": None, **body}))
    world.store.work(target_numbers)
    world.store.estimates.start(world.request(tasks=["target", "other"]))
    with pytest.raises(GradientsMissing, match="has no log-odds features"):
        world.store.estimates.start(world.request(dim=DIM + 1))


def test_of_several_feature_sets_one_is_to_be_named(world: World) -> None:
    world.compute(dims=[8])
    with pytest.raises(Ambiguous) as told:
        world.store.estimates.start(world.request())
    assert told.value.choices == [f"/estimates?dim={DIM}", "/estimates?dim=8"]
    world.store.estimates.start(world.request(dim=8))


@pytest.mark.parametrize(
    ("changes", "pointer", "detail"),
    [
        ({"subsets": [["group0"], ["nothing"]]}, "/subsets/1", "no group is called 'nothing'"),
        ({"subsets": [[]]}, "/subsets/0", "at least one group"),
        ({"labels": {"1": "alone"}}, "/group_by", "one group alone"),
        (
            {"labels": {"1": "a", "x": "b", "y": "b"}},
            "/labels",
            "has the label 'b': it has no example with the id 'x'",
        ),
        ({"group_by": "cluster", "labels": None, "clusters": POOL + 1}, "/clusters", "60 rows"),
    ],
)
def test_a_request_that_means_nothing_is_refused(
    world: World, changes: dict[str, Any], pointer: str, detail: str
) -> None:
    with pytest.raises(InvalidInput, match=detail) as told:
        world.store.estimates.start(world.request(**changes))
    assert [error.pointer for error in told.value.errors] == [pointer]


@pytest.mark.parametrize(
    "changes",
    [
        {"group_by": "origin"},
        {"labels": None},
        {"clusters": 3},
        {"annotations": "mine"},
        {"group_by": "annotation", "labels": None},
        {"search": "stepwise", "count": 3},
        {"subsets": [["group0"]], "count": 3},
        {"scale": 0.3},
        {"rescale": False},
        {"fraction": 1.0},
    ],
)
def test_a_request_that_contradicts_itself_is_refused(world: World, changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        world.request(**changes)


def test_a_shard_may_be_done_twice_and_a_stalled_worker_changes_nothing(world: World) -> None:
    job, _ = world.store.estimates.start(world.request(count=5))
    stalled = world.claim()
    key = world.store.estimates.work(stalled)
    world.store.jobs.release(stalled)
    again = world.claim()
    assert world.store.estimates.work(again) == key
    assert not world.store.estimates.finish(stalled, key)
    assert world.store.estimates.finish(again, key)
    assert world.store.jobs.get(job.id).status == "succeeded"


def test_arrays_that_were_lost_are_told_of(world: World) -> None:
    world.store.estimates.start(world.request(count=5))
    claim = world.claim()
    key = world.store.estimates.work(claim)
    world.store.estimates.files.delete([key])
    with pytest.raises(Damaged, match="the next attempt does it again"):
        world.store.estimates.finish(claim, key)
    assert world.store.estimates.finish(claim, world.store.estimates.work(claim))
    (world.store.settings.estimates / key / "losses.npy").write_bytes(b"other")
    with pytest.raises(Damaged, match="send them again"):
        world.store.estimates.subsets(claim.job, after=0, limit=1)


def test_deleted_estimates_leave_nothing_and_what_nobody_recorded_is_swept(world: World) -> None:
    id, _ = world.done(count=5)
    root = world.store.settings.estimates
    with pytest.raises(Conflict, match="est_"):
        world.store.catalog.remove(DatasetRow, "pool")
    world.store.estimates.start(world.request(count=6))
    unrecorded = world.store.estimates.work(world.claim())
    world.store.estimates.sweep(older_than=3600)
    assert (root / unrecorded).exists()
    world.store.estimates.sweep(older_than=-1)
    assert not (root / unrecorded).exists()
    assert world.store.estimates.subsets(id, after=0, limit=1).data
    for job in world.store.jobs.page(kind="estimates", limit=10, after=None).data:
        if job.status != "succeeded":
            world.store.jobs.cancel(job.id)
        world.store.estimates.remove(job.id)
    assert [path.name for path in root.iterdir() if path.name != "unfinished"] == []


# Selections -----------------------------------------------------------------------------------------------------------


def recipe_of(world: World, **said: Any) -> SelectionRecipe:
    recipe, sources = world.store.recipes.resolve(Query(tasks=["target"], method="gradex", **said), path="/select")
    assert not sources.datasets
    return recipe


def test_a_selection_takes_the_rows_of_the_best_groups(world: World) -> None:
    id, _ = world.done(count=60, abs_scale=1.0, name="mine")
    recipe = recipe_of(world, k=30)
    assert (recipe.by, recipe.datasets, recipe.aggregate) == (id, [world.store.catalog.dataset("pool").id], None)
    assert recipe_of(world, k=30, by="mine") == recipe
    sources = world.store.recipes.sent(recipe)
    scores = world.store.scoring.known(recipe, sources)
    assert scores is not None
    chosen = world.store.answers.select(recipe, sources, scores, limit=30)
    assert {LABELS[row.id or ""] for row in chosen.data} == GOOD
    assert {row.subtask for row in chosen.data} == {None}
    with pytest.raises(InUse):
        world.store.estimates.remove(id)


def test_a_selection_says_what_a_search_has_chosen_and_why_rows_have_no_score(world: World) -> None:
    world.done(search="stepwise", labels={id: label for id, label in LABELS.items() if id != "9"}, abs_scale=1.0)
    recipe = recipe_of(world, pct=0.5)
    sources = world.store.recipes.sources(recipe)
    [note] = world.store.scoring.notes(recipe, sources)
    assert "of 6 groups" in note
    assert world.store.scoring.reasons(recipe, sources) == {9: "it is in no group"}


def test_estimates_for_a_selection_are_to_be_there_and_to_be_the_only_ones(world: World) -> None:
    with pytest.raises(Conflict, match="POST /estimates"):
        recipe_of(world, k=3)
    with pytest.raises(NotFound):
        recipe_of(world, k=3, by="est_nothing")
    world.done(count=5)
    world.done(count=6)
    with pytest.raises(Ambiguous, match="by=") as told:
        recipe_of(world, k=3)
    answers = [world.store.recipes.resolve(asked(choice), path="/select")[0] for choice in told.value.choices]
    assert len({answer.by for answer in answers}) == 2
    assert {answer.k for answer in answers} == {3}
    world.store.task({"c": 2}, folder=world.folder / "other", name="other")
    job = world.store.jobs.page(kind="estimates", limit=1, after=None).data[0].id
    with pytest.raises(InvalidInput, match="no estimates for"):
        world.store.recipes.resolve(Query(tasks=["other"], method="gradex", by=job, k=3), path="/select")
    with pytest.raises(InvalidInput, match="aggregate"):
        recipe_of(world, k=3, aggregate="max")


def test_a_doctor_says_which_estimates_are_damaged_or_gone_and_removes_nothing(world: World) -> None:
    world.done(count=5)
    [part] = world.store.settings.estimates.glob("part_*")
    place = f"estimates/{part.name}"

    def found() -> list[tuple[str, str]]:
        told = examine(world.store, older_than=0, deep=True)
        return [(one.kind, one.place) for one in told if one.place.startswith("estimates")]

    assert found() == []
    losses = part / "losses.npy"
    losses.write_bytes(losses.read_bytes()[:-1] + b"x")
    assert found() == found() == [("damaged", place)]
    shutil.rmtree(part)
    assert found() == [("missing", place)]


def test_a_backup_has_what_was_estimated(world: World) -> None:
    id, _ = world.done(count=5)
    before = world.store.estimates.subsets(id, after=0, limit=5)
    backups.backup(world.store, world.folder / "backup")
    again = Store.at(world.folder / "again")
    backups.restore(again, world.folder / "backup")
    assert again.estimates.subsets(id, after=0, limit=5) == before
    again.catalog.close()


# Validations ----------------------------------------------------------------------------------------------------------


def validated(world: World, losses: Any, **changes: Any) -> EstimateValidationResult:
    """A validation whose trainings end with these losses."""
    values = {"estimates": "mine", "model": str(world.folder / "model"), "subsets": 8, "batch_size": 4}
    asked = EstimateValidationRequest.model_validate(
        {**values, "device_batch_size": 4, "bootstrap_samples": 100, **changes}
    )
    validations = world.store.estimate_validations
    job, _ = validations.start(asked)
    while (claim := world.store.jobs.claim("test", kinds=["estimate-validation"])) is not None:
        training = validations.training(claim.plan, claim.payload)
        if validations.trainings.get(training.key) is None:
            measured = Measured(losses(training), rows=len(training.rows), tokens=10, seconds=100.0)
            validations.trainings.put(training, measured)
        assert validations.finish(claim, training.key)
    job = world.store.jobs.get(job.id)
    assert job.status == "succeeded", job.error
    assert job.result is not None
    return EstimateValidationResult.model_validate(job.result.model_dump())


def as_estimated(*, length: float) -> Any:
    """Trainings that end exactly where estimates with a step of this length say."""

    def losses(training: Training) -> list[float | None]:
        loss = by_hand(sorted({LABELS[str(row)] for row in training.rows}), c=0.05, length=length)[0][-1]
        return [float(loss)] * 10

    return losses


def test_estimates_that_are_what_training_gives_have_no_error(world: World) -> None:
    id, _ = world.done(count=12, c=0.05, name="mine")
    found = validated(world, as_estimated(length=2.0))
    assert found.own.relative_rss == pytest.approx(0, abs=1e-12)
    assert found.own.spearman == pytest.approx(1)
    assert found.best.scale == 2.0
    assert found.spearman_low <= 1 <= found.spearman_high + 1e-9
    assert found.training_seconds == 100
    assert found.speedup == pytest.approx(100 / found.estimate_seconds)
    page = world.store.estimates.subsets(id, after=0, limit=12).data
    np.testing.assert_allclose(
        [subset.estimate for subset in found.subsets],
        [page[subset.subset].estimates[-1].loss for subset in found.subsets],
    )
    assert len({tuple(page[subset.subset].groups) for subset in found.subsets}) == 8
    assert [subset.rows for subset in found.subsets] == [30] * 8


def test_the_scale_is_calibrated_by_the_grid_and_errors_are_what_numpy_says(world: World) -> None:
    world.done(count=12, c=0.05, name="mine")
    found = validated(world, as_estimated(length=5.0), scales=[1.0, 5.0, 3.0])
    assert [fit.scale for fit in found.scales] == [1.0, 3.0, 5.0]
    assert found.best.scale == 5.0
    assert found.best.relative_rss == pytest.approx(0, abs=1e-12)
    told, true = (np.array([getattr(each, name) for each in found.subsets]) for name in ("estimate", "loss"))
    assert found.own.relative_rss == pytest.approx(((told - true) ** 2).sum() / (true**2).sum())
    assert found.own.mean_ratio == pytest.approx((((told - true) / true) ** 2).mean())
    without = [np.polyfit(np.delete(told, n), np.delete(true, n), 1) for n in range(8)]
    line = np.array([np.polyval(fit, told[n]) for n, fit in enumerate(without)])
    assert found.line_rss == pytest.approx(((line - true) ** 2).sum() / (true**2).sum())
    assert found.constant_rss == pytest.approx(((true.mean() - true) ** 2).sum() / (true**2).sum())


def test_rows_without_a_loss_are_compared_by_neither(world: World) -> None:
    world.done(count=12, c=0.05, name="mine")
    found = validated(world, lambda training: [None, *as_estimated(length=2.0)(training)[1:]])
    assert found.left_out_targets == 1
    target = target_numbers("", 1, 10, DIM).astype(np.float64)
    arrays = world.store.estimates.arrays(world.store.jobs.get("mine", kind="estimates").id)
    rows = TargetRows(target[:, 0], target, np.zeros(9, np.int64), 1)
    weights = arrays["weights"][[subset.subset for subset in found.subsets]]
    factors, _ = gradex.step_factors(gradex.unprojected_lengths(weights, parameters=100), scale=2.0, length=1.0)
    expected = gradex.estimated(rows, weights, factors)[0][:, -1]
    np.testing.assert_allclose([subset.estimate for subset in found.subsets], expected)


def test_a_validation_keeps_its_estimates_and_shares_its_trainings(world: World) -> None:
    world.done(count=12, c=0.05, name="mine")
    validated(world, as_estimated(length=2.0), name="first")

    def never(training: Training) -> list[float | None]:
        raise AssertionError("this training exists")

    validated(world, never, scales=[1.0], name="second")
    with pytest.raises(InUse):
        world.store.estimates.remove("mine")
    root = world.store.estimate_validations.trainings.root
    kept = list(root.iterdir())
    assert len(kept) == 8  # a subset that is drawn twice is trained on once
    world.store.estimate_validations.remove("first")
    assert sorted(root.iterdir()) == sorted(kept)
    world.store.estimate_validations.remove("second")
    assert not list(root.iterdir())
    world.store.estimates.remove("mine")


def test_only_subsets_that_there_are_and_tasks_of_the_estimates_can_be_validated(world: World) -> None:
    with pytest.raises(NotFound):
        validated(world, as_estimated(length=2.0))
    world.done(count=5, name="mine")
    for changes, detail in (({"subsets": 6}, "5 subsets"), ({"split": "test", "subsets": 3}, "no test rows")):
        with pytest.raises(InvalidInput, match=detail):
            validated(world, as_estimated(length=2.0), **changes)
