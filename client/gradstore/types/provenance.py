"""Provenance: what a selection was made from, by what, when, and the request that makes it again."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from gradstore.types.base import Body, CheckpointMethod, Precision
from gradstore.types.datasets import DatasetSource
from gradstore.types.gradients import FeatureSet


class ProvenanceDataset(Body):
    """A pool that rows were chosen from."""

    id: str
    name: str | None
    rows: int
    origins: dict[str, int]
    """Rows per origin."""
    sources: list[DatasetSource]
    """The uploaded files, each with its SHA-256."""


class ProvenanceTask(Body):
    """A task that rows were chosen for."""

    id: str
    name: str
    kind: str
    validation: int
    subtasks: int


class ProvenanceCheckpoint(Body):
    """A checkpoint whose gradients were compared; of one that is deleted by now the id and the weight are left."""

    id: str
    weight: float | None
    """Its part of the score; null beside features."""
    name: str | None = None
    model: str | None = None
    revision: str | None = None
    method: CheckpointMethod | None = None
    epoch: int | None = None
    step: int | None = None
    learning_rate: float | None = None
    precision: Precision | None = None


class ProvenanceRun(Body):
    """The training that the checkpoints come from; of one that is deleted by now the id is left."""

    id: str
    name: str | None = None
    model: str | None = None
    revision: str | None = None
    finetune: str | None = None
    """The fine-tune of this service that was the training."""
    training: dict[str, Any] | None = None
    """Its request, with all defaults."""


class Excluded(Body):
    """A dataset or selection whose examples were left out; null where it has no name, or is deleted by now."""

    id: str
    name: str | None


class Provenance(Body):
    """Everything that a selection depends on, by ids and names, and how to make it again."""

    selection: str
    name: str | None
    created_at: datetime
    gradstore: str
    """Version of the service that tells this."""
    count: int
    pool: int
    """Rows of the pool, less those that were excluded."""
    left_out: dict[str, int]
    """Rows that could not be chosen, by reason."""
    origins: dict[str, int]
    """Chosen rows per origin."""
    pool_origins: dict[str, int]
    recipe: dict[str, Any]
    """The recipe, resolved to ids."""
    datasets: list[ProvenanceDataset]
    tasks: list[ProvenanceTask]
    checkpoints: list[ProvenanceCheckpoint]
    run: ProvenanceRun | None
    excluded: list[Excluded]
    request: str
    """The HTTP request that gives the same selection."""
    command: str
    """The command that gives the same selection."""


class FeaturesProvenance(Body):
    """What exported features are: the metadata of their file."""

    gradstore: str
    """Version of the service that tells this."""
    feature_set: FeatureSet
    start: int
    """The first exported row."""
    stop: int
    """The row after the last one."""
    dataset: ProvenanceDataset | None
    task: ProvenanceTask | None
    checkpoint: ProvenanceCheckpoint
