"""What the estimates of a plan are made from: the pool's rows by group, the targets' rows, and the step's length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from gradstore.types import Metric
from numpy.typing import NDArray

from datastore import gradex
from datastore.annotations import Annotations
from datastore.array_files import ArrayFiles, Arrays
from datastore.checkpoints import Checkpoints
from datastore.datasets import Datasets
from datastore.estimate_parts import grouping, grouping_key
from datastore.features import Features
from datastore.gradex import UNGROUPED, Fits, Groups, Members, Numbers, Pool, TargetRows
from datastore.groupings import by_annotation, by_cluster, by_label
from datastore.influence import Mask
from datastore.segments import Rows
from datastore.tasks import TaskExample, Tasks


@dataclass(frozen=True)
class World:
    """What the estimates of a plan are made from."""

    pool: Pool
    missing: NDArray[np.int64]
    """Rows of each group that have no feature (groups,)."""
    targets: Sequence[TargetRows]
    """Of each task."""
    parameters: int
    """Numbers that the checkpoint's training moves."""
    length: float
    """‖θ*‖, or 1 where a step is not measured by it."""

    def estimate(self, members: Members, plan: dict[str, Any]) -> Arrays:
        """What is found of subsets: their weights, steps and estimates (subsets, targets)."""
        fits = gradex.fit(self.pool, members, c=plan["c"])
        return self.of_fits(members, fits, self.unprojected({"weights": fits.weights}), plan)

    def of_fits(self, members: Members, fits: Fits, unprojected: Numbers, plan: dict[str, Any]) -> Arrays:
        """The same of subsets whose regressions are done; `unprojected` is ‖Pŵ‖ (subsets,)."""
        losses, accuracies, lengths = self.read(fits.weights, unprojected, plan["scale"])
        return {
            "members": np.packbits(members, axis=1),
            "weights": fits.weights,
            "fit_losses": fits.losses,
            "lengths": lengths,
            "losses": losses,
            "accuracies": accuracies,
        }

    def unprojected(self, arrays: Arrays) -> Numbers:
        """‖Pŵ‖ of subsets (subsets,): as it was measured, or what it is on average over projections."""
        known = arrays.get("unprojected")
        return gradex.unprojected_lengths(arrays["weights"], parameters=self.parameters) if known is None else known

    def read(self, weights: Numbers, unprojected: Numbers, scale: float | None) -> tuple[Numbers, Numbers, Numbers]:
        """The estimated losses and accuracies (subsets, targets), and the lengths of the steps (subsets,)."""
        factors, lengths = gradex.step_factors(unprojected, scale=scale, length=self.length)
        found = [gradex.estimated(target, weights, factors) for target in self.targets]
        losses, accuracies = (np.concatenate(parts, axis=1) for parts in zip(*found, strict=True))
        return losses, accuracies, lengths


@dataclass(frozen=True)
class EstimateWorlds:
    """What there is in a store for estimates to be made from."""

    datasets: Datasets
    tasks: Tasks
    features: Features
    checkpoints: Checkpoints
    annotations: Annotations
    files: ArrayFiles

    def world(self, plan: dict[str, Any]) -> World:
        """What the estimates are made from. Raises `Conflict` where it was deleted, and `Damaged`."""
        features, _, valid = read_log_odds(self.features.views([plan["feature_set"]])[0], offsets=False)
        groups = self.grouping(plan)
        usable = np.where(valid, groups, UNGROUPED)
        return World(
            pool=Pool.of(features, usable, count=len(plan["names"])),
            missing=self.missing(plan),
            targets=[self.target(task, features) for task, features in plan["tasks"].items()],
            parameters=plan["parameters"],
            length=self.checkpoints.adapter_length(plan["checkpoint"]) if plan["relative"] else 1.0,
        )

    def grouping(self, plan: dict[str, Any]) -> Groups:
        """The group of each row of the pool (n,), found once and kept."""
        key = grouping_key(plan)
        kept = self.files.get(key)
        if kept is None:
            kept = {"groups": self._grouped(plan)}
            self.files.put(key, kept, made_from=grouping(plan))
        groups: Groups = kept["groups"]
        return groups

    def missing(self, plan: dict[str, Any]) -> NDArray[np.int64]:
        """Rows of each group without a feature (groups,)."""
        groups, valid = self.grouping(plan), self.features.views([plan["feature_set"]])[0].valid
        without = groups[~valid & (groups != UNGROUPED)]
        return np.bincount(without, minlength=len(plan["names"]))

    def target(self, task: str, features: str, among: Mask | None = None) -> TargetRows:
        """The rows of a task that have features; of those `among` others, where some are named (rows,)."""
        rows, log_odds, valid = read_log_odds(self.features.views([features])[0])
        valid = valid if among is None else valid & among
        names = [row.subtask for row in self.tasks.validation(task)]
        numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
        labels = np.array([numbers[name] for name in names], np.int64)
        return TargetRows(log_odds[valid], rows[valid].astype(np.float64), labels[valid], len(numbers))

    def measured_rows(self, task: str, features: str) -> list[TaskExample]:
        """The validation rows of a task that have a feature: those of `target`, in their order."""
        valid = self.features.views([features])[0].valid
        return [row for row, known in zip(self.tasks.validation(task), valid, strict=True) if known]

    def metric(self, task: str, subtask: str | None = None) -> Metric:
        """How the rows of a task, or of one of its subtasks, are judged; `none` where they are not judged alike."""
        found = {row.metric for row in self.tasks.validation(task) if subtask in (None, row.subtask)}
        return found.pop() if len(found) == 1 else "none"

    def annotated(self, annotation: str) -> tuple[Groups, list[str]]:
        """The groups of an annotation's rows, and what they are called."""
        return by_annotation(self.annotations.labels(annotation)[0], self.annotations.capabilities(annotation))

    def _grouped(self, plan: dict[str, Any]) -> Groups:
        if plan["group_by"] == "cluster":
            features, _, valid = read_log_odds(self.features.views([plan["feature_set"]])[0], offsets=False)
            return by_cluster(features, valid, count=len(plan["names"]))
        if plan["group_by"] == "annotation":
            return self.annotated(plan["annotation"])[0]
        rows = self.datasets.label_columns(plan["dataset"])
        if plan["group_by"] == "label":
            return by_label(rows.ids.to_pylist(), plan["labels"], plan["names"])
        numbers = {name: number for number, name in enumerate(plan["names"])}
        found: Groups = np.array([numbers[name] for name in rows.origins], np.int64)[rows.origin]
        return found


def read_log_odds(view: Rows, *, offsets: bool = True) -> tuple[NDArray[np.float32], NDArray[np.float64], Mask]:
    """The features g̃ (n, d), the log-odds z (n,) and which rows have them (n,); without `offsets` no z is read.

    Raises `Damaged`.
    """
    features = np.concatenate([view.features(start, stop) for start, stop in pairwise(view.edges)])
    log_odds = view.column("logodds").astype(np.float64) if offsets else np.zeros(0)
    return features, log_odds, view.valid
