"""Conversions: feature sets of another dtype, made from stored ones."""

from __future__ import annotations

from pydantic import Field, model_validator

from gradstore.types.base import Body, FeatureDtype, Name, Named, Request
from gradstore.types.gradients import FeatureSet
from gradstore.types.jobs import Job


class ConversionRequest(Request):
    """Round stored features to a narrower dtype, without a model: float16 to int8, say.

    What is converted: the feature sets named, those of a job, or all of a dataset or task (of a run). Where the same
    features are stored in several dtypes, the widest.
    """

    feature_sets: list[Named] | None = Field(None, min_length=1, max_length=1000)
    gradients: Named | None = None
    """A job that makes feature sets, by id or name: gradients, an import or a conversion."""
    dataset: Named | None = None
    task: Named | None = None
    run: Named | None = None
    """Of a dataset or task, the features at this run's checkpoints only."""
    dtype: FeatureDtype
    """What is wanted."""
    name: Name | None = None

    @model_validator(mode="after")
    def _one_source(self) -> ConversionRequest:
        if sum(part is not None for part in (self.feature_sets, self.gradients, self.dataset, self.task)) != 1:
            raise ValueError("name one of feature_sets, gradients, dataset and task")
        if self.run is not None and self.dataset is None and self.task is None:
            raise ValueError("run goes with a dataset or a task")
        return self


class ConversionResult(Body):
    """The feature sets that there are now."""

    feature_sets: list[FeatureSet]
    rows: int
    """Of each feature set."""
    converted_rows: int
    """Rows that this job read, summed over feature sets of a checkpoint once; of the others all existed."""
    seconds: float


ConversionJob = Job[ConversionRequest, ConversionResult]
