"""Answers with helpers: the same fields as in `gradstore.types`, and a way into a table where there are rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Generic, Literal

from pydantic import BaseModel

from gradstore import frames, types
from gradstore.types import (
    AdapterChoiceRequest,
    AttributionRequest,
    ComparisonRequest,
    EstimatesRequest,
    EstimateValidationRequest,
    EvaluationRequest,
    FinetuneRequest,
    Job,
    ProjectorRequest,
    RequestT,
    ResultT,
    ValidationRequest,
)

if TYPE_CHECKING:
    import datasets
    import pandas as pd


class Table:
    """An answer that holds rows."""

    def _table(self) -> Sequence[BaseModel]:
        raise NotImplementedError

    def to_pandas(self) -> pd.DataFrame:
        """The rows as a pandas.DataFrame (extra: pandas)."""
        return frames.to_pandas(self._table())

    def to_datasets(self) -> datasets.Dataset:
        """The rows as a datasets.Dataset (extra: datasets)."""
        return frames.to_datasets(self._table())


class Selection(Table, types.Selection):
    """The answer of /select; `data` holds all chosen rows unless fewer were asked for."""

    def _table(self) -> Sequence[BaseModel]:
        if self.count and not self.data:
            raise ValueError(f"this answer came without its rows: get them with store.selections.get({self.id!r})")
        return self.data


class FinetuneResult(Table, types.FinetuneResult):
    """What a fine-tune left behind; its table is the loss curve."""

    def _table(self) -> Sequence[BaseModel]:
        return self.loss_curve


class EvaluationResult(Table, types.EvaluationResult):
    """The measured rows."""

    def _table(self) -> Sequence[BaseModel]:
        return self.rows


class ValidationResult(Table, types.ValidationResult):
    """How well scores predict; its table is a row for each of them."""

    def _table(self) -> Sequence[BaseModel]:
        return self.scores


class EstimatesResult(Table, types.EstimatesResult):
    """What training on subsets is estimated to give; its table is the groups."""

    def _table(self) -> Sequence[BaseModel]:
        return self.groups


class EstimateValidationResult(Table, types.EstimateValidationResult):
    """How well estimates tell what training gives; its table is the subsets that were trained on."""

    def _table(self) -> Sequence[BaseModel]:
        return self.subsets


class ComparisonResult(Table, types.ComparisonResult):
    """Several selections side by side; its table has a row for each contestant and task."""

    def _table(self) -> Sequence[BaseModel]:
        return self.rows


class AdapterChoiceResult(Table, types.AdapterChoiceResult):
    """Which adapters were chosen; its table has a row for each that was scored, the best first."""

    def _table(self) -> Sequence[BaseModel]:
        return self.adapters


class ProjectorResult(Table, types.ProjectorResult):
    """A trained projector; its table is a row for each capability."""

    def _table(self) -> Sequence[BaseModel]:
        return self.capabilities


class AttributionResult(Table, types.AttributionResult):
    """What speaks for and against each row; its table has a line for each example that was found."""

    def _table(self) -> Sequence[BaseModel]:
        return [
            AttributedRow(question=number, end=end, **row.model_dump())
            for number, each in enumerate(self.data)
            for end in ("most", "least")
            for row in getattr(each, end)
        ]


class AttributedRow(types.InfluentialRow):
    """An example that was found, and for what."""

    question: int
    """Number of the request's row, from 0."""
    end: Literal["most", "least"]


AdapterChoiceJob = Job[AdapterChoiceRequest, AdapterChoiceResult]
AttributionJob = Job[AttributionRequest, AttributionResult]
EstimatesJob = Job[EstimatesRequest, EstimatesResult]
EstimateValidationJob = Job[EstimateValidationRequest, EstimateValidationResult]
ComparisonJob = Job[ComparisonRequest, ComparisonResult]
FinetuneJob = Job[FinetuneRequest, FinetuneResult]
EvaluationJob = Job[EvaluationRequest, EvaluationResult]
ProjectorJob = Job[ProjectorRequest, ProjectorResult]
ValidationJob = Job[ValidationRequest, ValidationResult]


class SucceededJob(Job[RequestT, ResultT], Generic[RequestT, ResultT]):
    """A job that has been waited for: its result is there."""

    result: ResultT
