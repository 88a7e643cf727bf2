"""GET /select and GET /scores: resolve the question, wait for scores, answer in the form that was asked for."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated, Any, get_args

import numpy as np
from fastapi import Query as Parameters
from fastapi import Request, Response
from gradstore.types import (
    FINISHED,
    AbilityStrategy,
    Aggregate,
    AnyJob,
    CapabilityName,
    Combine,
    DedupeBy,
    FeatureChoice,
    Fraction,
    Named,
    OwnId,
    RowCount,
    Scores,
    ScoringJob,
    Selection,
    SelectionCreate,
    SelectionMethod,
    SelectionRecipe,
    Share,
    ShotNearness,
    StoredProjection,
    Strategy,
)
from gradstore.types import Request as RequestBody
from numpy.typing import NDArray
from pydantic import Field, model_validator

from datastore.answers import vector
from datastore.errors import Conflict
from datastore.influence import TaskScores
from datastore.parameters import Query
from datastore.recipes import Sources
from service.dependencies import Backend, BackendDep
from service.files import NPY, PARQUET, SAFETENSORS, Format, npy, parquet, safetensors, wanted_format, wanted_type
from service.routes.selections import CSV, NDJSON, as_csv, as_ndjson
from service.routing import Router

LOOK_INTERVAL = 0.02  # seconds between two looks at a scoring job

router = Router(tag="selections")


_OF_THE_ANSWER = {"limit", "after", "wait", "format", "bins", "steps"}
"""Parameters that say what is shown and when, and nothing of the question."""


class ScoresAsked(FeatureChoice, RequestBody):
    """Whose scores are asked for; what is left out must be the only one there is."""

    task: list[Named] = Field([], max_length=100)
    dataset: list[Named] = Field([], max_length=100)
    run: Named | None = None
    checkpoint: list[Named] = Field([], max_length=1000)
    projection: StoredProjection | None = None
    projection_id: str | None = Field(None, min_length=1, max_length=200)
    """What imported features' projection is called."""
    method: SelectionMethod | None = None
    """What a row's score is: its `influence` on a task (the default), the cosine of hidden states (`rds`, RDS+) or of
    sentence embeddings (`embedding`), its words' match (`bm25`), a number drawn for it (`random`), its influence as a
    predictor predicts it (`predicted`), or as a cascade has computed it for the rows predicted best (`cascade`),
    what its group is estimated to give (`gradex`), or its place in an ability space (`cods`)."""
    by: Named | None = None
    """Whose scores are meant, of a method that has them from something that was learned."""
    budget: Fraction | None = None
    """`method=cascade`: the part of the pool whose gradients the cascade meant has computed."""
    aggregate: Aggregate | None = None
    """`less`, influence's default: mean within a subtask, then the largest; `avg`, `max` (the others' default), `min`:
    over all validation rows."""
    combine: Combine | None = None
    """How several tasks choose: by the largest (influence's default) or the mean score, in turns (the other methods'
    default), or the least served first."""
    strategy: Strategy | None = None
    """How rows are chosen by their scores: the best (`top`, the default), those farthest from each other (`k-center`),
    the best of each cluster (`clusters`), or those like the task's validation rows, its shots, and unlike each other
    (`shots`, as ROCKET chooses). With `method=cods` how they are scored, too: by the `nearest` of the task's rows (the
    default), which then take rows in turns, by their mean (`prototype`), or by `capabilities` (`capability`)."""
    neighbours: int | None = Field(None, ge=1, le=1000)
    """`method=cods`: how many of the nearest references give a row's score; by default 5."""
    beta: float | None = Field(None, ge=0, le=100)
    """`method=cods`: weight of the likeness of capabilities beside that of places; by default 0."""
    capabilities: list[CapabilityName] = Field([], max_length=1000)
    """`strategy=capability`: those that are asked for."""
    nearness: ShotNearness | None = None
    """`strategy=shots`: a row's largest cosine with a shot (`max_cosine`, the default), that with the shots' mean
    (`centroid`), the log-density of Gaussians around the shots (`kde`; rows are drawn in proportion to it), or minus
    the distance to their convex hull (`hull`; rows that lie in it are drawn first)."""
    bandwidth: float | None = Field(None, ge=0.01, le=1000)
    """`nearness=kde`: γ of the Gaussians; by default 10."""
    selection_seed: int | None = Field(None, ge=0, lt=1 << 32)
    """Seed of what is drawn."""
    wait: float | None = Field(None, ge=0, le=30)
    """Seconds to wait for scores before the answer is 202."""

    @model_validator(mode="after")
    def _one_training(self) -> ScoresAsked:
        if self.run is not None and self.checkpoint:
            raise ValueError("name either a run or checkpoints")
        return self

    @model_validator(mode="after")
    def _choose_nothing(self) -> ScoresAsked:
        if self.strategy is not None and self.strategy not in {"shots", *get_args(AbilityStrategy)}:
            raise ValueError(f"strategy={self.strategy} chooses rows, and scores none: ask /select, or leave it out")
        return self

    def query(self) -> Query:
        """The question, in the datastore's words."""
        several = {"task": "tasks", "dataset": "datasets", "checkpoint": "checkpoints"}
        asked = {name: getattr(self, name) for name in type(self).model_fields if name not in _OF_THE_ANSWER}
        return Query(**{several.get(name, name): value for name, value in asked.items()})


class ScoresQuery(ScoresAsked):
    """Whose scores are asked for, and which part of the answer."""

    limit: int = Field(20, ge=0, le=10_000)
    after: int = Field(0, ge=0)
    """Rank, or row of the pool, after which the page begins."""


class SelectQuery(ScoresQuery):
    """What to select."""

    pct: Fraction | None = None
    k: RowCount | None = None
    exclude: list[Named] = Field([], max_length=100)
    """Datasets and selections whose examples are left out."""
    exclude_ids: list[OwnId] = Field([], max_length=100_000)
    """Examples to leave out, by their own ids."""
    among: RowCount | None = None
    """Of how many of the best rows `k-center` and `clusters` choose; by default four times as many as are chosen."""
    clusters: int | None = Field(None, ge=1, le=100_000)
    """Into how many clusters these are parted; by default the square root of the number of rows chosen."""
    tau: float | None = Field(None, gt=0, le=1)
    """`strategy=shots`: of the nearest rows those are passed over whose cosine with one taken before exceeds this, by
    default 0.9; nothing is put in their place."""
    quota: list[Share] = Field([], max_length=1000)
    """Shares of the chosen rows by origin: `equal`, `proportional`, or `origin:fraction` for any of them."""
    dedupe: float | None = Field(None, gt=0, le=1)
    """Pass over rows that are more alike than this to one chosen before."""
    dedupe_by: DedupeBy | None = None
    """Compare rows by the cosine of their features, or by the 5-word runs of their texts (Jaccard)."""
    match: Named | None = None
    """Draw rows of the same lengths as this selection's."""
    ngram: int | None = Field(None, ge=5, le=100)
    """Words of a run that a row and a task's row must share to overlap; by default 13."""
    decontaminate: list[Named] = Field([], max_length=100)
    """Tasks, beside those selected for, whose validation and test rows the chosen rows are compared with."""
    exclude_contaminated: bool | None = None
    """Leave out rows that overlap with a task's."""

    @model_validator(mode="after")
    def _choose_nothing(self) -> SelectQuery:
        return self  # whoever selects chooses

    @model_validator(mode="after")
    def _one_amount(self) -> SelectQuery:
        if self.match is None and (self.pct is None) == (self.k is None):
            raise ValueError("say how much to select: either pct, a fraction (0.05 is 5 %), or k, a number of rows")
        return self


class ScoresPageQuery(ScoresQuery):
    """What scores to show, and how."""

    format: Format | None = None
    """By default what `Accept` asks for, else JSON."""


STARTED: dict[int | str, dict[str, Any]] = {
    202: {"model": ScoringJob, "description": "The scores are being computed: ask again when the job is done."}
}


@router.get("/select", response_model=Selection, responses={**STARTED, 200: {"content": {NDJSON: {}, CSV: {}}}})
def select(request: Request, parameters: Annotated[SelectQuery, Parameters()], backend: BackendDep) -> Response:
    """The examples of the pool that help the task most, best first."""
    recipe, sources = backend.recipes.resolve(parameters.query(), path=request.url.path)
    page = {"limit": parameters.limit, "after": parameters.after}
    found = _selection(backend, recipe, sources, parameters.wait, **page)
    if isinstance(found, Response):
        return found
    form = wanted_type(request, [NDJSON, CSV])
    if form == NDJSON:
        return as_ndjson(backend, found)
    if form == CSV:
        return as_csv(backend, found)
    return _located(found)


@router.post("/selections", response_model=Selection, responses=STARTED)
def create_selection(body: SelectionCreate, backend: BackendDep) -> Response:
    """Choose by a recipe: the same recipe gives the same selection, also after it was deleted."""
    recipe = SelectionRecipe.model_validate(body.recipe.model_dump())
    found = _selection(backend, recipe, backend.recipes.sent(recipe), None, limit=20, after=0)
    if isinstance(found, Response):
        return found
    return _located(found)


@router.get(
    "/scores", response_model=Scores, responses={**STARTED, 200: {"content": {NPY: {}, PARQUET: {}, SAFETENSORS: {}}}}
)
def scores(request: Request, parameters: Annotated[ScoresPageQuery, Parameters()], backend: BackendDep) -> Response:
    """The score of every row of the pool, in the order of the pool."""
    recipe, sources = backend.recipes.resolve(parameters.query(), path=request.url.path)
    found = ready_scores(backend, recipe, sources, parameters.wait)
    if isinstance(found, Response):
        return found
    match wanted_format(request, parameters.format):
        case "npy":
            return npy(_vector(found, recipe), "scores")
        case "safetensors":
            return safetensors({"score": _vector(found, recipe)}, "scores", metadata=recipe.model_dump_json())
        case "parquet":
            return parquet(backend.answers.score_table(recipe, sources, found), "scores")
    start, stop = parameters.after, parameters.after + parameters.limit
    rows = len(found[0].score)
    data = backend.answers.scored(recipe, sources, found, start=start, stop=stop)
    page = Scores(recipe=recipe, rows=rows, data=data, has_more=start + len(data) < rows)
    return Response(page.model_dump_json(), media_type="application/json")


def _located(found: Selection) -> Response:
    """A selection as JSON, which is found again under its id."""
    headers = {"Content-Location": f"/selections/{found.id}"}
    return Response(found.model_dump_json(), media_type="application/json", headers=headers)


def _selection(
    backend: Backend, recipe: SelectionRecipe, sources: Sources, wait: float | None, *, limit: int, after: int
) -> Selection | Response:
    """The selection that a recipe gives, or the answer that its scores are not ready."""
    found = backend.answers.find(recipe, limit=limit, after=after)
    if found is not None:
        return found
    scores = ready_scores(backend, recipe, sources, wait)
    if isinstance(scores, Response):
        return scores
    return backend.answers.select(recipe, sources, scores, limit=limit, after=after)


def ready_scores(
    backend: Backend, recipe: SelectionRecipe, sources: Sources, wait: float | None
) -> Sequence[TaskScores] | Response:
    """The scores, or the answer that they are not ready. Raises `Conflict` where they cannot be computed."""
    known = backend.scoring.known(recipe, sources)
    if known is not None:
        return known
    job = backend.scoring.start(recipe, sources)
    backend.scorer.ring()
    backend.queue.ring(job.id, "scoring")
    deadline = time.monotonic() + (backend.settings.select_wait if wait is None else wait)
    while job.status not in FINISHED and time.monotonic() < deadline and not backend.stopping.is_set():
        time.sleep(LOOK_INTERVAL)
        job = backend.jobs.get(job.id)
    known = backend.scoring.known(recipe, sources)
    if known is None and job.status == "cancelled":
        raise Conflict(f"{job.id}, which computes these scores, was cancelled: POST /jobs/{job.id}/retry lets it go on")
    if known is None and job.error is not None:
        raise Conflict(f"{job.id} has failed: {job.error.detail}; ask again to let it try once more")
    return _not_ready(job) if known is None else known


def _not_ready(job: AnyJob) -> Response:
    headers = {"Location": f"/jobs/{job.id}", "Retry-After": "1"}
    return Response(job.model_dump_json(), status_code=202, headers=headers, media_type="application/json")


def _vector(found: Sequence[TaskScores], recipe: SelectionRecipe) -> NDArray[np.float32]:
    """One float32 a row, NaN where a row has no feature."""
    combined = vector(found, recipe)
    return np.where(combined.valid, combined.score, np.float32(np.nan))
