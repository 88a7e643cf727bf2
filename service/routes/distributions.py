"""GET /scores/distribution and GET /overlaps: scores as a whole, for one selection or between several tasks."""

from __future__ import annotations

from typing import Annotated

from fastapi import Query as Parameters
from fastapi import Response
from fastapi.responses import JSONResponse
from gradstore.types import Fraction, Named, Overlaps, ScoreDistribution
from pydantic import Field, model_validator

from datastore import distributions
from service.dependencies import BackendDep
from service.routes.select import STARTED, ScoresAsked, ready_scores
from service.routing import Router

router = Router(tag="selections")


class DistributionQuery(ScoresAsked):
    """Whose distribution is asked for, and how finely."""

    bins: int = Field(60, ge=1, le=500)
    """Bins of the histogram, equally wide."""
    steps: int = Field(200, ge=1, le=1000)
    """Cuts: the fractions 1/steps, 2/steps, … of the pool."""


class OverlapsQuery(ScoresAsked):
    """Which tasks are compared, and how much each selects."""

    task: list[Named] = Field(min_length=2, max_length=100)
    pct: Fraction | None = None
    k: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _one_amount(self) -> OverlapsQuery:
        if (self.pct is None) == (self.k is None):
            raise ValueError("say how much each task selects: either pct, a fraction (0.05 is 5 %), or k rows")
        return self

    @model_validator(mode="after")
    def _apart(self) -> OverlapsQuery:
        if len(set(self.task)) < len(self.task):
            raise ValueError("task names something twice: two or more different ones are compared")
        if self.combine is not None:
            raise ValueError("combine joins tasks, which are compared here: leave it out")
        return self


@router.get("/scores/distribution", response_model=ScoreDistribution, responses=STARTED)
def get_score_distribution(parameters: Annotated[DistributionQuery, Parameters()], backend: BackendDep) -> Response:
    """The histogram of a pool's scores by origin, and what every cut through it takes."""
    recipe, sources = backend.recipes.resolve(parameters.query(), path="/scores/distribution")
    scores = ready_scores(backend, recipe, sources, parameters.wait)
    if isinstance(scores, Response):
        return scores
    origins = backend.answers.origins(recipe)
    found = distributions.distribution(recipe, scores, origins, bins=parameters.bins, steps=parameters.steps)
    return JSONResponse(found.model_dump(mode="json"))


@router.get("/overlaps", response_model=Overlaps, responses=STARTED)
def get_overlaps(parameters: Annotated[OverlapsQuery, Parameters()], backend: BackendDep) -> Response:
    """What the selections of several tasks share, and how far the tasks agree on the whole pool, for each pair."""
    recipe, sources = backend.recipes.resolve(parameters.query(), path="/overlaps")
    scores = ready_scores(backend, recipe, sources, parameters.wait)
    if isinstance(scores, Response):
        return scores
    found = distributions.overlaps(recipe, scores, pct=parameters.pct, k=parameters.k)
    return JSONResponse(found.model_dump(mode="json"))
