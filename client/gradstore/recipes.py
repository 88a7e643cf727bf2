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
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Unpack

from pydantic import BaseModel, ConfigDict
from tqdm.auto import tqdm

from gradstore._endpoints import Training
from gradstore.errors import Conflict, NotFound
from gradstore.results import AdapterChoiceResult, EvaluationResult, FinetuneResult, Selection, SucceededJob
from gradstore.types import (
    AdapterChoiceRequest,
    AdapterSimilarity,
    Dataset,
    EvaluationRequest,
    FeatureDtype,
    FinetuneRequest,
    GradientsRequest,
    GradientsResult,
    ShotNearness,
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


class RocketResult(BaseModel):
    """What the flow left behind, step by step."""

    model_config = ConfigDict(frozen=True)

    dataset: Dataset
    task: Task
    choice: SucceededJob[AdapterChoiceRequest, AdapterChoiceResult]
    pool_embeddings: SucceededJob[GradientsRequest, GradientsResult]
    task_embeddings: SucceededJob[GradientsRequest, GradientsResult]
    selection: Selection
    trained_on: Dataset
    """The selected rows and the shots."""
    tuned: SucceededJob[FinetuneRequest, FinetuneResult]
    evaluation: SucceededJob[EvaluationRequest, EvaluationResult] | None
    """None where it was not asked for, or the task has no test rows."""


def rocket(
    store: GradientStore,
    *,
    pool: str | os.PathLike[str],
    task: str | os.PathLike[str],
    model: str,
    encoder: str,
    task_kind: TaskKind | None = None,
    adapters: str | Sequence[str] | None = None,
    candidates: int = 8,
    size: int = 4,
    similarity: AdapterSimilarity = "cosine_ab",
    k: int = 1000,
    nearness: ShotNearness = "max_cosine",
    tau: float = 0.9,
    top_k: int = 2,
    router_only: bool = False,
    evaluate: bool = True,
    max_rows: int | None = None,
    progress: bool = True,
    say: Callable[[str], None] | None = None,
    **training: Unpack[Training],
) -> RocketResult:
    """Make a model for a task of which there are a few examples (ROCKET, arXiv 2408.15915): adapters and data are
    chosen by them, and a mixture of these adapters is trained on these data.

    `pool` and `task` are as in `less`; the shots are the task's validation rows. Of the bank's adapters of `model`, or
    of those named, the best set of `size` is chosen among `candidates`; of the pool the `k` rows nearest to the shots
    by the sentence `encoder` (hub id, or a folder of the server), less those like one another and those that overlap
    with the task's rows. The adapters become the experts, `top_k` for a token, and are trained with their routers on
    shots and rows, or the routers alone; the mixture is evaluated beside the base model on the task's test rows. The
    adapters must have one rank, and be on the same modules. Raises `JobFailed` of the step that failed: call again to
    go on.
    """
    step = _counter(say or (_on_stderr if progress else None), steps=6 if evaluate else 5)
    step("the pool and the task")
    dataset = _pool(store, pool, progress=progress)
    target = _task(store, task, kind=task_kind, progress=progress)

    step(f"adapters for {target.validation:,} shots")
    wanted = {"adapters": adapters} if adapters is not None else {"base_model": model}
    choice = store.adapter_choices.wait(
        store.adapter_choices.create(task=target.id, candidates=candidates, size=size, similarity=similarity, **wanted),
        progress=progress,
    )
    experts = [store.adapters.get(adapter) for adapter in choice.result.chosen.members]

    step(f"embeddings of {dataset.rows:,} rows and of the shots")
    encoding = store.checkpoints.register(model=encoder).id
    pool_embeddings = store.gradients.wait(
        store.gradients.create(dataset=dataset.id, checkpoints=encoding, kinds="embedding"), progress=progress
    )
    task_embeddings = store.gradients.wait(
        store.gradients.create(task=target.id, checkpoints=encoding, kinds="embedding"), progress=progress
    )

    step(f"selection of the {k:,} rows nearest to the shots")
    features = pool_embeddings.result.feature_sets[0]
    selection = store.select(
        task=target.id,
        dataset=dataset.id,
        method="embedding",
        checkpoint=encoding,
        dtype=features.dtype,
        converted_from="none",
        template=features.template,
        max_length=features.max_length,
        precision=features.precision,
        strategy="shots",
        k=k,
        nearness=nearness,
        tau=tau,
        exclude_contaminated=True,
        progress=progress,
    )
    both = _with_shots(store, selection, target, progress=progress)

    step(f"training of {len(experts)} experts on {both.rows:,} rows and shots")
    tuned = store.finetunes.wait(
        store.finetunes.create(
            dataset=both.id,
            model=model,
            mixture={
                "experts": len(experts),
                "top_k": min(top_k, len(experts)),
                "rank": experts[0].rank,
                "modules": experts[0].targets,
                "router_only": router_only,
            },
            experts_from=[expert.id for expert in experts],
            **training,
        ),
        progress=progress,
    )

    evaluation = None
    if evaluate and target.test:
        step("evaluation of the base model and the mixture")
        evaluation = store.evaluations.wait(
            store.evaluations.create(finetune=tuned.id, tasks=[target.id], max_rows=max_rows), progress=progress
        )
    return RocketResult(
        dataset=dataset,
        task=target,
        choice=choice,
        pool_embeddings=pool_embeddings,
        task_embeddings=task_embeddings,
        selection=selection,
        trained_on=both,
        tuned=tuned,
        evaluation=evaluation,
    )


def _with_shots(store: GradientStore, selection: Selection, task: Task, *, progress: bool) -> Dataset:
    """A task's validation rows and the selected ones as one dataset: the same for the same rows."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"{selection.id}-and-shots.jsonl"
        store.tasks.download(task.id, path, split="validation")
        with path.open("ab") as file:
            file.writelines(line.rstrip(b"\n") + b"\n" for line in store.selections.lines(selection.id))
        return store.datasets.upload(path, progress=progress)


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
