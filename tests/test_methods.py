"""Methods beside influence, from texts and features to selections: every number against a computation by hand."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
from gradstore.types import Aggregate, GradientsRequest, Selection, SelectionRecipe
from numpy.typing import NDArray

from datastore.bm25 import NO_WORDS
from datastore.errors import Ambiguous, Conflict, GradientsMissing, InvalidInput
from datastore.parameters import Query
from service.routes.select import SelectQuery
from tests.bruteforce import aggregated
from tests.stores import Store, numbers, request, task_numbers, with_config
from tests.test_bm25 import formula

ROWS = 60
SUBTASKS = {"algebra": 3, "history": 2}
KINDS = ["rds", "embedding"]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A store with a run, a pool, two tasks, and a checkpoint that is a model as it is."""
    store = Store.at(tmp_path / "store")
    with_config(store, tmp_path / "model")
    store.checkpoint(7, model=str(tmp_path / "model"), method="none", learning_rate=None, template=None)
    store.pool(ROWS, name="pool")
    for name in ("target", "other"):
        store.task(SUBTASKS, folder=tmp_path / name, name=name)
    yield store
    store.catalog.close()


def texts(store: Store, task: str | None = None) -> list[str]:
    """What a row or a validation row says."""
    if task is not None:
        return [f"{row.example.prompt}\n{row.example.completion}" for row in store.tasks.validation(named(store, task))]
    pool = store.catalog.dataset("pool").id
    return [f"{example.prompt}\n{example.completion}" for example in store.datasets.examples(pool)]


def named(store: Store, task: str) -> str:
    return store.catalog.task(task).id


def with_features(
    store: Store, kind: str, *, checkpoint: str = "ck_7", tasks: tuple[str, ...] = ("target", "other")
) -> None:
    """Numbers as the features of pool and tasks."""
    wanted: dict[str, Any] = {"run": None, "checkpoints": [checkpoint], "kinds": [kind]}
    store.features.start(request(dataset="pool", **wanted))
    store.work(numbers)
    for number, task in enumerate(tasks, 1):
        store.features.start(request(task=task, **wanted))
        store.work(of_task(number))


def of_task(number: int) -> Any:
    return lambda checkpoint, start, stop, dim: task_numbers(checkpoint, start + 100 * number, stop + 100 * number, dim)


def cosines(number: int, dim: int = 24) -> NDArray[np.float64]:
    """Of every row of the pool with every validation row of a task, one by one."""
    pool = numbers("ck_7", 0, ROWS, dim).astype(np.float64)
    target = of_task(number)("ck_7", 0, sum(SUBTASKS.values()), dim).astype(np.float64)
    return np.array([[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in target] for a in pool])


def labels() -> list[str]:
    return [name for name, count in SUBTASKS.items() for _ in range(count)]


def asked(**query: Any) -> Query:
    return Query(**{"tasks": ["target"], "k": 10, **query})


def select(store: Store, **query: Any) -> Selection:
    recipe, sources = store.recipes.resolve(asked(**query), path="/select")
    store.scoring.start(recipe, sources)
    store.score()
    scores = store.scoring.known(recipe, sources)
    assert scores is not None
    return store.answers.select(recipe, sources, scores, limit=10_000)


def in_turns(tables: list[NDArray[np.float64]], k: int) -> list[int]:
    """Each task takes its best row that none has taken."""
    taken: list[int] = []
    for scores in itertools.cycle(tables):
        if len(taken) == k:
            return taken
        taken.append(next(row for row in np.argsort(-scores, kind="stable").tolist() if row not in taken))
    return taken


# BM25 -----------------------------------------------------------------------------------------------------------------


def by_words(store: Store, task: str) -> NDArray[np.float64]:
    return np.array([formula(texts(store), query) for query in texts(store, task)]).T


@pytest.mark.parametrize("how", ["less", "avg", "max", "min"])
def test_bm25_scores_are_those_of_the_formula_over_the_texts_of_rows_and_validation_rows(
    store: Store, how: Aggregate
) -> None:
    selection = select(store, method="bm25", aggregate=how, k=ROWS)
    expected = aggregated(by_words(store, "target"), labels(), how)
    found = {row.row: row.score for row in selection.data}
    np.testing.assert_allclose([found[row] for row in range(ROWS)], expected, rtol=1e-5, atol=1e-6)
    recipe = selection.recipe
    assert (recipe.method, recipe.aggregate, recipe.combine, recipe.bm25_version) == ("bm25", how, "max", 2)
    assert (recipe.checkpoints, recipe.kind, recipe.dim, recipe.selection_seed) == ([], None, None, None)


def test_several_tasks_take_rows_by_their_words_in_turns(store: Store) -> None:
    selection = select(store, method="bm25", tasks=["target", "other"])
    assert (selection.recipe.aggregate, selection.recipe.combine) == ("max", "round-robin")
    best = [by_words(store, task).max(axis=1).astype(np.float32) for task in ("target", "other")]
    assert [row.row for row in selection.data] == in_turns(best, 10)
    assert [row.task for row in selection.data[:2]] == [named(store, "target"), named(store, "other")]


def test_rows_without_words_are_left_out_with_the_reason(store: Store, tmp_path: Path) -> None:
    pool = tmp_path / "odd.jsonl"
    rows = [{"prompt": "the target", "completion": "yes"}, {"prompt": "?!", "completion": "..."}]
    pool.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pool.open("rb") as file:
        found = store.datasets.ingest(file, filename="odd.jsonl", known={})
    store.catalog.add_dataset(
        id=found.id, rows=2, bytes=found.bytes, origins=found.origins, prefix=None, sources=found.sources, name="odd",
        replace=False,
    )  # fmt: skip
    selection = select(store, method="bm25", datasets=["odd"])
    assert ([row.row for row in selection.data], selection.left_out) == ([0], {NO_WORDS: 1})
    with pytest.raises(Ambiguous) as caught:
        store.recipes.resolve(asked(method="bm25", aggregate="avg"), path="/select")
    assert all("method=bm25" in url and "aggregate=avg" in url for url in caught.value.choices)
    both = select(store, method="bm25", datasets=["odd", "pool"], k=ROWS + 1)
    assert (both.count, both.left_out) == (ROWS + 1, {NO_WORDS: 1})


def test_a_recipe_gives_its_scores_again_from_the_cache_until_its_texts_are_deleted(store: Store) -> None:
    first = select(store, method="bm25")
    again = SelectionRecipe.model_validate_json(first.recipe.model_dump_json())
    _, sources = store.recipes.resolve(asked(method="bm25"), path="/select")
    known = store.scoring.known(again, sources)
    assert known is not None
    assert store.answers.select(again, sources, known, limit=10) == first
    alone = store.scoring.known(again.model_copy(update={"tasks": [named(store, "other")]}), sources)
    assert alone is None
    assert store.scoring.cache.delete(first.recipe.datasets[0]) == 1
    assert store.scoring.known(again, sources) is None
    select(store, method="bm25", k=11)
    assert store.scoring.cache.delete(named(store, "target")) == 1


def test_a_scoring_job_of_texts_counts_every_row_twice_and_can_stop_between(store: Store) -> None:
    recipe, sources = store.recipes.resolve(asked(method="bm25"), path="/select")
    job = store.scoring.start(recipe, sources)
    assert job.progress.total == 2 * ROWS
    claim = store.jobs.claim("test", kinds=["scoring"])
    assert claim is not None

    def stop(done: int) -> None:
        raise Conflict("not wanted any more")

    with pytest.raises(Conflict, match="not wanted"):
        store.scoring.work(claim, stop)
    assert store.scoring.known(recipe, sources) is None
    seen: list[int] = []
    store.scoring.work(claim, seen.append)
    assert seen[-1] == 2 * ROWS
    assert store.jobs.succeed(claim)
    result = store.jobs.get(job.id).result
    assert result is not None
    assert result.model_dump()["rows"] == ROWS


def test_a_task_of_no_words_is_a_conflict(store: Store, tmp_path: Path) -> None:
    (tmp_path / "mute").mkdir()
    (tmp_path / "mute" / "validation.jsonl").write_text('{"prompt": "?", "completion": "!"}\n')
    stored = store.tasks.store("jsonl", tmp_path / "mute")
    store.catalog.add_task(
        id=stored.id, name="mute", kind="jsonl", subtasks=stored.subtasks, notes=stored.notes, replace=False
    )
    with pytest.raises(Conflict, match="another method than bm25"):
        select(store, method="bm25", tasks=["mute"])


# RDS+ and sentence embeddings -----------------------------------------------------------------------------------------


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A method with features of its own."""
    return str(request.param)


@pytest.mark.parametrize("how", ["less", "avg", "max", "min"])
def test_scores_are_the_cosines_of_the_methods_own_features(store: Store, kind: str, how: Aggregate) -> None:
    with_features(store, kind)
    selection = select(store, method=kind, aggregate=how, k=ROWS)
    found = {row.row: row.score for row in selection.data}
    expected = aggregated(cosines(1), labels(), how)
    np.testing.assert_allclose([found[row] for row in range(ROWS)], expected, atol=2e-3)  # float16
    recipe = selection.recipe
    assert (recipe.method, recipe.kind, recipe.task_kind, recipe.dim, recipe.projection) == (kind, kind, kind, 24, None)
    assert (recipe.checkpoints, recipe.checkpoint_weights, recipe.run) == (["ck_7"], [1.0], None)
    assert recipe.template == ("tulu" if kind == "rds" else None)


def test_the_request_of_a_card_gives_the_recipe_again(store: Store, kind: str) -> None:
    with_features(store, kind)
    selection = select(store, method=kind, tasks=["target", "other"])
    said: dict[str, Any] = parse_qs(urlsplit(store.cards.of(selection).request).query)
    query = SelectQuery.model_validate(
        {name: values if name in ("task", "dataset", "checkpoint") else values[0] for name, values in said.items()}
    )
    assert store.recipes.resolve(query.query(), path="/select")[0] == selection.recipe


def test_the_largest_cosine_counts_and_several_tasks_take_turns_unless_said_otherwise(store: Store, kind: str) -> None:
    with_features(store, kind)
    one = select(store, method=kind)
    assert (one.recipe.aggregate, one.recipe.combine) == ("max", "max")
    assert [row.row for row in one.data] == np.argsort(-cosines(1).max(axis=1))[:10].tolist()
    several = select(store, method=kind, tasks=["target", "other"])
    assert (several.recipe.aggregate, several.recipe.combine) == ("max", "round-robin")
    assert [row.row for row in several.data] == in_turns([cosines(1).max(axis=1), cosines(2).max(axis=1)], 10)
    largest = select(store, method=kind, tasks=["target", "other"], combine="max", aggregate="avg")
    means = np.maximum(cosines(1).mean(axis=1), cosines(2).mean(axis=1))
    assert [row.row for row in largest.data] == np.argsort(-means)[:10].tolist()


def test_a_methods_own_features_are_no_candidates_of_influence(store: Store) -> None:
    for kind in KINDS:
        with_features(store, kind)
    with pytest.raises(GradientsMissing):
        store.recipes.resolve(asked(), path="/select")
    with_features(store, "hidden")
    assert select(store).recipe.kind == "hidden"
    assert [select(store, method=kind).recipe.kind for kind in KINDS] == KINDS
    assert [select(store, kind=kind).recipe.method for kind in KINDS] == KINDS


def test_missing_features_are_answered_with_the_post_that_computes_them(store: Store, kind: str) -> None:
    with pytest.raises(GradientsMissing, match=r"that POST /checkpoints .* registers") as caught:
        store.recipes.resolve(asked(method=kind), path="/select")
    body = {**caught.value.body, "dims": [16]}
    assert (body["kinds"], body["checkpoints"]) == ([kind], ["<checkpoint>"])
    store.features.start(GradientsRequest.model_validate({**body, "checkpoints": ["ck_7"]}))
    store.work(numbers)
    with pytest.raises(GradientsMissing) as caught:
        store.recipes.resolve(asked(method=kind), path="/select")
    assert (caught.value.body["task"], caught.value.body["kinds"]) == (named(store, "target"), [kind])
    store.features.start(GradientsRequest.model_validate(caught.value.body))
    store.work(of_task(1))
    assert select(store, method=kind).count == 10


@pytest.mark.parametrize(
    ("query", "parameter"),
    [
        ({"method": "rds", "kind": "sgd"}, "kind"),
        ({"method": "influence", "kind": "embedding"}, "method"),
        ({"method": "rds", "dim": 8}, "dim"),
        ({"method": "embedding", "selection_seed": 1}, "selection_seed"),
        ({"method": "bm25", "run": "local"}, "run"),
        ({"method": "bm25", "kind": "rds"}, "kind"),
        ({"method": "bm25", "tasks": []}, "task"),
    ],
)
def test_what_a_method_does_nothing_with_is_refused(store: Store, query: dict[str, Any], parameter: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        store.recipes.resolve(asked(**query), path="/select")
    assert [error.parameter for error in caught.value.errors] == [parameter]


def test_an_embedding_is_of_an_encoder_as_it_is_and_of_no_more_tokens_than_it_takes(store: Store) -> None:
    wanted = {"dataset": "pool", "run": None, "kinds": ["embedding"]}
    for checkpoints, changes, match in (
        (["ck_5"], {}, "an encoder as it is"),
        (["ck_7"], {"max_length": 513}, "takes 512 tokens"),
        (["ck_7"], {"kinds": ["embedding", "hidden"]}, "another request"),
        (["ck_7"], {"quantisation": "int8"}, "not quantised"),
    ):
        with pytest.raises((InvalidInput, ValueError), match=match):
            store.features.start(request(**{**wanted, "checkpoints": checkpoints, **changes}))
    first, _ = store.features.start(request(**wanted, checkpoints=["ck_7"]))
    again, started = store.features.start(
        request(**wanted, checkpoints=["ck_7"], template="chat", max_length=512, seed=3, dims=[8], reduction="sum")
    )
    assert (again.id, started) == (first.id, False)


def test_rows_chosen_by_their_words_are_not_explained_by_features(store: Store) -> None:
    selection = select(store, method="bm25")
    with pytest.raises(Conflict, match="method=bm25, which reads no features"):
        store.explaining.page(selection.id, after=0, limit=1)
