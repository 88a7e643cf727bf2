"""Exact estimates by a real worker, against θ̂ built by hand in float64: scikit-learn's regression, an explicit matrix,
and plain forward passes. No line of `worker` takes part in the truth.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gradstore.cli import app
from gradstore.types import EstimatedSubset, EstimatesRequest, EstimatesResult, GradientsRequest
from numpy.typing import NDArray
from peft import PeftModel
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from sklearn.linear_model import LogisticRegression
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from datastore.errors import InvalidInput
from tests import bruteforce
from tests.bruteforce import tokens_and_labels
from tests.serving import serving
from tests.test_logodds_worker import truth
from tests.workplace import Workplace, numbered
from worker import exact_estimates
from worker.jobs import run
from worker.losses import Inputs
from worker.models import ModelError
from worker.steps import export

ROWS, TARGETS, DIM, C, SCALE = 12, 6, 32, 0.5, 0.3
LABELS = {str(row): f"label {row % 3}" for row in range(ROWS)}
SUBSETS = [["label 0"], ["label 1", "label 2"]]


@dataclass(frozen=True)
class World:
    """A pool, a task and a checkpoint with log-odds features of both."""

    place: Workplace
    checkpoint: str
    projection: str

    @classmethod
    def at(cls, folder: Path, model: Path, *, projection: str = "blocks", **fields: object) -> World:
        place = Workplace.at(folder, model=model)
        place.pool(({**row, "id": str(number)} for number, row in enumerate(numbered(range(ROWS)))), name="pool")
        place.task(TARGETS // 2, **fields)
        world = cls(place, place.checkpoint().id, projection)
        for owner in ({"dataset": "pool"}, {"task": "target"}):
            place.done(GradientsRequest.model_validate({**owner, **world.features}))
        return world

    @property
    def features(self) -> dict[str, Any]:
        return {
            "checkpoints": [self.checkpoint], "kinds": ["logodds"], "dims": [DIM], "dtype": "float32",
            "projection": self.projection,
        }  # fmt: skip

    @property
    def adapter(self) -> Path:
        return self.place.context.checkpoints.weights(self.checkpoint)

    def request(self, **changes: Any) -> EstimatesRequest:
        values = {
            "dataset": "pool", "tasks": ["target"], "group_by": "label", "labels": LABELS, "subsets": SUBSETS,
            "c": C, "scale": SCALE, "mode": "exact", "name": "mine",
        }  # fmt: skip
        return EstimatesRequest.model_validate({**values, **changes})

    def done(self, **changes: Any) -> tuple[EstimatesResult, list[EstimatedSubset]]:
        result = EstimatesResult.model_validate(self.place.done(self.request(**changes)))
        return result, self.place.context.estimates.subsets("mine", after=0, limit=100).data


def step_by_hand(world: World, subset: list[str]) -> dict[str, NDArray[np.float64]]:
    """Δ of a subset by the names of the parameters: everything from text and the checkpoint's files, in float64."""
    _, flat, sizes = truth(world.place, world.checkpoint, numbered(range(ROWS)))
    matrix = bruteforce.matrix(world.projection, DIM, 0, sizes)  # type: ignore[arg-type]
    features = (flat @ matrix)[[LABELS[str(row)] in subset for row in range(ROWS)]]
    signs = np.resize([1, -1], len(features))
    regression = LogisticRegression(C=C, fit_intercept=False, tol=1e-12, max_iter=10_000)
    weights = regression.fit(features * signs[:, None], signs).coef_[0]
    step = matrix @ weights
    theta = np.sqrt(sum(float(each.double().square().sum()) for each in _file(world.adapter).values()))
    step *= SCALE * theta / np.linalg.norm(step)
    return dict(zip(sizes, np.split(step, np.cumsum(list(sizes.values()))[:-1]), strict=True))


def measured_by_hand(world: World, step: dict[str, NDArray[np.float64]] | None) -> dict[str, NDArray[np.float64]]:
    """z and token losses of the target's rows by plain passes in float64, with the adapter moved by a step."""
    tokenizer = AutoTokenizer.from_pretrained(world.place.model)
    base = AutoModelForCausalLM.from_pretrained(world.place.model, dtype=torch.float64)
    loaded = PeftModel.from_pretrained(base, str(world.adapter), is_trainable=True).double().eval()
    with torch.no_grad():
        for name, parameter in loaded.named_parameters():
            if step is not None and name in step:
                parameter.add_(torch.from_numpy(step[name]).view_as(parameter))
    odds, losses = [], []
    for row in [*numbered(range(TARGETS // 2)), *numbered(range(TARGETS // 2))]:
        ids, labels = tokens_and_labels(row, tokenizer)
        ids, labels = ids[:64], labels[:64]
        with torch.no_grad():
            p = loaded(input_ids=torch.tensor([ids])).logits[0, :-1].softmax(1)
        right = torch.stack([p[t, token] for t, token in enumerate(labels[1:]) if token != -100])
        odds.append(float((right / (1 - right)).log().mean()))
        losses.append(float(-right.log().mean()))
    return {"z": np.array(odds), "losses": np.array(losses)}


def _file(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("projection", ["blocks", "reference"])
def test_a_subset_is_measured_where_its_step_leads(tmp_path: Path, model: Path, projection: str) -> None:
    world = World.at(tmp_path, model, projection=projection)
    result, subsets = world.done()
    places = [slice(0, 3), slice(3, 6), slice(0, 6)]  # the subtasks, and all rows
    for subset, found in zip([None, *SUBSETS], [None, *subsets], strict=True):
        truly = measured_by_hand(world, None if subset is None else step_by_hand(world, subset))
        measured = [each.measured for each in (result.targets if found is None else found.estimates)]
        assert None not in measured
        for place, one in zip(places, measured, strict=True):
            assert one is not None
            assert one.loss == pytest.approx(np.logaddexp(0, -truly["z"][place]).mean(), rel=1e-4)
            assert one.accuracy == pytest.approx((truly["z"][place] > 0).mean())
            assert one.token_loss == pytest.approx(truly["losses"][place].mean(), rel=1e-4)
            assert one.value is None
    told = [target.loss for target in result.targets]
    np.testing.assert_allclose(told, [target.measured.loss for target in result.targets if target.measured], rtol=1e-5)
    losses = [group.score for group in result.groups]
    first, second = (found.estimates[-1].measured for found in subsets)
    assert first is not None
    assert second is not None
    assert losses == pytest.approx([-(first.token_loss or 0), -(second.token_loss or 0), -(second.token_loss or 0)])


def test_a_short_step_is_what_the_first_order_says(tmp_path: Path, model: Path) -> None:
    world = World.at(tmp_path, model)
    result, subsets = world.done(scale=0.001)
    before = result.targets[-1].loss
    for subset in subsets:
        told, measured = subset.estimates[-1].loss, subset.estimates[-1].measured
        assert told is not None
        assert before is not None
        assert measured is not None
        assert measured.loss is not None
        assert told != pytest.approx(before, rel=1e-6)
        assert measured.loss - before == pytest.approx(told - before, rel=0.02)


def test_adapters_that_are_kept_are_checkpoints_a_step_away(tmp_path: Path, model: Path) -> None:
    world = World.at(tmp_path, model)
    _, subsets = world.done(keep_adapters=True)
    before = _file(world.adapter)
    for subset, labels in zip(subsets, SUBSETS, strict=True):
        assert subset.checkpoint is not None
        checkpoint = world.place.context.catalog.checkpoint(subset.checkpoint)
        assert (checkpoint.method, checkpoint.has_moments, checkpoint.run) == ("lora", False, None)
        folder = world.place.context.checkpoints.weights(checkpoint.id)
        after = _file(folder)
        for name, moved in step_by_hand(world, labels).items():
            key = name.replace(".default", "")
            np.testing.assert_allclose((after[key].double() - before[key].double()).numpy().ravel(), moved, atol=2e-6)
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), str(folder))


def test_the_command_line_prints_what_was_measured_of_each_subset(tmp_path: Path, model: Path) -> None:
    world = World.at(tmp_path, model)
    _, subsets = world.done(keep_adapters=True)
    with serving(world.place.context.settings.data) as service:

        def rows(*words: str) -> list[str]:
            ran = CliRunner().invoke(app, ["estimates", "rows", "mine", *words], env={"GRADSTORE_URL": service.url})
            assert ran.exit_code == 0, ran.output
            return ran.stdout.splitlines()

        head, *lines = rows()
        assert head.split()[-5:] == ["measured", "token", "loss", "value", "checkpoint"]
        for line, subset in zip(lines, subsets, strict=True):
            measured = subset.estimates[-1].measured
            assert measured is not None
            assert line.split()[-4:] == [f"{measured.loss:.4g}", f"{measured.token_loss:.4g}", "–", subset.checkpoint]
        assert len({subset.checkpoint for subset in subsets}) == len(SUBSETS)
        assert [EstimatedSubset.model_validate_json(line) for line in rows("--json")] == subsets
        assert rows("--limit", "1") == [head, lines[0]]


def test_a_metric_of_the_tasks_own_is_measured_and_compared(tmp_path: Path, model: Path) -> None:
    choices = {"metric": "choice", "choices": [f"The answer is {2 * row}." for row in range(3)]}
    world = World.at(tmp_path, model, **choices)
    result, subsets = world.done(metric="accuracy", max_new_tokens=4)
    assert {target.metric for target in result.targets} == {"choice"}
    values = [subset.estimates[-1].measured for subset in subsets]
    assert all(one is not None and one.value is not None and 0 <= one.value * TARGETS <= TARGETS for one in values)
    assert result.groups[0].score == pytest.approx(values[0].value if values[0] else None)


def test_a_killed_worker_has_each_subset_measured_once(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World.at(tmp_path, model)
    job = world.place.start(world.request(keep_adapters=True))
    assert job.progress.total == len(SUBSETS)
    assert run(world.place.claim(), world.place.context) == "succeeded"
    killed = world.place.claim()
    exact_estimates.work(killed, world.place.context, _Still())  # type: ignore[arg-type]
    world.place.context.jobs.release(killed)
    passes: list[int] = []
    of = Inputs.of
    monkeypatch.setattr(Inputs, "of", lambda *rows, **more: passes.append(1) or of(*rows, **more))
    world.place.work()
    done = world.place.job(job.id)
    assert done.status == "succeeded", done.error
    assert (done.progress.done, passes) == (len(SUBSETS), []), "what the killed one measured was measured again"
    assert [subset.checkpoint for subset in world.place.context.estimates.subsets("mine", after=0, limit=9).data]


class _Still:
    """A heartbeat of a worker that is wanted."""

    def check(self) -> None:
        """Nothing."""


@pytest.mark.parametrize(
    ("changes", "detail"),
    [
        ({"search": "stepwise", "subsets": None}, "leave mode=exact out"),
        ({"subsets": None, "count": 201}, "at most 200"),
        ({"mode": "first-order", "keep_adapters": True}, "goes with mode=exact"),
    ],
)
def test_a_request_that_would_measure_too_much_is_refused(changes: dict[str, Any], detail: str) -> None:
    values = {"dataset": "pool", "tasks": ["target"], "mode": "exact", "subsets": SUBSETS}
    with pytest.raises(ValidationError, match=detail):
        EstimatesRequest.model_validate({**values, **changes})


def test_accuracies_are_not_compared_where_a_task_has_no_metric(tmp_path: Path, model: Path) -> None:
    world = World.at(tmp_path, model)
    with pytest.raises(InvalidInput, match="send metric=loss"):
        world.place.start(world.request(metric="accuracy"))


def test_an_adapter_that_calls_a_parameter_otherwise_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({}))
    save_file({"a.lora_A.weight": torch.zeros(2, 3)}, tmp_path / "adapter_model.safetensors")
    export(tmp_path, tmp_path / "moved", {"a.lora_A.default.weight": torch.arange(6.0)}, factor=0.5)
    moved = _file(tmp_path / "moved")["a.lora_A.weight"]
    assert moved.tolist() == [[0, 0.5, 1], [1.5, 2, 2.5]]
    with pytest.raises(ModelError, match="lora_B"):
        export(tmp_path, tmp_path / "other", {"a.lora_B.default.weight": torch.zeros(6)}, factor=1.0)
