"""Evaluations: which model is measured on which test rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gradstore.types import AnyJob, Checkpoint, EvaluationRequest, ProblemItem, Task

from datastore import models
from datastore.catalog import Catalog
from datastore.errors import InvalidInput, refusal
from datastore.finetunes import Finetunes
from datastore.identity import content_id
from datastore.leases import Jobs, NewShard
from datastore.settings import Settings

DEFAULT_MAX_LENGTH = 2048  # tokens


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
        meant = request.model_dump(mode="json", exclude={"name", "finetune"}) | plan
        subjects = 2 if plan["checkpoint"] is not None and request.baseline else 1
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
            return _plan(request, model=checkpoint.model, revision=checkpoint.revision, checkpoint=checkpoint), [
                checkpoint.id
            ]
        job = self.jobs.get(request.finetune or "", kind="finetune")
        checkpoint = self.catalog.checkpoint(self.finetunes.last_checkpoint(job.id))
        plan = _plan(request, model=checkpoint.model, revision=checkpoint.revision, checkpoint=checkpoint)
        return plan, [job.id, checkpoint.id]


def _plan(
    request: EvaluationRequest, *, model: str, revision: str | None, checkpoint: Checkpoint | None = None
) -> dict[str, Any]:
    if checkpoint is not None and checkpoint.method == "mixture" and request.quantisation is not None:
        raise refusal(
            f"{checkpoint.id} is a mixture, trained on a model in its own precision: leave it out", "/quantisation"
        )
    return {
        "model": model,
        "revision": revision,
        "checkpoint": checkpoint.id if checkpoint and checkpoint.method != "none" else None,
        "template": request.template or (checkpoint and checkpoint.template) or "tulu",
        "max_length": request.max_length or (checkpoint and checkpoint.max_length) or DEFAULT_MAX_LENGTH,
        "precision": request.precision or (checkpoint.precision if checkpoint else "float32"),
    }


def passes(task: Task, at_most: int | None) -> int:
    """How many passes over its test rows the evaluation of a task takes: one for the loss, one more for a metric.

    At most so many rows of each subtask are measured.
    """
    return sum(
        (subtask.test if at_most is None else min(subtask.test, at_most)) * (1 if subtask.metric == "none" else 2)
        for subtask in task.subtasks
    )
