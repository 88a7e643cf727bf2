"""Estimates and their validation by a real worker on a tiny model: features, adapter and trainings are its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gradstore.types import EstimatesRequest, EstimateValidationRequest, GradientsRequest
from safetensors.torch import load_file

from tests.test_validation_worker import TRAINING
from tests.tiny import save_tiny_model
from tests.workplace import Workplace, numbered

ROWS = 12


@pytest.mark.slow
def test_a_subset_is_estimated_trained_on_and_compared(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "models" / "base", hidden_size=16, intermediate_size=16)
    place = Workplace.at(tmp_path, model=model, lease=30)
    place.pool(({**row, "id": str(number)} for number, row in enumerate(numbered(range(ROWS)))), name="pool")
    place.task(2)
    checkpoint = place.checkpoint().id
    for owner in ({"dataset": "pool"}, {"task": "target"}):
        asked = {**owner, "checkpoints": [checkpoint], "kinds": ["logodds"], "dims": [32], "dtype": "float32"}
        place.done(GradientsRequest.model_validate(asked))
    labels = {str(row): f"label {row % 4}" for row in range(ROWS)}
    values = {"dataset": "pool", "tasks": ["target"], "group_by": "label", "labels": labels, "count": 8, "scale": 0.1}
    result = place.done(EstimatesRequest.model_validate({**values, "name": "mine"}))
    assert result["subsets"] == 8
    weights = load_file(place.context.checkpoints.weights(checkpoint) / "adapter_model.safetensors")
    length = np.sqrt(sum(float(each.double().square().sum()) for each in weights.values()))
    assert result["adapter_length"] == pytest.approx(length)
    features = place.context.features.complete(tasks=[place.context.catalog.task("target").id])[0]
    view = place.context.features.view(features)
    assert result["targets"][-1]["loss"] == pytest.approx(np.logaddexp(0, -view.column("logodds")).mean(), rel=1e-5)
    training = {"estimates": "mine", "model": str(model), "subsets": 3, "bootstrap_samples": 20, **TRAINING}
    found = place.done(EstimateValidationRequest.model_validate(training))
    assert found["training_seconds"] > 0
    assert [subset["rows"] for subset in found["subsets"]] == [6, 6, 6]
    assert len({subset["loss"] for subset in found["subsets"]}) > 1
    assert found["speedup"] == pytest.approx(found["training_seconds"] / found["estimate_seconds"])
    assert found["best"]["relative_rss"] <= min(fit["relative_rss"] for fit in found["scales"])
