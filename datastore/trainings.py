"""Trainings that exist to be measured: the losses on a task's rows after training on some rows of a pool.

Their models are not kept: a training that is asked for again, by another job or after a kill, is found by its
content, which is what was trained on, how, and what was measured. A file holds a number for each row of the task, so
that thousands of trainings cost megabytes, where their checkpoints would cost gigabytes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gradstore.types import JobKind, Split, TrainingRecipe
from sqlalchemy import ColumnElement, select
from sqlalchemy.orm import Session

from datastore.catalog import Catalog
from datastore.correlation import Numbers
from datastore.depot import LOCAL, Depot
from datastore.durable import beside, sweep_files, sync_folder, write_file
from datastore.errors import Damaged
from datastore.identity import content_id
from datastore.schema import JobRow, ShardRow

TRAININGS_VERSION = 1
"""Counted up when the same training would give other losses, so that old ones are not found again."""

MEASURE: tuple[JobKind, ...] = ("validation", "comparison", "estimate-validation")
"""Kinds of jobs whose shards are trainings."""


@dataclass(frozen=True)
class Training:
    """What is trained on and measured."""

    dataset: str
    rows: Sequence[int]
    """Rows of the dataset, in order; none: the base model is measured as it is."""
    recipe: TrainingRecipe
    """Resolved: the model's commit, and the seed."""
    task: str
    split: Split

    @property
    def content(self) -> dict[str, Any]:
        """All that its losses depend on."""
        rows = np.asarray(self.rows, "<i8")
        return {
            "version": TRAININGS_VERSION,
            "dataset": self.dataset,
            "rows": {"count": len(rows), "sha256": hashlib.sha256(rows.tobytes()).hexdigest()},
            "recipe": self.recipe.model_dump(mode="json"),
            "task": self.task,
            "split": self.split,
        }

    @property
    def key(self) -> str:
        """Its name."""
        return content_id("training", self.content)


@dataclass(frozen=True)
class Measured:
    """What came of a training."""

    losses: Sequence[float | None]
    """Loss of each row of the task's split; None where truncation leaves nothing of its answer."""
    rows: int
    """Rows trained on: those with a token to learn from."""
    tokens: int
    """Tokens trained on, all epochs."""
    seconds: float

    @property
    def values(self) -> Numbers:
        """The losses (rows,), NaN where there is none."""
        return np.array([np.nan if loss is None else loss for loss in self.losses])


class Trainings:
    """The finished trainings under one folder, a JSON file each."""

    def __init__(self, root: Path, *, depot: Depot = LOCAL) -> None:
        self.root, self._depot = root, depot

    def get(self, key: str) -> Measured | None:
        """What came of the training of this name, or None where it has not been done."""
        self._depot.ensure(self._path(key))
        try:
            text = self._path(key).read_bytes()
        except FileNotFoundError:
            return None
        try:
            return Measured(**json.loads(text)["measured"])
        except (ValueError, KeyError, TypeError) as error:
            raise Damaged(
                f"{self._path(key)} cannot be read ({error}): delete it, and the training is done again"
            ) from error

    def put(self, training: Training, measured: Measured) -> Measured:
        """Keep what came of a training; returns what is kept, which is the first worker's where several did it."""
        path = self._path(training.key)
        kept = {"made_from": training.content, "measured": asdict(measured)}
        with beside(path) as partial:
            write_file(partial, json.dumps(kept, allow_nan=False).encode())
            if not self._depot.publish(partial, path):
                return self.get(training.key) or measured
            try:
                os.link(partial, path)
            except FileExistsError:
                return self.get(training.key) or measured
        sync_folder(path.parent)
        return measured

    def kept(self, key: str) -> Measured:
        """What came of a training that a job at work has recorded. Raises `Damaged` where it is gone."""
        found = self.get(key)
        if found is None:
            raise Damaged(f"{key} was deleted while its job was at work: delete the job and send it again")
        return found

    def record(self, key: str, _session: Session, shard: ShardRow) -> None:
        """Write on a shard which training it was. Raises `Damaged` where that is gone."""
        if self.get(key) is None:
            raise Damaged(f"{key} was deleted before it was recorded; the next attempt does it again")
        shard.payload = {**shard.payload, "training": key}

    def forget_job(self, session: Session, job: JobRow) -> None:
        """Delete the trainings that no job but this one has."""
        self.delete(recorded(session, ShardRow.job_id == job.id) - recorded(session, ShardRow.job_id != job.id))

    def delete(self, keys: Iterable[str]) -> None:
        """Forget trainings."""
        for key in keys:
            self._depot.delete(self._path(key))
            self._path(key).unlink(missing_ok=True)

    def keys(self, *, older_than: float) -> set[str]:
        """The trainings that were done more than so many seconds ago."""
        names = self._depot.names(self.root, "training_*.json", older_than=older_than)
        return {name.removesuffix(".json") for name in names}

    def sweep(self, catalog: Catalog, *, older_than: float) -> None:
        """Remove the trainings of `older_than` seconds ago that no job has: of deleted ones, and of workers that were
        killed before they recorded them; and what killed processes left unfinished.
        """
        sweep_files(self.root, older_than=older_than)
        if old := self.keys(older_than=older_than):
            with catalog.transaction() as session:
                self.delete(old - recorded(session))

    def _path(self, key: str) -> Path:
        return self.root / f"{key}.json"


def recorded(session: Session, *which: ColumnElement[bool]) -> set[str]:
    """The trainings that shards have recorded."""
    payloads = session.scalars(select(ShardRow.payload).where(ShardRow.kind.in_(MEASURE), *which))
    return {payload["training"] for payload in payloads if "training" in payload}
