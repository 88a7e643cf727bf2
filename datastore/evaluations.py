"""Evaluations: which model is measured on which test rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gradstore.types import Adapter, AnyJob, Checkpoint, EvaluationRequest, ProblemItem, Task

from datastore import models
from datastore.catalog import Catalog
from datastore.combinations import combination_of
from datastore.errors import InvalidInput, refusal
from datastore.finetunes import Finetunes
from datastore.identity import content_id
from datastore.leases import Jobs, NewShard
from datastore.settings import Settings

DEFAULT_MAX_LENGTH = 2048  # tokens
OF_ADAPTERS = (
    *("adapter", "adapters", "combine", "merge_weights", "merge_rank", "merge_density"),
    *("arrow_top_k", "arrow_temperature"),
)
"""What the plan says where adapters are measured. Evaluations of anything else are called as before there were any."""


@dataclass(frozen=True)
class Evaluations:
    """The evaluations of a catalog."""

    catalog: Catalog
    jobs: Jobs
    finetunes: Finetunes
    settings: Settings

    def start(self, request: EvaluationRequest) -> tuple[AnyJob, bool]:
        """Start an evaluation, or return the one of the same content; says whether there is work to do.

        Raises `NotFound`, `InvalidInput`, and `Conflict` where the fine-tune has not succeeded.
        """
        tasks = self._tasks(request)
        plan, uses = self._subject(request)
        plan["tasks"] = [task.id for task in tasks]
        meant = request.model_dump(mode="json", exclude={"name", "finetune", *OF_ADAPTERS}) | plan
        subjects = 2 if is_tuned(plan) and request.baseline else 1
        return self.jobs.create(
            id=content_id("eval", meant),
            kind="evaluation",
            request=request.model_dump(mode="json"),
            plan=plan,
            shards=[NewShard(payload={}, units=subjects * sum(passes(task, request.max_rows) for task in tasks))],
            name=request.name,
            uses=[*uses, *plan["tasks"]],
        )

    def _tasks(self, request: EvaluationRequest) -> list[Task]:
        found: dict[str, Task] = {}
        problems = []
        for number, reference in enumerate(request.tasks):
            task = self.catalog.task(reference)
            if task.id in found:
                problems.append(ProblemItem(pointer=f"/tasks/{number}", detail=f"{task.name} is named twice"))
            elif not task.test:
                detail = f"the task {task.name} has no test rows: upload it again with some"
                problems.append(ProblemItem(pointer=f"/tasks/{number}", detail=detail))
            found[task.id] = task
        if problems:
            raise InvalidInput(problems[0].detail, errors=problems)
        return list(found.values())

    def _subject(self, request: EvaluationRequest) -> tuple[dict[str, Any], list[str]]:
        """What the worker is told of the model, and the ids of what the evaluation needs."""
        if request.model is not None:
            model = models.resolve(request.model, roots=self.settings.allowed_roots)
            return _plan(request, model=model, revision=models.revision_of(model, request.revision)), []
        if request.revision is not None:
            raise refusal("a revision goes with a model; a checkpoint has its own", "/revision")
        if request.checkpoint is not None:
            checkpoint = self.catalog.checkpoint(request.checkpoint)
            return _plan_of(request, checkpoint), [checkpoint.id]
        if request.adapter is not None:
            adapter = self.catalog.adapter(request.adapter)
            plan = _plan_of(request, self.catalog.checkpoint(adapter.checkpoint))
            return plan | {"adapters": [adapter.id]}, [adapter.id]
        if request.adapters is not None:
            return self._combined(request, [self.catalog.adapter(reference) for reference in request.adapters])
        job = self.jobs.get(request.finetune or "", kind="finetune")
        checkpoint = self.catalog.checkpoint(self.finetunes.last_checkpoint(job.id))
        return _plan_of(request, checkpoint), [job.id, checkpoint.id]

    def _combined(self, request: EvaluationRequest, adapters: Sequence[Adapter]) -> tuple[dict[str, Any], list[str]]:
        ids = [adapter.id for adapter in adapters]
        plan = {"combination": combination_of(request, adapters), "adapters": ids}
        checkpoints = [self.catalog.checkpoint(adapter.checkpoint) for adapter in adapters]
        of_base = _plan(request, model=adapters[0].base_model, revision=adapters[0].revision, checkpoints=checkpoints)
        return of_base | plan, ids


def is_tuned(plan: Mapping[str, Any]) -> bool:
    """Whether an evaluation measures more than a base model as it is."""
    return plan["checkpoint"] is not None or "combination" in plan


def _plan_of(request: EvaluationRequest, checkpoint: Checkpoint) -> dict[str, Any]:
    if checkpoint.method == "mixture" and request.quantisation is not None:
        raise refusal(
            f"{checkpoint.id} is a mixture, trained on a model in its own precision: leave it out", "/quantisation"
        )
    plan = _plan(request, model=checkpoint.model, revision=checkpoint.revision, checkpoints=[checkpoint])
    return plan | {"checkpoint": checkpoint.id if checkpoint.method != "none" else None}


def _plan(
    request: EvaluationRequest, *, model: str, revision: str | None, checkpoints: Sequence[Checkpoint] = ()
) -> dict[str, Any]:
    """How a model is asked: as was said, else as these checkpoints were trained."""
    longest = max((checkpoint.max_length or 0 for checkpoint in checkpoints), default=0)
    return {
        "model": model,
        "revision": revision,
        "checkpoint": None,
        "template": request.template or _agreed("template", checkpoints) or "tulu",
        "max_length": request.max_length or longest or DEFAULT_MAX_LENGTH,
        "precision": request.precision or _agreed("precision", checkpoints) or "float32",
    }


def _agreed(field: Literal["template", "precision"], checkpoints: Sequence[Checkpoint]) -> str | None:
    """What the checkpoints that say it were trained with. Raises `InvalidInput` where they differ."""
    said = sorted({value for each in checkpoints if (value := getattr(each, field)) is not None})
    if len(said) > 1:
        raise refusal(f"the adapters were trained with {' and '.join(said)}: say which is meant", f"/{field}")
    return said[0] if said else None


def passes(task: Task, at_most: int | None) -> int:
    """How many passes over its test rows the evaluation of a task takes: one for the loss, one more for a metric.

    At most so many rows of each subtask are measured.
    """
    return sum(
        (subtask.test if at_most is None else min(subtask.test, at_most)) * (1 if subtask.metric == "none" else 2)
        for subtask in task.subtasks
    )
