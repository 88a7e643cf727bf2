"""Fine-tunes: what a request means in ids, what it would cost, and what goes with it when it is deleted.

The training itself is the worker's (`worker/finetune.py`); it draws the rows of a fraction from the seed, so the plan
holds their number only.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gradstore.types import AnyJob, Estimate, FinetuneRequest, Precision
from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from datastore import finetune_mixtures as mixtures
from datastore import models
from datastore.catalog import Catalog
from datastore.checkpoints import Checkpoints
from datastore.durations import duration, own_precision
from datastore.errors import Conflict, InUse, NotEnoughSpace, refusal
from datastore.identity import content_id
from datastore.leases import Jobs, NewShard
from datastore.schema import CheckpointRow, JobRow, RunCheckpointRow, RunRow, UseRow
from datastore.selection.top import count
from datastore.settings import Settings
from datastore.sizes import free_bytes

MOMENTS_BYTES = 8  # of a trainable parameter in a checkpoint: two moments in float32
WEIGHT_BYTES = 4  # of a mixture's parameter in a checkpoint: float32, and no moments
STORED_BYTES = WEIGHT_BYTES + MOMENTS_BYTES  # of an adapter's parameter in a checkpoint: float32, too
TRAINED_BYTES = 16  # of a trainable parameter in memory: weight, moments and gradient in float32


@dataclass(frozen=True)
class FinetunePlan:
    """A request resolved to ids."""

    id: str
    model: str
    revision: str
    dataset: str | None
    selection: str | None
    rows: int
    steps: int
    experts: Sequence[str] = ()
    """Adapters of the bank that a mixture's experts begin as."""

    @property
    def settings(self) -> dict[str, Any]:
        """What the worker needs beside the request."""
        return {
            "model": self.model,
            "revision": self.revision,
            "dataset": self.dataset,
            "selection": self.selection,
            "row_count": self.rows,
            **({"experts": list(self.experts)} if self.experts else {}),
        }


@dataclass(frozen=True)
class Finetunes:
    """The fine-tunes of a catalog."""

    catalog: Catalog
    jobs: Jobs
    checkpoints: Checkpoints
    settings: Settings

    def start(self, request: FinetuneRequest) -> tuple[AnyJob, bool]:
        """Start a fine-tune, or return the one of the same content; says whether there is work to do.

        Raises `NotFound`, `InvalidInput` and `NotEnoughSpace`.
        """
        plan = self.plan(request)
        free = free_bytes(self.settings)
        needed = self._stored_bytes(request, models.size(plan.model, plan.revision))
        if needed > free:
            raise NotEnoughSpace(needed=needed, free=free)
        return self.jobs.create(
            id=plan.id,
            kind="finetune",
            request=request.model_dump(mode="json"),
            plan=plan.settings,
            shards=[NewShard(payload={}, units=plan.steps)],
            name=request.name,
            uses=[name for name in (plan.dataset, plan.selection, *plan.experts) if name is not None],
        )

    def plan(self, request: FinetuneRequest) -> FinetunePlan:
        """Resolve a request. Raises `NotFound` and `InvalidInput`."""
        model = models.resolve(request.model, roots=self.settings.allowed_roots)
        dataset = selection = None
        if request.selection is not None:
            found = self.catalog.selection(request.selection)
            selection, rows = found.id, int(found.summary["count"])
        else:
            pool = self.catalog.dataset(request.dataset or "")
            dataset, rows = pool.id, _drawn(request, pool.rows)
        revision = models.revision_of(model, request.revision)  # the hub is asked when all else is well
        experts = self._experts(request, model, revision)
        plain = set() if request.mixture else {"mixture", "experts_from"}  # ids from before there were mixtures
        meant = request.model_dump(mode="json", exclude={"name", "dry_run", *plain})
        meant |= {"model": model, "revision": revision, "dataset": dataset, "selection": selection}
        meant |= {"rows": rows, "fraction": None, **({"experts_from": experts} if request.mixture else {})}
        return FinetunePlan(
            id=content_id("ft", meant),
            model=model,
            revision=revision,
            dataset=dataset,
            selection=selection,
            rows=rows,
            steps=math.ceil(rows / request.batch_size) * request.epochs,
            experts=experts,
        )

    def _experts(self, request: FinetuneRequest, model: str, revision: str) -> list[str]:
        """Adapters that a mixture's experts begin as. Raises `NotFound`, and `InvalidInput` where they do not fit."""
        if request.mixture is None:
            return []
        size = models.described(model, revision)[1]
        if size is not None:
            mixtures.refuse_unfit(request.mixture, size)
        found = [self.catalog.adapter(reference) for reference in request.experts_from or ()]
        if found:
            mixtures.refuse_experts(
                request.mixture, found, model=model, revision=revision, layers=size.layers if size else 0
            )
        return [adapter.id for adapter in found]

    def estimate(
        self, request: FinetuneRequest, plan: FinetunePlan, *, lengths: models.Lengths, size: models.Size | None
    ) -> Estimate:
        """What the request would cost; its tokens are those of one epoch.

        `lengths` of some of its rows and the base model's `size` are the caller's to find out.
        """
        tokens = round(plan.rows * lengths.mean)
        time = duration(
            self.jobs,
            kind="finetune",
            units=tokens * request.epochs,
            done=lambda job: _trained_tokens(job, plan.model, request),
            operations=None if size is None else tokens * request.epochs * _operations(request, size),
            precision=None if request.precision == "auto" else request.precision,
            alone=True,
        )
        return Estimate(
            rows=plan.rows,
            tokens=tokens,
            bytes=self._stored_bytes(request, size),
            free_bytes=free_bytes(self.settings),
            seconds=time.seconds,
            basis=time.basis,
            memory_bytes=None if size is None else self._memory_bytes(request, size, longest=lengths.longest),
        )

    def last_checkpoint(self, reference: str) -> str:
        """Id of the checkpoint that a fine-tune ended with. Raises `NotFound`, and `Conflict` before it has ended."""
        job = self.jobs.get(reference, kind="finetune")
        if job.status != "succeeded" or job.result is None:
            raise Conflict(f"{job.id} is {job.status}: it has its checkpoints when it has succeeded")
        return str(job.result.model_dump()["checkpoints"][-1])

    def remove(self, reference: str) -> str:
        """Delete a fine-tune with its run and checkpoints, and return its id. Raises `InUse` where these are needed."""

        def delete_files(session: Session, job: JobRow) -> None:
            for checkpoint in _take_apart(session, job):  # before others can start the same fine-tune again
                self.checkpoints.delete(checkpoint)
            shutil.rmtree(self.settings.work / job.id, ignore_errors=True)

        return self.jobs.remove(reference, kind="finetune", before=delete_files)

    def _stored_bytes(self, request: FinetuneRequest, size: models.Size | None) -> int:
        """Bytes of the checkpoints that are kept; 0 where the base model's size is not known.

        Of a LoRA training those of all epochs, of a mixture's, too, but without moments; of a full one the last model
        in its precision, and its moments.
        """
        if size is None:
            return 0
        if request.mixture is not None:
            return request.epochs * mixtures.parameters(request.mixture, size) * WEIGHT_BYTES
        if request.method == "lora":
            return request.epochs * size.lora_parameters(request.lora) * STORED_BYTES
        return size.stored_bytes(self._precision(request)) + size.parameters * MOMENTS_BYTES

    def _memory_bytes(self, request: FinetuneRequest, size: models.Size, *, longest: int) -> int:
        precision = self._precision(request)
        lora = request.method == "lora"
        base = size.stored_bytes(request.quantisation or precision) if lora else 0
        trained = _adapter_parameters(request, size) if lora else size.parameters
        activations = size.activation_bytes(
            tokens=min(request.device_batch_size, request.batch_size) * longest,
            item_bytes=models.ITEM_BYTES[precision],
            checkpointing=request.gradient_checkpointing,
        )
        return base + trained * TRAINED_BYTES + activations

    def _precision(self, request: FinetuneRequest) -> Precision:
        """The precision asked for; `auto` is the widest that a worker would take."""
        if request.precision != "auto":
            return request.precision
        chosen = {own_precision(worker.device) for worker in self.jobs.known_workers()}
        return "bfloat16" if chosen == {"bfloat16"} else "float32"


def _drawn(request: FinetuneRequest, rows: int) -> int:
    """How many rows of a dataset the request trains on."""
    if request.rows is not None and request.rows > rows:
        raise refusal(f"the dataset has {rows:,} rows", "/rows")
    if request.rows is None and request.fraction is None:
        return rows
    return count(rows, pct=request.fraction, k=request.rows)


def _operations(request: FinetuneRequest, size: models.Size) -> float:
    """Floating-point operations of one token."""
    full = request.method == "full"
    trained = 0 if full else _adapter_parameters(request, size)
    return size.operations(trained, full=full, checkpointing=request.gradient_checkpointing)


def _adapter_parameters(request: FinetuneRequest, size: models.Size) -> int:
    """Numbers of the adapter, or of the mixture, that is put on the model."""
    if request.mixture is not None:
        return mixtures.parameters(request.mixture, size)
    return size.lora_parameters(request.lora)


def _trained_tokens(job: JobRow, model: str, request: FinetuneRequest) -> float:
    """Tokens that a finished fine-tune trained on in all epochs, 0 where it was of another model, or trained otherwise.

    A mixture's are those of mixtures alone, which take longer for a token.
    """
    like = job.plan["model"] == model and job.request["method"] == request.method
    like = like and (job.request.get("mixture") is None) == (request.mixture is None)
    return float((job.result or {}).get("tokens", 0) * job.request["epochs"]) if like else 0.0


def _take_apart(session: Session, job: JobRow) -> Sequence[str]:
    """Delete the records of a fine-tune's run and checkpoints, and return the checkpoints' ids."""
    run = session.scalar(select(RunRow).where(RunRow.finetune == job.id))
    if run is None:
        return []
    heir = _another_with(session, run.id, job.id)
    if heir is not None:  # two recipes that came to the very same checkpoints
        run.finetune = heir
        return []
    mine = list(session.scalars(select(RunCheckpointRow.checkpoint_id).where(RunCheckpointRow.run_id == run.id)))
    users = set(session.scalars(select(UseRow.user).where(UseRow.used.in_([run.id, *mine]), UseRow.user != job.id)))
    elsewhere = select(RunCheckpointRow.run_id).where(
        RunCheckpointRow.checkpoint_id.in_(mine), RunCheckpointRow.run_id != run.id
    )
    users |= set(session.scalars(elsewhere))
    if users:
        raise InUse("the run or a checkpoint of fine-tune", job.id, sorted(users))
    session.execute(delete(RunCheckpointRow).where(RunCheckpointRow.run_id == run.id))
    session.execute(delete(CheckpointRow).where(CheckpointRow.id.in_(mine)))
    session.delete(run)
    return mine


def _another_with(session: Session, run: str, job: str) -> str | None:
    others = select(JobRow).where(JobRow.kind == "finetune", JobRow.status == "succeeded", JobRow.id != job)
    return next((other.id for other in session.scalars(others) if (other.result or {}).get("run") == run), None)
