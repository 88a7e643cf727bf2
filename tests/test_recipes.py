"""From feature sets to recipes, scores and selections: every number checked by hand."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
from gradstore.types import GradientsRequest

from datastore.errors import Ambiguous, GradientsMissing, InvalidInput
from datastore.parameters import Query
from datastore.schema import TaskRow
from tests.stores import DIM, Store, numbers, request, task_numbers, with_config


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


def test_a_checkpoint_outside_of_every_run_is_a_candidate_by_itself(store: Store, tmp_path: Path) -> None:
    store.pool(50, name="pool")
    store.task({"algebra": 3}, folder=tmp_path / "task")
    store.checkpoint(2)
    for owner in ({"dataset": "pool"}, {"task": "target"}):
        store.features.start(request(**owner, run=None, checkpoints=["ck_2"], kinds=["sgd"]))
        store.work(numbers)
    recipe, _ = store.recipes.resolve(Query(tasks=["target"], k=1), path="/select")
    assert (recipe.run, recipe.checkpoints) == (None, ["ck_2"])
    for owner in ({"dataset": "pool"}, {"task": "target"}):
        store.features.start(request(**owner, kinds=["sgd"]))
        store.work(numbers)
    with pytest.raises(Ambiguous) as caught:
        store.recipes.resolve(Query(tasks=["target"], k=1), path="/select")
    answers = [store.recipes.resolve(asked(url), path="/select")[0] for url in caught.value.choices]
    assert [one.checkpoints for one in answers] == [["ck_0", "ck_1"], ["ck_2"]]


def test_several_candidates_are_listed_with_urls_that_answer(store: Store, tmp_path: Path) -> None:
    filled(store, tmp_path, rows=50)
    store.features.start(request(dataset="pool", kinds=["sgd"]))
    store.work(numbers)
    with pytest.raises(Ambiguous) as caught:
        store.recipes.resolve(Query(tasks=["target"], k=1), path="/select")
    assert len(caught.value.choices) == 2
    assert all("dataset=pool&" in choice for choice in caught.value.choices), "by names where there are some"
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


def test_a_query_asked_again_means_what_it_means_now(store: Store, tmp_path: Path) -> None:
    filled(store, tmp_path)
    query = Query(tasks=["target"], k=1)
    recipe, sources = store.recipes.resolve(query, path="/select")
    assert store.recipes.resolve(query, path="/select")[1] is sources  # nothing was looked up
    other = store.task({"chess": 1}, folder=tmp_path / "other", name="other")
    assert store.recipes.resolve(query, path="/select") == (recipe, sources)
    store.catalog.rename(TaskRow, recipe.tasks[0], "old target")
    store.catalog.rename(TaskRow, other.id, "target")
    with pytest.raises(GradientsMissing):
        store.recipes.resolve(query, path="/select")
    store.catalog.rename(TaskRow, other.id, "other")
    store.catalog.rename(TaskRow, recipe.tasks[0], "target")
    assert store.recipes.resolve(query, path="/select") == (recipe, sources)
    of_the_task, _ = store.jobs.page(limit=2).data
    store.features.remove(of_the_task.id)
    with pytest.raises(GradientsMissing):
        store.recipes.resolve(query, path="/select")


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


# Kinds and reductions -------------------------------------------------------------------------------------------------


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
    assert answered(
        store, Query(tasks=["target"], reduction="sum", datasets=["pool"], dim=DIM, dtype="float16", k=1)
    ) == [pool]


# Ways of choosing ---------------------------------------------------------------------------------------------------


def with_two_tasks(store: Store, tmp_path: Path) -> None:
    filled(store, tmp_path, rows=60)
    store.task({"one": 2}, folder=tmp_path / "second", name="second")
    store.features.start(request(task="second"))
    store.work(lambda checkpoint, start, stop, dim: task_numbers(checkpoint, start + 50, stop + 50, dim))


@pytest.mark.parametrize("how", ["round-robin", "balanced"])
def test_several_tasks_choose_with_their_own_scores(store: Store, tmp_path: Path, how: str) -> None:
    with_two_tasks(store, tmp_path)
    alone = {name: select(store, tasks=[name], pct=None, k=60).data for name in ("target", "second")}
    scores = {rows[0].task: {row.row: row.score for row in rows} for rows in alone.values()}
    together = select(store, tasks=["target", "second"], combine=how, pct=None, k=10)
    assert {row.task for row in together.data} == set(scores)
    assert len({row.row for row in together.data}) == 10
    for row in together.data:
        assert row.score == pytest.approx(scores[row.task or ""][row.row], abs=1e-6)
    if how == "round-robin":
        first, second = alone["target"], alone["second"]
        assert together.data[0].row == first[0].row
        assert together.data[1].row == next(row.row for row in second if row.row != first[0].row)
        assert len({row.task for row in together.data[::2]}) == 1


def test_scores_of_tasks_that_choose_in_turns_are_refused(store: Store, tmp_path: Path) -> None:
    with_two_tasks(store, tmp_path)
    query = Query(tasks=["target", "second"], combine="balanced")
    recipe, sources = store.recipes.resolve(query, path="/scores")
    store.scoring.start(recipe, sources)
    store.score()
    with pytest.raises(InvalidInput, match="no row one score"):
        store.answers.score_table(recipe, sources, store.scoring.known(recipe, sources) or [])


def test_rows_are_drawn_without_features_or_a_task(store: Store) -> None:
    pool = store.pool(100, name="pool")
    drawn = select(store, tasks=[], method="random", pct=0.3)
    assert (drawn.count, drawn.pool, drawn.recipe.datasets) == (30, 100, [pool.id])
    assert len({row.row for row in drawn.data}) == 30
    assert {(row.task, row.subtask) for row in drawn.data} == {(None, None)}
    assert drawn.recipe.selection_seed == 0
    again = select(store, tasks=[], method="random", pct=0.3, selection_seed=1)
    assert again.id != drawn.id
    assert {row.row for row in again.data} != {row.row for row in drawn.data}


def test_of_several_datasets_the_one_to_draw_from_is_named(store: Store) -> None:
    for rows in (5, 7):
        store.pool(rows, name=f"pool-{rows}")
    with pytest.raises(Ambiguous) as caught:
        store.recipes.resolve(Query(method="random", k=3), path="/select")
    assert [parse_qs(urlsplit(url).query)["dataset"] for url in caught.value.choices] == [["pool-5"], ["pool-7"]]
    assert select(store, tasks=[], method="random", pct=None, k=3, datasets=["pool-7"]).pool == 7


@pytest.mark.parametrize(
    ("query", "parameter"),
    [
        ({"method": "random", "dim": 8}, "dim"),
        ({"method": "random", "checkpoints": ["ck_0"]}, "checkpoint"),
        ({"method": "random", "combine": "max"}, "combine"),
        ({"tasks": ["target"], "selection_seed": 0}, "selection_seed"),
        ({}, "task"),
    ],
)
def test_what_a_method_does_nothing_with_is_refused(store: Store, query: dict[str, object], parameter: str) -> None:
    store.pool(5)
    with pytest.raises(InvalidInput) as caught:
        store.recipes.resolve(Query(k=1, **query), path="/select")  # type: ignore[arg-type]
    assert [item.parameter for item in caught.value.errors] == [parameter]
