"""What a job would cost is told before it starts: by a finished job where there is one, else by what workers can do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gradstore.types import FinetuneRequest, LoraSettings
from peft import LoraConfig, get_peft_model
from safetensors.numpy import save_file
from torch.utils.flop_counter import FlopCounterMode

from datastore import models
from datastore.durations import EFFICIENCY
from datastore.leases import Jobs
from datastore.models import Lengths
from datastore.weights import chosen
from tests.serving import Service, serving
from tests.tiny import save_tiny_model, tiny_model, tiny_tokenizer
from tests.workplace import Workplace, numbered
from worker.loop import work_until_left
from worker.speed import measure

WIDTH, VOCABULARY = 8, 32
FLOPS = {"float32": 1e6, "bfloat16": 4e6}


def save_numbers(folder: Path) -> Path:
    """A model as far as the service looks at it: a head, an embedding and one matrix for an adapter."""
    folder.mkdir(parents=True)
    config = {"hidden_size": WIDTH, "num_hidden_layers": 1, "vocab_size": VOCABULARY}
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"lm_head": VOCABULARY, "model.embed_tokens": VOCABULARY, "model.layers.0.self_attn.q_proj": WIDTH}
    tensors = {f"{name}.weight": np.zeros((rows, WIDTH), np.float32) for name, rows in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


MULTIPLIED = (VOCABULARY + WIDTH) * WIDTH  # the head and the matrix


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_numbers(tmp_path / "model")


@pytest.fixture
def place(tmp_path: Path, model: Path) -> Any:
    """A service that may read the model, with a pool of ten rows."""
    with serving(tmp_path / "store", allowed_roots=(tmp_path,)) as running:
        running.pool(10, name="pool")
        yield running


def training(service: Service, model: Path, **fields: Any) -> dict[str, Any]:
    """The cost of a fine-tune."""
    body = {"dataset": "pool", "model": str(model), "epochs": 2, "dry_run": True, "lora": {"r": 4, "alpha": 8}}
    answer = service.http.post("/finetunes", json=body | fields)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def announce(jobs: Jobs, name: str, *, device: str = "cpu", times: float = 1) -> None:
    jobs.announce(name, device=device, job=None, flops={name: times * rate for name, rate in FLOPS.items()})  # type: ignore[misc]


def test_without_a_job_or_a_worker_nobody_knows_how_long(place: Service, model: Path) -> None:
    cost = training(place, model)
    assert (cost["seconds"], cost["basis"]) == (None, None)


def test_a_workers_announced_rate_gives_seconds(place: Service, model: Path) -> None:
    announce(place.backend.jobs, "one")
    cost = training(place, model)
    adapter = 4 * (WIDTH + WIDTH)
    expected = cost["tokens"] * 2 * (4 * MULTIPLIED + 6 * adapter) / (FLOPS["float32"] * EFFICIENCY)
    assert (cost["seconds"], cost["basis"]) == (pytest.approx(expected), "estimated")
    full = training(place, model, method="full", precision="bfloat16")
    assert full["seconds"] == pytest.approx(cost["tokens"] * 2 * 6 * MULTIPLIED / (FLOPS["bfloat16"] * EFFICIENCY))


def test_a_precision_left_open_is_the_workers_own(place: Service, model: Path) -> None:
    announce(place.backend.jobs, "gpu", device="cuda")
    assert training(place, model)["seconds"] == training(place, model, precision="bfloat16")["seconds"]
    stored = training(place, model, method="full")["bytes"]
    assert stored == training(place, model, method="full", precision="bfloat16")["bytes"]
    announce(place.backend.jobs, "cpu", device="cpu")
    assert training(place, model, method="full")["bytes"] * (2 + 8) == stored * (4 + 8), "weights and moments"


def test_the_gradients_of_weights_are_estimated_as_what_they_are(place: Service, model: Path) -> None:
    announce(place.backend.jobs, "one")
    place.http.post("/checkpoints", json={"model": str(model), "name": "base"})
    body = {"dataset": "pool", "checkpoints": ["base"], "weights": ["*.q_proj.*"], "kinds": ["sgd"], "dry_run": True}
    cost = place.http.post("/gradients", json=body).json()
    expected = cost["tokens"] * (4 * MULTIPLIED + 2 * WIDTH * WIDTH) / (FLOPS["float32"] * EFFICIENCY)
    assert (cost["seconds"], cost["basis"]) == (pytest.approx(expected), "estimated")


def test_a_worker_that_is_gone_still_tells(place: Service, model: Path) -> None:
    jobs = place.backend.jobs
    announce(jobs, "old")
    jobs.leave("old")
    before = training(place, model)
    assert before["basis"] == "estimated"
    announce(jobs, "new", times=2)
    assert training(place, model)["seconds"] == pytest.approx(before["seconds"] / 2)


def test_gradients_are_shared_by_the_workers_and_a_fine_tune_is_not(place: Service, model: Path) -> None:
    checkpoint = place.checkpoint(model=str(model))
    body = {"dataset": "pool", "checkpoints": [checkpoint["id"]], "kinds": ["sgd"], "dims": [16], "dry_run": True}

    def cost(**fields: Any) -> dict[str, Any]:
        found: dict[str, Any] = place.http.post("/gradients", json=body | fields).json()
        return found

    announce(place.backend.jobs, "one")
    alone, tuned = cost(), training(place, model)["seconds"]
    passes = alone["tokens"] * (4 * MULTIPLIED + 6 * checkpoint["parameters"])
    assert alone["seconds"] == pytest.approx(passes / (FLOPS["float32"] * EFFICIENCY))
    assert alone["basis"] == "estimated"
    dense = 10 * 2 * checkpoint["parameters"] * 16
    assert cost(projection="rademacher")["seconds"] == pytest.approx((passes + dense) / (FLOPS["float32"] * EFFICIENCY))
    announce(place.backend.jobs, "two")
    assert cost()["seconds"] == pytest.approx(alone["seconds"] / 2)
    assert training(place, model)["seconds"] == tuned


def test_a_finished_job_of_the_model_knows_better(place: Service, model: Path, tmp_path: Path) -> None:
    announce(place.backend.jobs, "one")
    place.finetune(dataset="pool", model=str(model))
    place.train(tmp_path)  # 100 tokens an epoch, 2 epochs, 4 seconds
    cost = training(place, model)
    assert (cost["seconds"], cost["basis"]) == (pytest.approx(cost["tokens"] * 2 / 50), "measured")
    assert training(place, model, method="full")["basis"] == "estimated"
    assert training(place, save_numbers(tmp_path / "other"))["basis"] == "estimated"


@pytest.mark.parametrize("trained", ["lora", "full", "weights"])
def test_the_operations_of_a_token_are_those_that_torch_counts(tmp_path: Path, trained: str) -> None:
    shape = {"hidden_size": 128, "intermediate_size": 256}
    size = models.size(str(save_tiny_model(tmp_path / "model", **shape)), None)
    assert size is not None
    model: Any = tiny_model(tiny_tokenizer(), **shape)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    patterns = [f"*.{name}.weight" for name in targets]
    if trained == "lora":
        model = get_peft_model(model, LoraConfig(r=8, target_modules=targets))
    if trained == "weights":
        model.requires_grad_(False)
        for name in chosen(patterns, dict(model.named_parameters())):
            model.get_parameter(name).requires_grad_(True)
    tokens = torch.arange(16).reshape(1, 16)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens, labels=tokens).loss.backward()
    operations = {
        "lora": size.operations(size.lora_parameters(LoraSettings(r=8, targets=targets))),
        "full": size.operations(0, full=True),
        "weights": size.operations(0) + 2 * size.chosen_parameters(patterns),
    }
    assert counter.get_total_flops() == pytest.approx(operations[trained] * tokens.numel(), rel=0.1)


def test_checkpointing_costs_another_forward_pass(model: Path) -> None:
    size = models.size(str(model), None)
    assert size is not None
    assert size.operations(10, checkpointing=True) - size.operations(10) == 2 * (MULTIPLIED + 10)


def test_a_token_meets_only_the_experts_it_is_sent_to(tmp_path: Path) -> None:
    folder = save_numbers(tmp_path / "mixture")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_experts": 8, "num_experts_per_tok": 2}))
    experts = {
        f"model.layers.0.mlp.experts.{number}.up_proj.weight": np.zeros((4, 5), np.float32) for number in range(8)
    }
    save_file(experts, folder / "model.safetensors")
    size = models.size(str(folder), None)
    assert size is not None
    assert (size.parameters, size.operations(0)) == (160, 4 * 40)


def test_a_worker_measures_itself_and_announces_it(tmp_path: Path) -> None:
    place = Workplace.at(tmp_path)
    work_until_left(place.context, once=True)
    assert place.context.jobs.workers() == []
    [worker] = place.context.jobs.known_workers()
    assert worker.flops.keys() == measure(torch.device("cpu")).keys() == {"float32", "bfloat16", "float16"}
    assert all(rate > 1e6 for rate in worker.flops.values())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_bytes_of_a_full_fine_tune_come_true(tmp_path: Path, precision: Any) -> None:
    place = Workplace.at(tmp_path, model=save_tiny_model(tmp_path / "model", hidden_size=128, intermediate_size=512))
    place.pool(numbered(range(4)), name="pool")
    asked = FinetuneRequest(
        dataset="pool", model=str(place.model), method="full", epochs=2, batch_size=2, device_batch_size=2,
        precision=precision, max_length=64,
    )  # fmt: skip
    plan = place.context.finetunes.plan(asked)
    cost = place.context.finetunes.estimate(
        asked, plan, lengths=Lengths(10, 10), size=models.size(plan.model, plan.revision)
    )
    kept = [place.context.catalog.checkpoint(id) for id in place.done(asked)["checkpoints"]]
    assert cost.bytes == pytest.approx(sum(checkpoint.bytes for checkpoint in kept), rel=0.05)
