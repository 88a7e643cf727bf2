"""Exact estimates on a worker: θ* + Δ of a subset, written as an adapter, loaded, and measured on the targets' rows.

What is measured is the adapter that was written, so the number belongs to what can be downloaded. A pass gives each
row's log-odds and token loss; the tasks' own metrics take further ones, or have the model write answers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
import torch
from gradstore.types import Checkpoint
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from datastore import gradex
from datastore.array_files import Arrays
from datastore.checkpoints import Description
from datastore.errors import InvalidInput
from datastore.estimate_parts import members_of, part_key
from datastore.exact_estimates import AT_CHECKPOINT, MeasuredRows, arrays_of
from datastore.gradex import Numbers
from datastore.leases import Claim
from datastore.tasks import TaskExample
from worker import steps
from worker.batches import plan as planned
from worker.context import Context
from worker.engines import load, within_memory
from worker.evaluate import LEAST_TOKENS, TOKENS, NotFinite, values
from worker.heartbeat import Heartbeat
from worker.loaded import Base
from worker.losses import Inputs, Model, run
from worker.models import use_exact_mode
from worker.projection import PROJECTION_VERSION
from worker.reading import read
from worker.steps import Step

NO_MOMENTS = "an estimate's step was taken by no optimizer"


def work(claim: Claim, context: Context, heartbeat: Heartbeat) -> tuple[str, Checkpoint | None]:
    """Measure a shard's subset unless that is known; the name of what was found, and the checkpoint that was kept."""
    plan = claim.plan
    if plan["exact"]["projection_version"] != PROJECTION_VERSION:
        raise InvalidInput(
            f"the features are of version {plan['exact']['projection_version']} of the projections and this worker has "
            f"version {PROJECTION_VERSION}: compute them anew, or bring service and workers to the same version"
        )
    key = part_key(plan, claim.payload)
    found = context.estimates.files.get(key)
    keep = plan["exact"]["keep_adapters"]
    if found is not None and not keep:
        return key, None
    context.ahead.drop()
    measuring = _Measuring(context, plan, heartbeat.check)
    if found is None:
        with _measured(measuring, claim) as (folder, found):
            heartbeat.check()
            context.estimates.keep(claim, found)
            return key, measuring.kept(folder) if keep else None
    step = measuring.unprojected(found["weights"][0])
    with measuring.moved(step, factor=_factor(found)) as folder:
        return key, measuring.kept(folder)


@contextmanager
def _measured(measuring: _Measuring, claim: Claim) -> Iterator[tuple[Path, Arrays]]:
    """The folder of a shard's θ* + Δ, and what was found of its subset."""
    began = time.monotonic()
    plan, payload = claim.plan, claim.payload
    world = measuring.context.estimates.worlds.world(plan)
    members = members_of(payload, len(plan["names"]))
    fits = gradex.fit(world.pool, members, c=plan["c"])
    base: Arrays = {}
    if payload[AT_CHECKPOINT]:
        base = arrays_of(world.targets, measuring.rows(measuring.checkpoint_model()), at_checkpoint=True)
    step = measuring.unprojected(fits.weights[0])
    unprojected = np.array([steps.length(step)])
    found = {**base, **world.of_fits(members, fits, unprojected, plan), "unprojected": unprojected}
    with measuring.moved(step, factor=_factor(found)) as folder:
        found |= arrays_of(world.targets, measuring.rows(measuring.adapted(folder)))
        seconds = time.monotonic() - began
        yield folder, found | {"adapter_length": np.array(world.length), "seconds": np.array(seconds)}


def _factor(found: Arrays) -> float:
    """What Pŵ is multiplied with to be the step."""
    unprojected = float(found["unprojected"][0])
    return float(found["lengths"][0]) / unprojected if unprojected else 0.0


class _Measuring:
    """A checkpoint's model, and the rows on which it is measured where it is and a step away."""

    def __init__(self, context: Context, plan: dict[str, Any], check: Callable[[], None]) -> None:
        self.context, self._plan, self._check = context, plan, check
        self._exact: dict[str, Any] = plan["exact"]
        self._checkpoint = context.catalog.checkpoint(plan["checkpoint"])
        self._base = Base(
            self._checkpoint.model,
            self._checkpoint.revision,
            precision=self._exact["precision"],
            quantisation=self._exact["quantisation"],
        )

    def checkpoint_model(self) -> Model:
        """The model at θ*."""
        return load(self.context, self._base, self._checkpoint)

    def adapted(self, folder: Path) -> Model:
        """The model with another adapter."""
        return self.context.loaded.adapted(self._base, folder / "adapter")

    def unprojected(self, weights: Numbers) -> Step:
        """Pŵ."""
        return steps.unprojected(
            self.checkpoint_model(),
            torch.from_numpy(weights),
            projection=self._exact["projection"],
            seed=self._exact["seed"],
            device=self.context.device,
        )

    @contextmanager
    def moved(self, step: Step, *, factor: float) -> Iterator[Path]:
        """A folder with the adapter of θ* + Δ in it."""
        with TemporaryDirectory(prefix="gradstore-step-") as folder:
            steps.export(
                self.context.checkpoints.weights(self._checkpoint.id),
                Path(folder) / "adapter",
                step,
                factor=factor,
            )
            yield Path(folder)

    def kept(self, folder: Path) -> Checkpoint:
        """The checkpoint that a folder's adapter has become; nobody has recorded it."""
        of = self._checkpoint
        description = Description(
            model=of.model,
            revision=of.revision,
            method="lora",
            precision=of.precision,
            template=of.template,
            max_length=of.max_length,
            moments_note=NO_MOMENTS,
        )
        return self.context.checkpoints.add(folder, description)

    def rows(self, model: Model) -> list[MeasuredRows]:
        """What the model does on the rows of each task that have a feature. Raises `NotFinite`."""
        tokenizer = self.context.loaded.tokenizer(self._checkpoint.model, self._checkpoint.revision)
        tasks = self._plan["tasks"].items()
        rows = [self.context.estimates.worlds.measured_rows(task, features) for task, features in tasks]
        measure = partial(self._of_task, model, tokenizer)
        return [
            within_memory(partial(measure, examples), budget=TOKENS, least=LEAST_TOKENS, device=self.context.device)
            for examples in rows
        ]

    def _of_task(
        self, model: Model, tokenizer: PreTrainedTokenizerBase, examples: Sequence[TaskExample], token_budget: int
    ) -> MeasuredRows:
        use_exact_mode(model)
        log_odds, losses = self._passes(model, tokenizer, examples, token_budget)
        bare = cast("PreTrainedModel", model.get_base_model()) if isinstance(model, PeftModel) else model
        found = values(
            bare,
            tokenizer,
            examples,
            template=self._exact["template"],
            max_length=self._exact["max_length"],
            max_new_tokens=self._exact["max_new_tokens"],
            token_budget=token_budget,
            check=self._check,
        )
        return MeasuredRows(log_odds, losses, np.array([np.nan if value is None else value for value in found]))

    @torch.no_grad()
    def _passes(
        self, model: Model, tokenizer: PreTrainedTokenizerBase, examples: Sequence[TaskExample], token_budget: int
    ) -> tuple[Numbers, Numbers]:
        """The log-odds and the token loss of each row: (rows,) twice."""
        rows = read(
            (example.example for example in examples),
            tokenizer=tokenizer,
            template=self._exact["template"],
            max_length=self._exact["max_length"],
            check=self._check,
        )
        log_odds, losses = np.full(len(examples), np.nan), np.full(len(examples), np.nan)
        for batch in planned([len(row.input_ids) for row in rows.encoded], token_budget=token_budget):
            self._check()
            encoded = [rows.encoded[number] for number in batch]
            inputs = Inputs.of(encoded, pad_id=int(tokenizer.pad_token_id), device=self.context.device)
            outputs = run(model, inputs, logodds=self._exact["logodds_form"])
            places = [rows.positions[number] for number in batch]
            log_odds[places] = cast("torch.Tensor", outputs.logodds).cpu().numpy()
            losses[places] = outputs.losses.cpu().numpy()
        known = rows.positions
        if not (np.isfinite(log_odds[known]).all() and np.isfinite(losses[known]).all()):
            raise NotFinite("a loss after a step is not finite: send a smaller scale")
        return log_odds, losses
