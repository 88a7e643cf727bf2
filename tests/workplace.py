"""A store with a tiny model, adapters and rows in it, and workers over it: everything real, and small."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gradstore.types import (
    AdapterChoiceRequest,
    AnyJob,
    Checkpoint,
    ComparisonRequest,
    Dataset,
    EstimatesRequest,
    EstimateValidationRequest,
    EvaluationRequest,
    FinetuneRequest,
    GradientsRequest,
    Task,
    ValidationRequest,
)
from numpy.typing import NDArray
from peft import LoraConfig, PeftModel, get_peft_model

from datastore.checkpoints import MOMENTS, Description
from datastore.leases import Claim
from datastore.settings import Settings
from tests.conftest import REPOSITORY
from tests.processes import end_process
from tests.tiny import save_tiny_model
from worker import moments
from worker.context import Context
from worker.directions import Moments
from worker.jobs import KINDS, Outcome, run, tend
from worker.models import load_model

CPU = torch.device("cpu")
Requested = (
    GradientsRequest
    | FinetuneRequest
    | EvaluationRequest
    | ValidationRequest
    | ComparisonRequest
    | EstimatesRequest
    | EstimateValidationRequest
    | AdapterChoiceRequest
)


def numbered(rows: Iterable[int]) -> list[dict[str, Any]]:
    """Rows of different lengths."""
    return [
        {"prompt": f"Add {row} and {row + 1}" + " please" * (row % 4) + ".", "completion": f"The answer is {2 * row}."}
        for row in rows
    ]


def tiny_adapter(
    model: Path, *, seed: int = 0, r: int = 2, targets: tuple[str, ...] = ("q_proj", "v_proj")
) -> PeftModel:
    """The model with an adapter whose two matrices are both random, as after some training."""
    base = load_model(str(model))
    config = LoraConfig(r=r, lora_alpha=4, target_modules=list(targets), task_type="CAUSAL_LM")
    adapted: PeftModel = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return adapted


def random_moments(model: PeftModel, *, seed: int = 0) -> Moments:
    """Moments as Adam might have them."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters() if parameter.requires_grad}
    first = {name: torch.randn(shape, generator=generator) * 1e-3 for name, shape in shapes.items()}
    second = {name: torch.rand(shape, generator=generator) * 1e-5 for name, shape in shapes.items()}
    return Moments(first, second, step=12)


@dataclass(frozen=True)
class Workplace:
    """A store, and a worker in this process."""

    context: Context
    folder: Path
    model: Path

    @classmethod
    def at(cls, folder: Path, *, model: Path | None = None, **settings: Any) -> Workplace:
        """Make a store in a folder."""
        model = model or save_tiny_model(folder / "model")
        chosen = Settings(data=folder / "store", allowed_roots=(folder, model.parent), device="cpu", **settings)
        return cls(Context.open(chosen, CPU), folder, model)

    def another(self) -> Workplace:
        """A second worker over the same store."""
        return Workplace(Context.open(self.context.settings, CPU), self.folder, self.model)

    def pool(self, rows: Iterable[Mapping[str, Any]], *, name: str | None = None) -> Dataset:
        """A dataset of these rows."""
        text = "".join(json.dumps(row) + "\n" for row in rows)
        found = self.context.datasets.ingest(
            io.BytesIO(text.encode()), filename="pool.jsonl", known=self.context.catalog.dataset_sizes()
        )
        return self.context.catalog.add_dataset(
            id=found.id, rows=found.rows, bytes=found.bytes, origins=found.origins, prefix=found.prefix,
            sources=found.sources, name=name, replace=False,
        )  # fmt: skip

    def task(self, rows: int = 3, *, name: str = "target", **fields: object) -> Task:
        """A task with so many validation and test rows, all with these fields, in each of two subtasks."""
        folder = self.folder / f"task-{name}"
        folder.mkdir()
        for split in ("validation", "test"):
            found = [
                {**row, **fields, "subtask": subtask} for subtask in ("even", "odd") for row in numbered(range(rows))
            ]
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
        stored = self.context.tasks.store("jsonl", folder)
        return self.context.catalog.add_task(
            id=stored.id, name=name, kind="jsonl", subtasks=stored.subtasks, notes=stored.notes, replace=False
        )

    def checkpoint(self, number: int = 0) -> Checkpoint:
        """A checkpoint with an adapter and moments of its own."""
        source = self.folder / f"adapter-{number}"
        adapted = tiny_adapter(self.model, seed=number)
        adapted.save_pretrained(str(source / "adapter"))
        moments.write(source / MOMENTS, random_moments(adapted, seed=number))
        description = Description(
            model=str(self.model), revision=None, method="lora", precision="float32", epoch=number + 1,
            step=10 * (number + 1), learning_rate=1e-4, template="tulu", max_length=64,
        )  # fmt: skip
        return self.context.catalog.add_checkpoint(self.context.checkpoints.add(source, description))

    def base(self) -> Checkpoint:
        """The base model itself as a checkpoint."""
        return self.context.catalog.add_checkpoint(self.context.checkpoints.register_base(str(self.model)))

    def start(self, request: Requested) -> AnyJob:
        """Start a job."""
        context = self.context
        rooms: dict[type[Requested], Any] = {
            AdapterChoiceRequest: context.adapter_choices,
            ComparisonRequest: context.comparisons,
            EstimateValidationRequest: context.estimate_validations,
            EstimatesRequest: context.estimates,
            EvaluationRequest: context.evaluations,
            FinetuneRequest: context.finetunes,
            GradientsRequest: context.features,
            ValidationRequest: context.validations,
        }
        job: AnyJob = rooms[type(request)].start(request)[0]
        return job

    def claim(self) -> Claim:
        """Take the oldest waiting shard."""
        claim = self.context.jobs.claim(self.context.owner, kinds=KINDS)
        assert claim is not None, "no shard waits"
        return claim

    def work(self) -> list[Outcome]:
        """Do the shards that wait."""
        outcomes: list[Outcome] = []
        while (claim := self.context.jobs.claim(self.context.owner, kinds=KINDS)) is not None:
            outcomes.append(run(claim, self.context))
        tend(self.context, tend(self.context))
        return outcomes

    def job(self, id: str) -> AnyJob:
        """A job as it is now."""
        return self.context.jobs.get(id)

    def done(self, request: Requested) -> dict[str, Any]:
        """Start a job, do it, and return its result."""
        job = self.start(request)
        self.work()
        job = self.job(job.id)
        assert job.status == "succeeded", job.error
        assert job.result is not None
        return job.result.model_dump()

    def stored(self, feature_set: str) -> NDArray[np.float32]:
        """The features of a feature set, as they were stored: (rows, dim)."""
        view = self.context.store.view(self.context.features.segments(feature_set))
        return view.features(0, view.rows)


@contextmanager
def worker_process(workplace: Workplace, *arguments: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A worker in a process of its own, over the same store; asked to leave at the end."""
    settings = workplace.context.settings
    given = {
        "GRADSTORE_DATA": str(settings.data),
        "GRADSTORE_DEVICE": "cpu",
        "GRADSTORE_THREADS": "1",
        "GRADSTORE_LEASE": str(settings.lease),
        "GRADSTORE_ALLOWED_ROOTS": os.pathsep.join(map(str, settings.allowed_roots)),
    }
    with (workplace.folder / "worker.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "worker.command", *arguments],
            cwd=REPOSITORY,
            env={**os.environ, **given, **environment},
            stderr=log,
        )
    try:
        yield process
    finally:
        end_process(process)
