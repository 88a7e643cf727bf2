"""What handlers ask for, by type: the parts of the store that this process has opened."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Annotated, Self, cast

from fastapi import Depends, Path, Request
from gradstore.types import Request as RequestBody
from pydantic import ConfigDict, Field

from datastore.answers import Answers
from datastore.catalog import Catalog
from datastore.checkpoints import Checkpoints
from datastore.datasets import Datasets
from datastore.evaluations import Evaluations
from datastore.features import Features
from datastore.finetunes import Finetunes
from datastore.gradients import FeatureStore
from datastore.leases import Jobs
from datastore.recipes import Recipes
from datastore.scores import ScoreCache
from datastore.scoring import Scoring
from datastore.settings import Settings
from datastore.tasks import Tasks
from service.queue import Queue
from service.scoring import ScoringWorker


@dataclass(frozen=True)
class Backend:
    """Everything behind the API."""

    settings: Settings
    catalog: Catalog
    queue: Queue
    jobs: Jobs
    datasets: Datasets
    tasks: Tasks
    checkpoints: Checkpoints
    features: Features
    finetunes: Finetunes
    evaluations: Evaluations
    recipes: Recipes
    scoring: Scoring
    answers: Answers
    scorer: ScoringWorker
    stopping: threading.Event = field(default_factory=threading.Event)
    """Set when the server is asked to stop: streams that would never end, end."""

    @classmethod
    def of(cls, settings: Settings, catalog: Catalog, queue: Queue) -> Self:
        """Put the parts together."""
        jobs = Jobs(catalog, lease=settings.lease, max_attempts=settings.max_attempts)
        store, tasks = FeatureStore(settings.features), Tasks(settings.tasks)
        features = Features(catalog, jobs, store, settings)
        jobs.results["gradients"] = features.result
        datasets, checkpoints = Datasets(settings.datasets), Checkpoints(settings.checkpoints)
        finetunes = Finetunes(catalog, jobs, checkpoints, settings)
        scoring = Scoring(catalog, jobs, features, store, tasks, ScoreCache(settings.scores))
        return cls(
            settings=settings,
            catalog=catalog,
            queue=queue,
            jobs=jobs,
            datasets=datasets,
            tasks=tasks,
            checkpoints=checkpoints,
            features=features,
            finetunes=finetunes,
            evaluations=Evaluations(catalog, jobs, finetunes, settings),
            recipes=Recipes(catalog, features),
            scoring=scoring,
            answers=Answers(catalog, datasets, scoring, settings.selections),
            scorer=ScoringWorker(jobs, scoring, poll_interval=settings.poll_interval),
        )


def backend_of(request: Request) -> Backend:
    """The backend of the app that got the request."""
    return cast("Backend", request.app.state.backend)


class Paging(RequestBody):
    """Which part of a list is asked for."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    limit: int = Field(20, ge=1, le=1000)
    """How many at most."""
    after: str | None = Field(None, max_length=255)
    """Id of the last item of the page before."""


BackendDep = Annotated[Backend, Depends(backend_of)]
Reference = Annotated[
    str, Path(description="An id or a name.", min_length=1, max_length=255, pattern=r"^[^\x00-\x1f]+$")
]
