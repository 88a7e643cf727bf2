"""Imports: features that another program has computed, and what was found in their files."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from gradstore.types.base import (
    AdamForm,
    Body,
    FeatureDtype,
    GradientKind,
    Name,
    Named,
    Precision,
    ProjectionId,
    Reduction,
    Request,
    ServerPath,
    TemplateName,
)
from gradstore.types.gradients import ExcludedRow, FeatureSet
from gradstore.types.jobs import Job


class ImportRequest(Request):
    """Take features that another program has computed: LESS's gradient folder, or an array with a row an example.

    What the files do not say is said here, and kept with the features.
    """

    path: ServerPath | None = None
    """A folder or file of the server, inside an allowed root; null where the files were sent."""
    dataset: Named | None = None
    task: Named | None = None
    checkpoint: Named
    """The checkpoint that the gradients were taken at."""
    projection_id: ProjectionId
    """A name of your own for the projection: features are compared with those of the same name only."""
    kind: GradientKind | None = None
    """`adam` for a dataset and `sgd` for a task, unless said otherwise."""
    adam: AdamForm = "less"
    reduction: Reduction = "mean"
    dim: int | None = Field(None, ge=1, le=1 << 20)
    """Numbers of a row; needed where a folder has several (`dim4096`, `dim8192`)."""
    dtype: FeatureDtype = "float16"
    """Number type to store them in: LESS writes float16, and by default its numbers are kept as they are."""
    template: TemplateName = "tulu"
    max_length: int = Field(2048, ge=2, le=1 << 20)
    precision: Precision | None = None
    """Precision of the base model while it computed; by default the checkpoint's."""
    on_error: Literal["fail", "skip"] = "fail"
    """What to do with rows that are not finite: refuse the files, or store them as rows without a feature."""
    name: Name | None = None

    @model_validator(mode="after")
    def _one_owner(self) -> ImportRequest:
        if (self.dataset is None) == (self.task is None):
            raise ValueError("name either a dataset or a task")
        return self


class Norms(Body):
    """Lengths of the imported rows, those of zeros apart."""

    smallest: float
    median: float
    largest: float


class ImportResult(Body):
    """What was found in the files, and the feature set that it has become."""

    feature_set: FeatureSet
    files: list[str]
    """The files that were read, in the order of their rows."""
    source_dtype: str
    """Number type in the files."""
    rows: int
    normalised: bool
    """Whether every row has the length 1, as in LESS's `all_orig.pt`: their lengths are lost then."""
    norms: Norms
    excluded: list[ExcludedRow]
    """The first rows without a feature: of zeros, or, with `on_error=skip`, not finite."""
    total_excluded: int
    seconds: float


ImportJob = Job[ImportRequest, ImportResult]
