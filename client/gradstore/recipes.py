"""Whole flows as one call, made of the client's own calls: read them as programs to start from.

They can be interrupted and run again at any time. The service names everything by its content, so the same call finds
what the last one left: a finished job answers at once, a running one is waited for, and one that failed or was
cancelled goes on from its last finished shard. The price is that files given by path are uploaded again to learn their
ids; give ids or names of what is stored to save that.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from pydantic import BaseModel, ConfigDict
from tqdm.auto import tqdm

from gradstore._endpoints import Training
from gradstore.errors import Conflict, NotFound
from gradstore.results import EvaluationResult, FinetuneResult, Selection, SucceededJob
from gradstore.types import (
    Dataset,
    EvaluationRequest,
    FeatureDtype,
    FinetuneRequest,
    GradientsRequest,
    GradientsResult,
    Task,
    TaskKind,
)

if TYPE_CHECKING:
    from gradstore.client import GradientStore


class LessResult(BaseModel):
    """What the flow left behind, step by step."""

    model_config = ConfigDict(frozen=True)

    dataset: Dataset
    task: Task
    warmup: SucceededJob[FinetuneRequest, FinetuneResult]
    pool_gradients: SucceededJob[GradientsRequest, GradientsResult]
    task_gradients: SucceededJob[GradientsRequest, GradientsResult]
    selection: Selection
    tuned: SucceededJob[FinetuneRequest, FinetuneResult]
    evaluation: SucceededJob[EvaluationRequest, EvaluationResult] | None
    """None where it was not asked for, or the task has no test rows."""


def less(
    store: GradientStore,
    *,
    pool: str | os.PathLike[str],
    task: str | os.PathLike[str],
    model: str,
    task_kind: TaskKind | None = None,
    pct: float = 0.05,
    warmup_fraction: float = 0.05,
    dim: int = 8192,
    dtype: FeatureDtype = "int8",
    evaluate: bool = True,
    max_rows: int | None = None,
    progress: bool = True,
    say: Callable[[str], None] | None = None,
    **training: Unpack[Training],
) -> LessResult:
    """Select the part of a pool that helps a task most (LESS, arXiv 2402.04333), train on it, and measure the gain.

    `pool` and `task` are ids or names of what is stored, or paths of this machine, which are uploaded; a task's path
    needs its `task_kind`, and its last part is the task's name, unless the same task is stored already, under whatever
    name. Raises `Conflict` where another task has that name. Warms up on a random `warmup_fraction` of the pool,
    computes gradients of `dim` dimensions for the pool (Adam) and the task (SGD) at every warm-up checkpoint, selects
    the best `pct`, trains `model` anew on them, and evaluates it beside the base model on the task's test rows, at most
    `max_rows` a subtask. `progress` shows a bar for each step, and `say` is told when it begins (by default on stderr,
    where `progress` is wanted). Raises `JobFailed` of the step that failed: call again to go on.
    """
    step = _counter(say or (_on_stderr if progress else None), steps=7 if evaluate else 6)
    step("the pool and the task")
    dataset = _pool(store, pool, progress=progress)
    target = _task(store, task, kind=task_kind, progress=progress)

    step(f"warm-up on {warmup_fraction:.3g} of {dataset.rows:,} rows")
    warmup = store.finetunes.wait(
        store.finetunes.create(dataset=dataset.id, fraction=warmup_fraction, model=model, **training),
        progress=progress,
    )
    run = warmup.result.run

    step(f"gradients of {dataset.rows:,} rows at {len(warmup.result.checkpoints)} checkpoints")
    quantisation, checkpointing = training.get("quantisation"), training.get("gradient_checkpointing")
    pool_gradients = store.gradients.wait(
        store.gradients.create(
            dataset=dataset.id,
            run=run,
            kinds="adam",
            dims=dim,
            dtype=dtype,
            quantisation=quantisation,
            gradient_checkpointing=checkpointing,
        ),
        progress=progress,
    )

    step(f"gradients of the task's {target.validation:,} validation rows")
    task_gradients = store.gradients.wait(
        store.gradients.create(
            task=target.id,
            run=run,
            kinds="sgd",
            dims=dim,
            dtype=dtype,
            quantisation=quantisation,
            gradient_checkpointing=checkpointing,
        ),
        progress=progress,
    )

    step(f"selection of the best {100 * pct:.3g} %")
    features = pool_gradients.result.feature_sets[0]
    selection = store.select(
        task=target.id,
        dataset=dataset.id,
        pct=pct,
        run=run,
        kind=features.kind,
        adam=features.adam,
        reduction=features.reduction,
        dim=dim,
        dtype=dtype,
        projection=features.projection,
        seed=features.seed,
        template=features.template,
        max_length=features.max_length,
        precision=features.precision,
        quantisation=features.quantisation or "none",
        converted_from="none",
        progress=progress,
    )

    step(f"training on the {selection.count:,} selected rows")
    tuned = store.finetunes.wait(
        store.finetunes.create(selection=selection.id, model=model, **training), progress=progress
    )

    evaluation = None
    if evaluate and target.test:
        step("evaluation of the base model and the tuned one")
        evaluation = store.evaluations.wait(
            store.evaluations.create(
                finetune=tuned.id, tasks=[target.id], max_rows=max_rows, quantisation=quantisation
            ),
            progress=progress,
        )
    return LessResult(
        dataset=dataset,
        task=target,
        warmup=warmup,
        pool_gradients=pool_gradients,
        task_gradients=task_gradients,
        selection=selection,
        tuned=tuned,
        evaluation=evaluation,
    )


def _pool(store: GradientStore, pool: str | os.PathLike[str], *, progress: bool) -> Dataset:
    path = _local(pool)
    return store.datasets.get(str(pool)) if path is None else store.datasets.upload(path, progress=progress)


def _task(store: GradientStore, task: str | os.PathLike[str], *, kind: TaskKind | None, progress: bool) -> Task:
    path = _local(task)
    if path is None:
        return store.tasks.get(str(task))
    if kind is None:
        return _called_like(store, task, path)
    name = path.resolve().stem if path.is_file() else path.resolve().name
    try:
        return store.tasks.upload(path, name=name, kind=kind, progress=progress)
    except Conflict as error:
        if error.problem.type == "named-otherwise":
            return store.tasks.get(error.problem.errors[0].detail)
        if error.problem.type == "name-taken":
            raise _taken(error, store.tasks.get(name), path) from error
        raise


def _called_like(store: GradientStore, task: str | os.PathLike[str], path: Path) -> Task:
    """The stored task whose name is by chance that of a path here, too: without its kind, the path is no task."""
    try:
        if isinstance(task, str) and os.sep not in task:
            return store.tasks.get(task)
    except NotFound:
        pass
    raise ValueError(f"{path} is a local path: say what it holds with task_kind (mmlu, bbh, …, jsonl)")


def _taken(error: Conflict, holder: Task, path: Path) -> Conflict:
    """A name that belongs to another task, with what to do about it here, where no other name can be sent."""
    detail = (
        f"{holder.id} is called {holder.name!r} and is another task than {path}: give that id to use it; to use "
        f"{path}, rename it, or store it with POST /tasks and send replace=true"
    )
    return Conflict(error.problem.model_copy(update={"detail": detail}), request_id=error.request_id)


def _local(reference: str | os.PathLike[str]) -> Path | None:
    """The path of something on this machine; None for an id or a name."""
    path = Path(reference)
    if path.exists():
        return path
    if not isinstance(reference, str) or os.sep in reference:
        raise FileNotFoundError(f"{path} does not exist")
    return None


def _counter(say: Callable[[str], None] | None, *, steps: int) -> Callable[[str], None]:
    """Make a function that tells which step begins."""
    numbers = itertools.count(1)

    def begin(step: str) -> None:
        if say is not None:
            say(f"[{next(numbers)}/{steps}] {step}")

    return begin


def _on_stderr(line: str) -> None:
    tqdm.write(line, file=sys.stderr)
