"""Log-odds end to end: computed by a worker, stored beside their features, read back, converted, and compared."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gradstore.types import AttributionRequest, ConversionRequest, GradientsRequest
from numpy.typing import NDArray
from peft import PeftModel
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, AutoTokenizer

from datastore import feature_rows
from datastore.errors import Ambiguous, GradientsMissing, InvalidInput
from datastore.parameters import Query
from datastore.segments import FeatureView
from tests import bruteforce
from tests.bruteforce import tokens_and_labels
from tests.workplace import Workplace, numbered

UNENCODABLE = {"prompt": "and so on " * 90, "completion": "The end."}
"""A row whose answer is cut off."""


@pytest.fixture
def place(tmp_path: Path, model: Path) -> Workplace:
    return Workplace.at(tmp_path, model=model)


def gradients(**fields: Any) -> GradientsRequest:
    values = {"kinds": ["logodds"], "dims": [32], "dtype": "float32", "projection": "reference"}
    return GradientsRequest.model_validate(values | fields)


def view_of(place: Workplace, result: dict[str, Any], number: int = 0) -> FeatureView:
    return place.context.store.view(place.context.features.segments(result["feature_sets"][number]["id"]))


def truth(
    place: Workplace, checkpoint: str, rows: list[dict[str, Any]]
) -> tuple[NDArray[np.float64], NDArray[np.float64], bruteforce.Shapes]:
    """z (n,), its gradients (n, p) in float64, and what they are of: no line of `worker` takes part."""
    tokenizer = AutoTokenizer.from_pretrained(place.model)
    base = AutoModelForCausalLM.from_pretrained(place.model, dtype=torch.float64)
    weights = str(place.context.checkpoints.weights(checkpoint))
    loaded = PeftModel.from_pretrained(base, weights, is_trainable=True).double().eval()
    named = {name: each for name, each in loaded.named_parameters() if each.requires_grad}
    found, gradients = [], []
    for row in rows:
        ids, labels = tokens_and_labels(row, tokenizer)
        ids, labels = ids[:64], labels[:64]
        p = loaded(input_ids=torch.tensor([ids])).logits[0, :-1].softmax(1)
        odds = [(p[t, token] / (1 - p[t, token])).log() for t, token in enumerate(labels[1:]) if token != -100]
        mean = torch.stack(odds).mean()
        found.append(float(mean.detach()))
        parts = torch.autograd.grad(mean, list(named.values()))
        gradients.append(torch.cat([part.flatten() for part in parts]).numpy())
    return np.array(found), np.array(gradients), {name: each.numel() for name, each in named.items()}


def test_a_worker_stores_the_log_odds_of_every_row_beside_its_projected_gradient(place: Workplace) -> None:
    rows = [*numbered(range(9)), UNENCODABLE]
    pool, checkpoint = place.pool(rows), place.checkpoint()
    result = place.done(gradients(dataset=pool.id, checkpoints=[checkpoint.id], kinds=["logodds", "hidden"]))
    odds, hidden = result["feature_sets"]
    assert (odds["kind"], odds["logodds_form"], odds["adam"], odds["reduction"]) == ("logodds", "exact", None, "mean")
    assert (hidden["kind"], hidden["logodds_form"]) == ("hidden", None)
    wanted, flat, sizes = truth(place, checkpoint.id, rows[:9])
    view = view_of(place, result)
    np.testing.assert_allclose(view.logodds[:9], wanted, rtol=1e-5, atol=1e-5)
    projected = flat @ bruteforce.matrix("reference", 32, 0, sizes)
    error = np.linalg.norm(place.stored(odds["id"])[:9] - projected, axis=1) / np.linalg.norm(projected, axis=1)
    assert error.max() < 1e-5
    np.testing.assert_allclose(view.raw_norms[:9], np.linalg.norm(flat, axis=1), rtol=1e-5)
    shown = feature_rows.page(view, 0, 10)
    assert [row.logodds for row in shown[:9]] == view.logodds[:9].tolist()
    assert (shown[9].logodds, shown[9].loss) == (None, None)
    assert feature_rows.table(view).schema.names == ["row", "norm", "raw_norm", "loss", "logodds", "tokens", "reason"]
    assert np.isnan(feature_rows.array(view)["logodds"][9])
    others = view_of(place, result, 1)
    assert [row.logodds for row in feature_rows.page(others, 0, 10)] == [None] * 10
    assert "logodds" not in feature_rows.table(others).schema.names
    assert odds["bytes"] == view.segments[0].rows * (32 * 4 + 29) + 9 * 4


def test_a_grown_pools_log_odds_are_those_of_its_parts_and_stay_with_a_conversion(place: Workplace) -> None:
    rows = numbered(range(14))
    checkpoint = place.checkpoint()
    first = place.done(gradients(dataset=place.pool(rows[:9]).id, checkpoints=[checkpoint.id]))
    grown = place.pool(rows)
    second = place.done(gradients(dataset=grown.id, checkpoints=[checkpoint.id]))
    assert second["computed_rows"] == 5
    view = view_of(place, second)
    assert len(view.segments) == 2
    np.testing.assert_array_equal(view.logodds[:9], view_of(place, first).logodds)
    np.testing.assert_allclose(view.logodds, truth(place, checkpoint.id, rows)[0], rtol=1e-5, atol=1e-5)
    source = second["feature_sets"][0]["id"]
    job, _ = place.context.conversions.start(ConversionRequest(feature_sets=[source], dtype="int8"))
    place.work()
    done = place.job(job.id)
    assert done.result is not None
    converted = done.result.model_dump()["feature_sets"][0]
    assert (converted["kind"], converted["logodds_form"], converted["dtype"]) == ("logodds", "exact", "int8")
    kept = place.context.store.view(place.context.features.segments(converted["id"]))
    np.testing.assert_array_equal(kept.logodds, view.logodds)


def test_the_form_is_part_of_what_a_feature_set_is_and_the_projection_of_how_it_looks(place: Workplace) -> None:
    rows = numbered(range(5))
    pool, checkpoint = place.pool(rows), place.checkpoint()
    asked = {"dataset": pool.id, "checkpoints": [checkpoint.id]}
    exact, reference = (
        place.done(gradients(**asked, logodds_form=form))["feature_sets"][0] for form in ("exact", "reference")
    )
    assert exact["id"] != reference["id"]
    assert place.done(gradients(**asked))["feature_sets"][0]["id"] == exact["id"]
    assert not np.array_equal(place.stored(exact["id"]), place.stored(reference["id"]))
    parameters = place.context.catalog.checkpoint(checkpoint.id).parameters
    whole = place.done(gradients(**asked, projection="none", dims=[parameters]))
    _, flat, sizes = truth(place, checkpoint.id, rows)
    unprojected = place.stored(whole["feature_sets"][0]["id"])
    np.testing.assert_allclose(unprojected, flat, rtol=1e-4, atol=1e-6 * np.abs(flat).max())
    projected = unprojected.astype(np.float64) @ bruteforce.matrix("reference", 32, 0, sizes)
    np.testing.assert_allclose(place.stored(exact["id"]), projected, rtol=1e-3, atol=1e-5 * np.abs(projected).max())


def test_influence_compares_log_odds_with_their_like_and_only_where_they_are_named(place: Workplace) -> None:
    pool, task, checkpoint = place.pool(numbered(range(12))), place.task(2, name="sums"), place.checkpoint()
    asked = {"checkpoints": [checkpoint.id]}
    for owner in ({"dataset": pool.id}, {"task": task.id}):
        place.done(gradients(**owner, **asked, kinds=["sgd"], projection="blocks"))
    ours = place.done(gradients(dataset=pool.id, **asked))["feature_sets"][0]["id"]
    query = Query(tasks=["sums"], k=3)
    recipes = place.context.recipes
    assert recipes.resolve(query, path="/select")[0].kind == "sgd"
    named = replace(query, kind="logodds")
    with pytest.raises(GradientsMissing) as missing:
        recipes.resolve(named, path="/select")
    body = missing.value.body
    assert (body["kinds"], body["logodds_form"], body["projection"]) == (["logodds"], "exact", "reference")
    theirs = place.done(GradientsRequest.model_validate(body))["feature_sets"][0]["id"]
    recipe, sources = recipes.resolve(named, path="/select")
    assert (recipe.kind, recipe.task_kind, recipe.logodds_form) == ("logodds", "logodds", "exact")
    assert [each.id for each in sources.tasks[task.id]] == [theirs]
    assert recipes.sent(recipe) == sources
    with pytest.raises(GradientsMissing):
        recipes.sent(recipe.model_copy(update={"task_kind": "sgd"}))
    assert recipes.resolve(query, path="/select")[0].kind == "sgd"
    scoring = place.context.scoring
    scoring.start(recipe, sources)
    claim = place.context.jobs.claim("test", kinds=["scoring"])
    assert claim is not None
    scoring.work(claim, lambda _: None)
    assert place.context.jobs.succeed(claim)
    scores = scoring.known(recipe, sources)
    assert scores is not None
    table = bruteforce.influences([place.stored(ours)], [place.stored(theirs)], [1.0])
    wanted = bruteforce.aggregated(table, ["even", "even", "odd", "odd"])
    np.testing.assert_allclose(scores[0].score, wanted, atol=1e-5)
    for owner in ({"dataset": pool.id}, {"task": task.id}):
        place.done(gradients(**owner, **asked, logodds_form="reference"))
    with pytest.raises(Ambiguous, match="logodds_form") as several:
        recipes.resolve(named, path="/select")
    assert any("logodds_form=reference" in choice for choice in several.value.choices)
    narrowed = replace(named, logodds_form="reference")
    assert recipes.resolve(narrowed, path="/select")[0].logodds_form == "reference"
    with pytest.raises(InvalidInput, match="have no logodds_form"):
        recipes.resolve(replace(query, kind="sgd", logodds_form="exact"), path="/select")


def test_an_attribution_by_log_odds_asks_with_the_log_odds_of_the_question(place: Workplace) -> None:
    rows = numbered(range(8))
    pool, checkpoint = place.pool(rows), place.checkpoint()
    for form in ("exact", "reference"):
        place.done(gradients(dataset=pool.id, checkpoints=[checkpoint.id], logodds_form=form))
    asked = {"rows": [rows[3]], "kind": "logodds", "logodds_form": "reference", "k": 8}
    job, _ = place.context.attributions.start(AttributionRequest.model_validate(asked))
    place.work()
    done = place.job(job.id)
    assert done.status == "succeeded", done.error
    assert done.result is not None
    result = done.result.model_dump()
    assert (result["recipe"]["query_kind"], result["recipe"]["logodds_form"]) == ("logodds", "reference")
    best = result["data"][0]["most"][0]
    assert best["row"] == 3
    assert best["score"] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("kind", ["adam", "sgd", "sign"])
def test_log_odds_take_a_pass_without_gradients_of_the_loss(kind: str) -> None:
    with pytest.raises(ValidationError, match="in another request"):
        GradientsRequest.model_validate({"dataset": "a", "run": "b", "kinds": ["logodds", kind]})


def test_log_odds_have_no_sum() -> None:
    with pytest.raises(ValidationError, match="leave reduction out"):
        GradientsRequest.model_validate({"dataset": "a", "run": "b", "kinds": ["logodds"], "reduction": "sum"})


def test_a_reference_projection_too_large_to_draw_is_refused_before_anything_starts(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, checkpoint = place.pool(numbered(range(3))), place.checkpoint()
    monkeypatch.setattr("datastore.features.LARGEST_REFERENCE", 50 * checkpoint.parameters)
    asked = {"dataset": pool.id, "checkpoints": [checkpoint.id]}
    with pytest.raises(InvalidInput, match="at most 50 together, or for projection=rademacher"):
        place.start(gradients(**asked, dims=[32, 19]))
    assert place.start(gradients(**asked, dims=[32, 18])).status == "queued"
