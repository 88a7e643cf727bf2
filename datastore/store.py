"""The store, opened: all its parts over one folder and one catalog. Service, worker and tests add what is theirs."""

from __future__ import annotations

from dataclasses import dataclass

from datastore.answers import Answers
from datastore.attributions import Attributions
from datastore.catalog import Catalog
from datastore.checkpoints import Checkpoints
from datastore.chunk_files import Bucket
from datastore.conversions import Conversions
from datastore.datasets import Datasets
from datastore.evaluations import Evaluations
from datastore.explanations import Explaining
from datastore.features import Features
from datastore.finetunes import Finetunes
from datastore.gradients import FeatureStore
from datastore.imports import Imports
from datastore.index import Indexes
from datastore.leases import Jobs
from datastore.provenance import Cards
from datastore.questions import Questions
from datastore.recipes import Recipes
from datastore.scores import ScoreCache
from datastore.scoring import Scoring
from datastore.selection.contamination import NgramIndex
from datastore.selection_files import SelectionFiles
from datastore.settings import Settings
from datastore.tasks import Tasks
from datastore.text_scoring import TextScoring
from datastore.trainings import Trainings
from datastore.validations import Validations


@dataclass(frozen=True)
class OpenStore:
    """Everything that the datastore has, tied together."""

    settings: Settings
    catalog: Catalog
    jobs: Jobs
    datasets: Datasets
    tasks: Tasks
    checkpoints: Checkpoints
    store: FeatureStore
    features: Features
    conversions: Conversions
    finetunes: Finetunes
    evaluations: Evaluations
    imports: Imports
    recipes: Recipes
    scoring: Scoring
    answers: Answers
    cards: Cards
    validations: Validations
    attributions: Attributions
    explaining: Explaining


def open_store(settings: Settings, catalog: Catalog) -> OpenStore:
    """Open the store that the settings name, over a catalog that is migrated before it is first asked."""
    jobs = Jobs(catalog, lease=settings.lease, max_attempts=settings.max_attempts)
    store, checkpoints = FeatureStore(settings.features, bucket=_bucket(settings)), Checkpoints(settings.checkpoints)
    datasets, tasks = Datasets(settings.datasets), Tasks(settings.tasks)
    features = Features(catalog, jobs, store, settings)
    jobs.results["gradients"] = features.result
    conversions = Conversions(catalog, jobs, features)
    jobs.results["conversion"] = conversions.result
    imports = Imports(catalog, jobs, settings)
    jobs.results["import"] = imports.result
    finetunes = Finetunes(catalog, jobs, checkpoints, settings)
    recipes = Recipes(catalog, features)
    cache = ScoreCache(settings.scores)
    texts = TextScoring(catalog, datasets, tasks, cache)
    scoring = Scoring(catalog, jobs, features, tasks, cache, texts)
    jobs.results["scoring"] = scoring.result
    ngrams, files = NgramIndex(tasks, settings.ngrams), SelectionFiles(settings.selections)
    answers = Answers(catalog, datasets, recipes, scoring, ngrams, files)
    return OpenStore(
        settings=settings,
        catalog=catalog,
        jobs=jobs,
        datasets=datasets,
        tasks=tasks,
        checkpoints=checkpoints,
        store=store,
        features=features,
        conversions=conversions,
        finetunes=finetunes,
        evaluations=Evaluations(catalog, jobs, finetunes, settings),
        imports=imports,
        recipes=recipes,
        scoring=scoring,
        answers=answers,
        cards=Cards(catalog, jobs, recipes),
        validations=Validations(catalog, jobs, features, tasks, recipes, finetunes, Trainings(settings.trainings)),
        attributions=Attributions(
            catalog, jobs, datasets, recipes, features, Questions(settings.questions), Indexes(settings.indexes)
        ),
        explaining=Explaining(answers, features, recipes, tasks),
    )


def _bucket(settings: Settings) -> Bucket | None:
    if not settings.features_url:
        return None
    return Bucket(settings.features_url, cache=settings.features_cache, cache_bytes=settings.features_cache_bytes)
