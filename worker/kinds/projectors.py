"""A projector's work: its rows are read, it is trained, judged by the rows that it was not trained on, and kept."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

import numpy as np
from gradstore.types import ProjectorConfig, ProjectorEpoch, ProjectorResult

from datastore.errors import Conflict
from datastore.leases import Claim
from datastore.multilabel import label_scores, sample_scores
from datastore.projectors import Labelled
from worker.ability_files import write_projector
from worker.ability_space import gram_error, parameter_count
from worker.ability_training import Streams, Trained, fit
from worker.context import Context
from worker.heartbeat import Heartbeat
from worker.kinds import Commit


def work(claim: Claim, context: Context, heartbeat: Heartbeat) -> Commit:
    """Train a projector unless it is kept already; the answer commits it."""
    if not context.projectors.files.exists(claim.job):
        _train(claim, context, heartbeat)
    return partial(context.projectors.finish, claim)


def _train(claim: Claim, context: Context, heartbeat: Heartbeat) -> None:
    began = time.monotonic()
    context.ahead.drop()
    context.loaded.make_room()
    labelled = context.projectors.labelled(claim.plan)
    if not labelled.labels.any():
        raise Conflict("no row with an annotation calls for any capability: there is nothing to learn")
    config = ProjectorConfig.model_validate(claim.plan["config"])
    epochs: list[ProjectorEpoch] = []

    def tell(epoch: ProjectorEpoch) -> None:
        epochs.append(epoch)
        context.projectors.note(claim, epochs)

    trained = fit(
        _streams(labelled), labelled.labels, config, seed=claim.plan["seed"], device=context.device,
        on_step=heartbeat.report, on_epoch=tell,
    )  # fmt: skip
    names = context.annotations.capabilities(claim.plan["annotations"])
    result = _result(trained, labelled, names, seconds=claim.worked + time.monotonic() - began)
    heartbeat.check()
    write = partial(_write, trained)
    context.projectors.keep(claim, result, capabilities=names, write=write)


def _streams(labelled: Labelled) -> Streams:
    joined, rows = labelled.joined, labelled.rows
    if len(rows) == len(joined.present):
        return Streams(joined.gradients, joined.routing)
    return Streams(joined.gradients[rows], None if joined.routing is None else joined.routing[rows])


def _write(trained: Trained, path: Path) -> None:
    write_projector(trained.projector, path)


def _result(trained: Trained, labelled: Labelled, names: tuple[str, ...], *, seconds: float) -> ProjectorResult:
    space, split = trained.projector.space, trained.split
    true, training = labelled.labels[split.validation], labelled.labels[split.train]
    by_name = label_scores(trained.predicted, true, training, names=names)
    scores = sample_scores(trained.predicted, true)
    known = [each.f1 for each in by_name if each.f1 is not None]
    gram = space.gram().detach()
    return ProjectorResult(
        parameters=parameter_count(space),
        gradient_columns=labelled.joined.gradients.shape[1],
        routing_columns=0 if labelled.joined.routing is None else labelled.joined.routing.shape[1],
        training_rows=len(split.train),
        validation_rows=len(split.validation),
        unlabelled_rows=labelled.unlabelled,
        absent_rows=labelled.absent,
        zero_rows=trained.zero_rows,
        epochs=trained.epochs,
        capabilities=by_name,
        exact_match=scores.exact_match,
        precision=scores.precision,
        recall=scores.recall,
        f1=scores.f1,
        macro_f1=float(np.mean(known)) if known else None,
        gram=gram.cpu().tolist(),
        gram_error=gram_error(gram),
        temperature=float(space.temperature.detach()),
        seconds=seconds,
    )
