"""What a worker has opened: the parts of the store, the models in memory, and whether it has been asked to leave."""

from __future__ import annotations

import os
import socket
import threading
from dataclasses import dataclass, field
from secrets import token_hex
from typing import Self

import torch

from datastore.answers import Answers
from datastore.catalog import Catalog
from datastore.checkpoints import Checkpoints
from datastore.datasets import Datasets
from datastore.features import Features
from datastore.gradients import FeatureStore
from datastore.leases import Jobs
from datastore.scores import ScoreCache
from datastore.scoring import Scoring
from datastore.settings import Settings
from datastore.tasks import Tasks
from worker.budgets import Budgets
from worker.loaded import Loaded


def worker_name() -> str:
    """A name that tells host and process, and that no other worker has or had."""
    return f"{socket.gethostname()}-{os.getpid()}-{token_hex(3)}"


@dataclass(frozen=True)
class Context:
    """Everything a shard may need."""

    settings: Settings
    catalog: Catalog
    jobs: Jobs
    datasets: Datasets
    tasks: Tasks
    checkpoints: Checkpoints
    store: FeatureStore
    answers: Answers
    loaded: Loaded
    budgets: Budgets = field(default_factory=Budgets)
    owner: str = field(default_factory=worker_name)
    leaving: threading.Event = field(default_factory=threading.Event)
    """Set when the worker is asked to stop: the shard at hand is given back."""

    @classmethod
    def open(cls, settings: Settings, device: torch.device) -> Self:
        """Open the store and the catalog, whose schema is brought up to date."""
        catalog = Catalog(settings.catalog_url)
        catalog.migrate()
        jobs = Jobs(catalog, lease=settings.lease, max_attempts=settings.max_attempts)
        store = FeatureStore(settings.features)
        features = Features(catalog, jobs, store, settings)
        jobs.results["gradients"] = features.result
        datasets, tasks = Datasets(settings.datasets), Tasks(settings.tasks)
        scoring = Scoring(catalog, jobs, features, store, tasks, ScoreCache(settings.scores))
        return cls(
            settings=settings,
            catalog=catalog,
            jobs=jobs,
            datasets=datasets,
            tasks=tasks,
            checkpoints=Checkpoints(settings.checkpoints),
            store=store,
            answers=Answers(catalog, datasets, scoring, settings.selections),
            loaded=Loaded(device),
        )

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return self.loaded.device
