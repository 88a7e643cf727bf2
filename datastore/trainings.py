"""Trainings that exist to be measured: the losses on a task's rows after training on some rows of a pool.

Their models are not kept: a training that is asked for again, by another validation or after a kill, is found by its
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
from gradstore.types import Split, TrainingRecipe

from datastore.correlation import Numbers
from datastore.durable import beside, sweep_files, sync_folder, untouched_for, write_file
from datastore.errors import Damaged
from datastore.identity import content_id

TRAININGS_VERSION = 1
"""Counted up when the same training would give other losses, so that old ones are not found again."""


@dataclass(frozen=True)
class Training:
    """What is trained on and measured."""

    dataset: str
    rows: Sequence[int]
    """Rows of the dataset, in order."""
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

    def __init__(self, root: Path) -> None:
        self.root = root

    def get(self, key: str) -> Measured | None:
        """What came of the training of this name, or None where it has not been done."""
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
            try:
                os.link(partial, path)
            except FileExistsError:
                return self.get(training.key) or measured
        sync_folder(path.parent)
        return measured

    def delete(self, keys: Iterable[str]) -> None:
        """Forget trainings."""
        for key in keys:
            self._path(key).unlink(missing_ok=True)

    def keys(self, *, older_than: float) -> set[str]:
        """The trainings that were done more than so many seconds ago."""
        return {path.stem for path in self.root.glob("training_*.json") if untouched_for(path) > older_than}

    def sweep(self, *, older_than: float) -> int:
        """Remove what killed processes left unfinished, untouched for so many seconds; returns how many there were."""
        return sweep_files(self.root, older_than=older_than)

    def _path(self, key: str) -> Path:
        return self.root / f"{key}.json"
