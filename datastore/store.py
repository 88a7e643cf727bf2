"""The store, opened: all its parts over one folder or bucket and one catalog. Service, worker and tests add theirs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gradstore.types import SelectionMethod

from datastore import inventory
from datastore.ability_scoring import AbilityScoring
from datastore.adapter_choices import AdapterChoices
from datastore.adapters import Adapters
from datastore.annotations import Annotations
from datastore.answers import Answers
from datastore.array_files import ArrayFiles
from datastore.attributions import Attributions
from datastore.bucket import Bucket
from datastore.bucket_features import BucketFeatureStore
from datastore.cascades import Cascades
from datastore.catalog import Catalog
from datastore.checkpoints import Checkpoints
from datastore.chunk_files import ChunkCache
from datastore.comparisons import Comparisons
from datastore.conversions import Conversions
from datastore.costs import Costs
from datastore.datasets import Datasets
from datastore.depot import LOCAL, BucketDepot, Cache, Depot
from datastore.embeddings import Embeddings
from datastore.estimate_plans import EstimatePlans
from datastore.estimate_scores import EstimateScores
from datastore.estimate_validations import EstimateValidations
from datastore.estimate_worlds import EstimateWorlds
from datastore.estimates import Estimates
from datastore.evaluations import Evaluations
from datastore.explanations import Explaining
from datastore.features import Features
from datastore.finetunes import Finetunes
from datastore.generations import Generations
from datastore.gradients import FeatureStore
from datastore.imports import Imports
from datastore.index import Indexes
from datastore.learned_scores import LearnedScores
from datastore.leases import Jobs
from datastore.matrices import Matrices
from datastore.own_scores import OwnScores
from datastore.owners import Owners
from datastore.predictors import Predictors
from datastore.projector_files import ProjectorFiles
from datastore.projectors import Projectors
from datastore.provenance import Cards
from datastore.questions import Questions
from datastore.recipes import Recipes
from datastore.scores import ScoreCache
from datastore.scoring import Scoring
from datastore.selection.contamination import NgramIndex
from datastore.selection_files import SelectionFiles
from datastore.settings import Settings
from datastore.stream_sets import StreamSets
from datastore.streams import Streams
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
    adapters: Adapters
    adapter_choices: AdapterChoices
    evaluations: Evaluations
    generations: Generations
    imports: Imports
    recipes: Recipes
    scoring: Scoring
    answers: Answers
    cards: Cards
    trainings: Trainings
    validations: Validations
    comparisons: Comparisons
    attributions: Attributions
    predictors: Predictors
    cascades: Cascades
    estimates: Estimates
    estimate_validations: EstimateValidations
    explaining: Explaining
    annotations: Annotations
    streams: Streams
    projectors: Projectors
    embeddings: Embeddings
    bucket: Bucket | None
    """Where everything is for good, unless that is the data folder."""
    depots: Sequence[BucketDepot]
    """Of all kinds of things in a bucket; none for a store in a folder."""

    def depot(self, place: Path) -> Depot:
        """Where the thing of a place is kept for good: in the bucket, or in its place."""
        return next((depot for depot in self.depots if depot.holds(place)), LOCAL)


class _Depots:
    """What the settings make of the rooms' folders: the store itself, or a cache of a bucket."""

    def __init__(self, settings: Settings) -> None:
        self.bucket = Bucket(settings.store) if settings.store else None
        self.opened: list[BucketDepot] = []
        self._settings = settings
        self._cache = Cache(bytes=settings.cache_bytes // 2)

    def of(self, folder: Path) -> Depot:
        """The depot of the things in a part of the store."""
        kinds = inventory.of_part(folder.name)
        if self.bucket is None:
            return LOCAL
        for kind in kinds:
            self._cache.watch(folder, kind.in_part)
        self.opened.append(BucketDepot(self.bucket, folder, cache=self._cache))
        return self.opened[-1]

    def features(self) -> FeatureStore:
        """The feature store."""
        if self.bucket is None:
            return FeatureStore(self._settings.features)
        cache = ChunkCache(self.bucket, self._settings.features_cache, bytes=self._settings.cache_bytes // 2)
        return BucketFeatureStore(self._settings.features, bucket=self.bucket, cache=cache)


def open_store(settings: Settings, catalog: Catalog) -> OpenStore:
    """Open the store that the settings name, over a catalog that is migrated before it is first asked."""
    jobs = Jobs(catalog, lease=settings.lease, max_attempts=settings.max_attempts)
    depots = _Depots(settings)
    store = depots.features()
    checkpoints = Checkpoints(settings.checkpoints, depot=depots.of(settings.checkpoints))
    datasets = Datasets(settings.datasets, depot=depots.of(settings.datasets))
    tasks = Tasks(settings.tasks, depot=depots.of(settings.tasks))
    cache = ScoreCache(settings.scores, depot=depots.of(settings.scores))
    indexes = Indexes(settings.indexes, depots.of(settings.indexes))
    features = Features(catalog, jobs, store, checkpoints, cache, indexes, settings)
    jobs.results["gradients"] = features.result
    conversions = Conversions(catalog, jobs, features)
    jobs.results["conversion"] = conversions.result
    imports = Imports(catalog, jobs, settings, depots.of(settings.imports))
    jobs.results["import"] = imports.result
    finetunes = Finetunes(catalog, jobs, checkpoints, settings)
    owners = Owners(catalog, datasets, tasks)
    matrices = Matrices(settings.matrices, depot=depots.of(settings.matrices))
    annotations = Annotations(catalog, jobs, owners, matrices, settings)
    jobs.results["annotation"] = annotations.result
    arrays = ArrayFiles(settings.estimates, pattern="*_*", depot=depots.of(settings.estimates))
    scores = ArrayFiles(settings.adapter_scores, pattern="ad_*", depot=depots.of(settings.adapter_scores))
    worlds = EstimateWorlds(datasets, tasks, features, checkpoints, annotations, arrays)
    plans = EstimatePlans(catalog, jobs, datasets, features, annotations, worlds)
    estimates = Estimates(catalog, jobs, plans, worlds, checkpoints, arrays)
    streams = Streams(catalog, jobs, owners, features, matrices, settings)
    jobs.results["stream"] = streams.result
    sets = StreamSets(jobs, streams, features)
    trained = ProjectorFiles(settings.projectors, depot=depots.of(settings.projectors))
    projectors = Projectors(jobs, sets, annotations, trained)
    embeddings = Embeddings(catalog, jobs, sets, projectors, matrices)
    methods: dict[SelectionMethod, OwnScores] = {
        "bm25": TextScoring(catalog, datasets, tasks, cache),
        "predicted": LearnedScores(catalog, jobs, datasets, tasks, cache, kind="predictor"),
        "cascade": LearnedScores(catalog, jobs, datasets, tasks, cache, kind="cascade"),
        "gradex": EstimateScores(estimates),
        "cods": AbilityScoring(catalog, tasks, projectors, embeddings, cache),
    }
    recipes = Recipes(catalog, features, methods)
    scoring = Scoring(catalog, jobs, features, tasks, cache, methods)
    jobs.results["scoring"] = scoring.result
    ngrams = NgramIndex(tasks, settings.ngrams)
    files = SelectionFiles(settings.selections, depots.of(settings.selections))
    trainings = Trainings(settings.trainings, depot=depots.of(settings.trainings))
    questions = Questions(settings.questions, depot=depots.of(settings.questions))
    predictors = Predictors(catalog, jobs, datasets, features, tasks, recipes, cache)
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
        adapters=Adapters(catalog, checkpoints, finetunes),
        adapter_choices=AdapterChoices(catalog, jobs, tasks, checkpoints, scores),
        evaluations=Evaluations(catalog, jobs, finetunes, settings),
        generations=Generations(catalog, jobs, finetunes),
        imports=imports,
        recipes=recipes,
        scoring=scoring,
        answers=answers,
        cards=Cards(catalog, jobs, recipes),
        trainings=trainings,
        validations=Validations(catalog, jobs, features, tasks, recipes, finetunes, trainings),
        comparisons=Comparisons(
            catalog, jobs, tasks, recipes, answers, finetunes, trainings, Costs(catalog, jobs, recipes, scoring)
        ),
        attributions=Attributions(catalog, jobs, datasets, recipes, features, questions, indexes),
        predictors=predictors,
        cascades=Cascades(catalog, jobs, datasets, features, tasks, predictors),
        estimates=estimates,
        estimate_validations=EstimateValidations(estimates, finetunes, trainings),
        explaining=Explaining(answers, features, recipes, tasks),
        annotations=annotations,
        streams=streams,
        projectors=projectors,
        embeddings=embeddings,
        bucket=depots.bucket,
        depots=depots.opened,
    )
