"""Conversions: stored features rounded to a narrower dtype, as jobs that any worker does."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
import torch
from gradstore.types import (
    AttributionRecipe,
    AttributionRequest,
    ConversionRequest,
    FeatureDtype,
    FeatureSet,
    ValidationRequest,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from datastore.dtypes import decode, encode
from datastore.errors import Ambiguous, Conflict, GradientsMissing, InvalidInput, NotEnoughSpace, NotFound
from datastore.parameters import Query
from tests.stores import Store, numbers, request, task_numbers
from worker.context import Context
from worker.jobs import run

NARROWER: list[FeatureDtype] = ["float16", "bfloat16", "int8", "int4", "binary"]
ROWS = 1100


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Store]:
    """A store with a run of two checkpoints, on SQLite."""
    store = Store.at(tmp_path / "store")
    for number in range(2):
        store.checkpoint(number)
    store.catalog.add_run(id="run_1", checkpoints=["ck_0", "ck_1"], name="warm-up")
    store.pool(ROWS, name="pool")
    yield store
    store.catalog.close()


def computed(store: Store, dtype: FeatureDtype, **changes: Any) -> list[FeatureSet]:
    """The feature sets of the pool, with rows from 100 on that have no gradient where the numbers are zero."""
    job, _ = store.features.start(request(**{"dataset": "pool", "dtype": dtype, "dims": [13], **changes}))
    store.work(some_zeros if "task" not in changes else task_numbers)
    return sets_of(store, job.id)


def some_zeros(checkpoint: str, start: int, stop: int, dim: int) -> np.ndarray:
    found = numbers(checkpoint, start, stop, dim)
    found[np.arange(start, stop) % 100 == 7] = 0
    return found


def sets_of(store: Store, job: str) -> list[FeatureSet]:
    result = store.jobs.get(job).result
    assert result is not None
    return [FeatureSet.model_validate(each) for each in result.model_dump()["feature_sets"]]


def convert(store: Store, **fields: Any) -> str:
    """Start a conversion and do it as a worker does; returns its id."""
    job, _ = store.conversions.start(ConversionRequest.model_validate(fields))
    work(store)
    found = store.jobs.get(job.id)
    assert found.status == "succeeded", found.error
    return job.id


def work(store: Store, *, shards: int = 1000) -> int:
    context = Context.open(store.settings, torch.device("cpu"))
    done = 0
    while done < shards and (claim := context.jobs.claim("worker", kinds=["conversion"])) is not None:
        assert run(claim, context) in ("succeeded", "failed")
        done += 1
    context.catalog.close()
    return done


def bytes_of(store: Store, feature_set: FeatureSet) -> dict[str, bytes]:
    """The chunk files of a feature set."""
    groups = [store.store.root / segment / "data.zarr" for segment in store.features.segments(feature_set.id)]
    return {str(path.relative_to(group)): path.read_bytes() for group in groups for path in group.glob("*/c.*")}


@pytest.mark.parametrize("dtype", NARROWER)
def test_what_is_made_of_float32_has_the_id_and_the_bytes_of_what_is_computed(
    place: Store, tmp_path: Path, dtype: FeatureDtype
) -> None:
    shutil.copytree(place.settings.data, tmp_path / "other")
    other = Store.at(tmp_path / "other")
    wanted = computed(other, dtype)
    computed(place, "float32")
    found = sets_of(place, convert(place, dataset="pool", dtype=dtype))
    assert [each.model_dump() for each in found] == [each.model_dump() for each in wanted]
    assert {each.converted_from for each in found} == {None}
    for one, another in zip(found, wanted, strict=True):
        assert bytes_of(place, one) == bytes_of(other, another)
        assert len(bytes_of(place, one)) == 8 * 2
    job, started = place.features.start(request(dataset="pool", dtype=dtype, dims=[13]))
    assert (job.status, started) == ("succeeded", False)
    assert job.result is not None
    assert job.result.model_dump()["tokens"] == 2 * ROWS  # as if it had gone through the model
    other.catalog.close()


@settings(max_examples=100, deadline=None)
@given(
    row=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=9),
    dtype=st.sampled_from(NARROWER),
)
def test_float32_in_between_changes_no_bit(row: list[float], dtype: FeatureDtype) -> None:
    features = np.array([row], np.float32)
    stored, scales = encode(features, "float32")
    again, once = encode(decode(stored, "float32", len(row)) * scales[:, None], dtype), encode(features, dtype)
    np.testing.assert_array_equal(again[0], once[0])


def test_a_conversion_of_rounded_features_says_so_and_keeps_all_else(place: Store) -> None:
    sources = computed(place, "float16")
    job = convert(place, gradients=place.jobs.page(limit=1).data[0].id, dtype="int8")
    found = sets_of(place, job)
    assert [(each.dtype, each.converted_from, each.checkpoint) for each in found] == [
        ("int8", "float16", "ck_0"), ("int8", "float16", "ck_1"),
    ]  # fmt: skip
    assert {each.excluded for each in found} == {11}
    for source, one in zip(sources, found, strict=True):
        before, after = place.features.view(source), place.features.view(one)
        expected = encode(before.features(0, ROWS), "int8")
        np.testing.assert_array_equal(after.stored(0, ROWS)[after.valid], expected[0][after.valid])
        np.testing.assert_array_equal(after.scales[after.valid], expected[1][after.valid])
        for name in ("norms", "raw_norms", "losses", "tokens", "reason"):
            np.testing.assert_array_equal(after.column(name), before.column(name))
        assert after.reasons == before.reasons
        assert len(after.reasons) == 11
        assert after.segments[0].recipe["converted_from"] == "float16"
    direct = computed(place, "int8")
    assert not {each.id for each in direct} & {each.id for each in found}


def test_a_second_request_converts_nothing_and_one_more_dim_only_that(place: Store) -> None:
    computed(place, "float16")
    first = convert(place, dataset="pool", dtype="int4")
    again, started = place.conversions.start(ConversionRequest(dataset="pool", dtype="int4"))
    assert (again.id, again.status, started) == (first, "succeeded", False)
    computed(place, "float16", dims=[13, 5])
    more = place.jobs.get(convert(place, dataset="pool", dtype="int4"))
    assert more.result is not None
    result = more.result.model_dump()
    assert len(result["feature_sets"]) == 4
    assert (result["rows"], result["converted_rows"]) == (ROWS, 2 * ROWS)


def test_a_grown_dataset_converts_its_new_rows_only(place: Store) -> None:
    computed(place, "float16")
    convert(place, dataset="pool", dtype="int8")
    place.pool(ROWS + 100, name="grown")
    computed(place, "float16", dataset="grown")
    job = place.jobs.get(convert(place, dataset="grown", dtype="int8"))
    assert job.result is not None
    assert job.result.model_dump()["converted_rows"] == 200
    for one in sets_of(place, job.id):
        whole = place.features.view(one)
        assert [rows for _, rows in whole.names] == [ROWS, 100]
        close = np.abs(whole.features(0, ROWS + 100) - some_zeros(one.checkpoint, 0, ROWS + 100, 13)).max(axis=1)
        assert (close <= whole.scales * 0.6).all()


def test_of_several_dtypes_the_widest_is_converted(place: Store) -> None:
    computed(place, "bfloat16")
    computed(place, "float16")
    found = sets_of(place, convert(place, dataset="pool", dtype="int8", run="warm-up"))
    assert [each.converted_from for each in found] == ["float16", "float16"]
    named = sets_of(place, convert(place, feature_sets=[each.id for each in computed(place, "bfloat16")], dtype="int8"))
    assert [each.converted_from for each in named] == ["bfloat16", "bfloat16"]


def test_select_finds_converted_features_and_compares_like_with_like(place: Store, tmp_path: Path) -> None:
    place.task({"a": 3, "b": 2}, folder=tmp_path / "task")
    computed(place, "float16")
    computed(place, "float16", task="target", dataset=None, kinds=["sgd"])
    convert(place, dataset="pool", dtype="int8")
    query = Query(tasks=["target"], dtype="int8", pct=0.05)
    with pytest.raises(GradientsMissing) as missing:
        place.recipes.resolve(query, path="/select")
    assert missing.value.body["dtype"] == "float16"
    assert "POST /conversions" in str(missing.value)
    convert(place, task="target", dtype="int8")
    recipe, sources = place.recipes.resolve(query, path="/select")
    assert (recipe.dtype, recipe.converted_from) == ("int8", "float16")
    computed(place, "int8")
    computed(place, "int8", task="target", dataset=None, kinds=["sgd"])
    for asked, wanted in (("none", None), ("float16", "float16")):
        chosen = Query(tasks=["target"], dtype="int8", converted_from=asked, pct=0.05)  # type: ignore[arg-type]
        recipe, sources = place.recipes.resolve(chosen, path="/select")
        found = {each.converted_from for sets in (*sources.datasets.values(), *sources.tasks.values()) for each in sets}
        assert (recipe.converted_from, found) == (wanted, {wanted})


@pytest.mark.parametrize(("source", "narrower"), [("float16", "int8"), ("int8", "int4")])
def test_features_that_are_missing_and_asked_for_by_what_they_are_made_of_alone_are_made_as_advised(
    place: Store, tmp_path: Path, source: FeatureDtype, narrower: FeatureDtype
) -> None:
    place.task({"a": 3, "b": 2}, folder=tmp_path / "task")
    query = Query(tasks=["target"], converted_from=source, pct=0.05)
    with pytest.raises(GradientsMissing) as missing:
        place.recipes.resolve(query, path="/select")
    assert missing.value.body["dtype"] == source
    assert f'"dtype": "{narrower}"' in str(missing.value)
    for changes in ({}, {"task": "target", "dataset": None, "kinds": ["sgd"]}):
        computed(place, source, **changes)
    convert(place, dataset="pool", dtype=narrower)
    convert(place, task="target", dtype=narrower)
    recipe, _ = place.recipes.resolve(query, path="/select")
    assert (recipe.dtype, recipe.converted_from) == (narrower, source)


def test_what_is_attributed_and_validated_is_told_apart_by_what_it_was_converted_from(
    place: Store, tmp_path: Path
) -> None:
    place.task({"a": 3, "b": 2}, folder=tmp_path / "task")
    of_task: dict[str, Any] = {"task": "target", "dataset": None, "kinds": ["sgd"]}
    for changes in ({}, of_task):
        computed(place, "float16", **changes)
        computed(place, "int8", **changes)
    convert(place, dataset="pool", dtype="int8")
    convert(place, task="target", dtype="int8")
    question = {"rows": [{"prompt": "why", "completion": "so"}], "dtype": "int8"}
    (model := tmp_path / "model").mkdir()
    (model / "config.json").write_text('{"hidden_size": 24}')
    trained = {"dataset": "pool", "task": "target", "model": str(model), "subsets": 3}
    validating = Store.at(place.settings.data, allowed_roots=(tmp_path,))
    with pytest.raises(Ambiguous) as several:
        place.attributions.start(AttributionRequest.model_validate(question))
    assert {parse_qs(urlsplit(choice).query)["converted_from"][0] for choice in several.value.choices} == {
        "none",
        "float16",
    }
    with pytest.raises(Ambiguous, match="converted_from"):
        validating.validations.start(ValidationRequest.model_validate({**trained, "scores": [{"dtype": "int8"}]}))
    for asked, wanted in (("none", None), ("float16", "float16")):
        chosen = {"dtype": "int8", "converted_from": asked}
        job, _ = place.attributions.start(AttributionRequest.model_validate({**question, **chosen}))
        plan = place.jobs.plan(job.id)
        assert AttributionRecipe.model_validate(plan["recipe"]).converted_from == wanted
        used = [each for sets in plan["feature_sets"].values() for each in sets]
        job, _ = validating.validations.start(ValidationRequest.model_validate({**trained, "scores": [chosen]}))
        scores = place.jobs.plan(job.id)["scores"][0]
        assert {place.features.get(each).converted_from for each in (*used, *scores["pool"], *scores["task"])} == {
            wanted
        }


def test_a_conversion_is_resumed_where_it_was_cancelled(place: Store) -> None:
    computed(place, "float16")
    job, _ = place.conversions.start(ConversionRequest(dataset="pool", dtype="int8"))
    assert (job.progress.total, job.progress.unit) == (2 * ROWS, "rows")
    assert work(place, shards=2) == 2
    place.jobs.cancel(job.id)
    assert work(place) == 0
    again, started = place.conversions.start(ConversionRequest(dataset="pool", dtype="int8"))
    assert (again.id, started) == (job.id, True)
    assert again.progress.done == ROWS
    assert work(place) == 2
    assert place.jobs.get(job.id).status == "succeeded"


def test_a_conversion_and_its_features_are_deleted_without_their_source(place: Store) -> None:
    (source, _) = computed(place, "float16")
    job = convert(place, dataset="pool", dtype="int8")
    (one, _) = sets_of(place, job)
    segments = place.features.segments(one.id)
    place.features.remove(job, kind="conversion")
    assert not any((place.store.root / segment).exists() for segment in segments)
    assert place.features.view(source).valid.any()


def test_converted_features_outlive_what_they_were_made_of(place: Store) -> None:
    computed(place, "float16")
    gradients = place.jobs.page(kind="gradients", limit=1).data[0].id
    (one, _) = sets_of(place, convert(place, dataset="pool", dtype="int8"))
    place.features.remove(gradients)
    assert place.features.view(one).features(0, ROWS).any()
    with pytest.raises(InvalidInput, match="converted from float16"):
        place.conversions.start(ConversionRequest(feature_sets=[one.id], dtype="int4"))


def test_a_source_that_is_deleted_while_its_conversion_waits_fails_it_in_words(place: Store) -> None:
    computed(place, "float16")
    job, _ = place.conversions.start(ConversionRequest(dataset="pool", dtype="int8"))
    place.features.remove(place.jobs.page(kind="gradients", limit=1).data[0].id)
    work(place)
    failed = place.jobs.get(job.id)
    assert failed.status == "failed"
    assert failed.error is not None
    assert "feat_" in failed.error.detail


@pytest.mark.parametrize(
    ("source", "dtype"),
    [("float16", "float32"), ("float16", "float16"), ("int8", "float16"), ("int8", "binary"), ("int4", "binary")],
)
def test_what_would_bring_nothing_or_lose_too_much_is_refused(
    place: Store, source: FeatureDtype, dtype: FeatureDtype
) -> None:
    sets = computed(place, source)
    with pytest.raises(InvalidInput, match=f"stored as {source}, of which no {dtype}"):
        place.conversions.start(ConversionRequest(feature_sets=[sets[0].id], dtype=dtype))
    with pytest.raises(InvalidInput, match="POST /gradients"):
        place.conversions.start(ConversionRequest(dataset="pool", dtype=dtype))


def test_unknown_unfinished_and_foreign_sources_are_refused(place: Store, tmp_path: Path) -> None:
    place.task({"a": 3}, folder=tmp_path / "task")
    of_pool = computed(place, "float16")
    of_task = computed(place, "float16", task="target", dataset=None, kinds=["sgd"])
    with pytest.raises(InvalidInput, match="several datasets or tasks"):
        place.conversions.start(ConversionRequest(feature_sets=[of_pool[0].id, of_task[0].id], dtype="int8"))
    with pytest.raises(NotFound):
        place.conversions.start(ConversionRequest(feature_sets=["feat_unknown"], dtype="int8"))
    job, _ = place.features.start(request(dataset="pool", dtype="float32", dims=[13]))
    with pytest.raises(Conflict, match="once it has succeeded"):
        place.conversions.start(ConversionRequest(gradients=job.id, dtype="int8"))
    for body in ({}, {"dataset": "pool", "task": "target"}, {"gradients": "g", "run": "warm-up"}):
        with pytest.raises(ValueError, match=r"name one of|run goes with"):
            ConversionRequest.model_validate({"dtype": "int8", **body})


def test_a_disk_without_room_is_noticed_before_the_job(place: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    computed(place, "float16")
    monkeypatch.setattr("datastore.usage.shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(NotEnoughSpace):
        place.conversions.start(ConversionRequest(dataset="pool", dtype="int8"))
