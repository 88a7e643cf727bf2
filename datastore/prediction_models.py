"""What predicts influence: scikit-learn's models with their settings chosen by cross-validation, deterministic by seed.

`ridge` is ridge regression (of levels logistic regression), `kernel` ridge regression with a radial kernel (of scores
only), `boosting` gradient boosting of histograms, `mlp` a network of one hidden layer. Inputs are standardised by the
sample's mean and spread. Nothing that is fitted is kept: fitted again to the same numbers it is the same.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from gradstore.types import PredictorModel
from numpy.typing import NDArray

from datastore.correlation import Numbers
from datastore.influence import Floats
from datastore.prediction_reports import Classes, r2

Settings = Mapping[str, float | int]

GRIDS: dict[PredictorModel, list[dict[str, float | int]]] = {
    "ridge": [{"alpha": alpha} for alpha in (1.0, 10.0, 100.0, 1e3, 1e4)],
    "kernel": [{"alpha": alpha, "width": width} for alpha in (0.01, 0.1, 1.0) for width in (0.3, 1.0, 3.0)],
    "boosting": [{"leaves": leaves} for leaves in (4, 15)],
    "mlp": [{"alpha": alpha} for alpha in (0.1, 10.0)],
}
"""Settings that cross-validation chooses from."""
ROUNDS = 150
"""Trees of gradient boosting."""
HIDDEN = 64
"""Units of the network's hidden layer."""


@contextmanager
def one_thread() -> Iterator[None]:
    """Fit on one thread: no sum depends on how many cores there are, and no tree waits for cores that are busy."""
    from threadpoolctl import threadpool_limits  # noqa: PLC0415 - comes with scikit-learn

    with threadpool_limits(1):
        yield


@dataclass(frozen=True)
class Choice:
    """A model with its settings, and how well it predicted the folds that it had not seen."""

    model: PredictorModel
    settings: Settings
    score: float
    """R² over all folds together; of levels the accuracy."""
    out_of_fold: Numbers = field(repr=False)
    """Prediction of each row of the sample by a model without its fold (m,); of levels the expected level."""
    out_of_fold_levels: Classes | None = field(repr=False, default=None)


def fold_numbers(rows: int, folds: int, *, seed: int) -> NDArray[np.int64]:
    """Which fold each row is in (rows,): folds of as equal a size as there can be, drawn with the seed."""
    found = np.arange(rows) % folds
    np.random.default_rng([seed, folds]).shuffle(found)
    return found


def choose(
    features: Floats,
    target: Numbers | Classes,
    *,
    models: Iterable[PredictorModel],
    folds: int,
    seed: int,
    levels: int,
    on_fit: Callable[[int], None] = lambda _: None,
) -> list[Choice]:
    """Every model with the settings that predict best out of fold; the best model first, of equal ones the first named.

    `features` (m, d), `target` (m,) scores, or levels where `levels` is not 0. `on_fit` hears how many fits
    are done.
    """
    place = fold_numbers(len(features), folds, seed=seed)
    found, done = [], 0
    for model in models:
        tried = []
        for settings in GRIDS[model]:
            tried.append(_tried(features, target, place, model, settings, seed, levels))
            done += folds
            on_fit(done)
        found.append(max(tried, key=lambda choice: choice.score))
    return sorted(found, key=lambda choice: -choice.score)


def _tried(
    features: Floats, target: Numbers | Classes, place: NDArray[np.int64], model: PredictorModel, settings: Settings,
    seed: int, levels: int,
) -> Choice:  # fmt: skip
    guess, level = np.zeros(len(target)), np.zeros(len(target), np.int64)
    for fold in range(int(place.max()) + 1):
        held = place == fold
        fitted = fit(features[~held], target[~held], model=model, settings=settings, seed=seed, levels=levels)
        guess[held], level[held] = fitted.predict(features[held])
    if levels:
        return Choice(model, settings, float((level == target).mean()), guess, level)
    return Choice(model, settings, r2(np.asarray(target, np.float64), guess), guess)


@dataclass(frozen=True)
class Fitted:
    """A fitted model."""

    estimator: Any
    mean: Numbers
    spread: Numbers
    offset: float
    scale: float
    """Scores are fitted as (score − offset) / scale."""
    levels: int

    def predict(self, features: Floats) -> tuple[Numbers, Classes]:
        """The score of each row, or of levels their expectation; and the level (0 where there are none)."""
        rows = ((features - self.mean) / self.spread).astype(np.float32)
        if self.levels:
            shares = np.zeros((len(rows), self.levels))
            shares[:, self.estimator.classes_.astype(int)] = self.estimator.predict_proba(rows)
            return shares @ np.arange(self.levels), shares.argmax(axis=1)
        return self.estimator.predict(rows) * self.scale + self.offset, np.zeros(len(rows), np.int64)

    def doubt(self, features: Floats) -> Numbers | None:
        """The standard deviation of each row's score as a Gaussian process has it, whose mean a radial kernel's
        prediction is (Rasmussen and Williams 2006, eq. 2.26): σ² = 1 − kᵀ(K + αI)⁻¹k, in units of the scores' own
        variance. None of other models.
        """
        from sklearn.kernel_ridge import KernelRidge  # noqa: PLC0415
        from sklearn.metrics.pairwise import rbf_kernel  # noqa: PLC0415

        if not isinstance(self.estimator, KernelRidge):
            return None
        known, gamma = self.estimator.X_fit_, self.estimator.gamma
        rows = ((features - self.mean) / self.spread).astype(np.float32)
        among = rbf_kernel(known, gamma=gamma).astype(np.float64) + self.estimator.alpha * np.eye(len(known))
        across = rbf_kernel(known, rows, gamma=gamma).astype(np.float64)
        told = (across * np.linalg.solve(among, across)).sum(axis=0)
        spread: Numbers = np.sqrt(np.maximum(1 - told, 1e-12)) * self.scale
        return spread


def fit(
    features: Floats, target: Numbers | Classes, *, model: PredictorModel, settings: Settings, seed: int, levels: int
) -> Fitted:
    """Fit a model to all rows."""
    mean = features.mean(axis=0, dtype=np.float64)
    spread = features.std(axis=0, dtype=np.float64)
    spread[spread < 1e-12 * np.maximum(np.abs(mean), 1)] = 1  # a column that never differs says nothing
    rows = ((features - mean) / spread).astype(np.float32)
    offset, scale = (0.0, 1.0) if levels else (float(np.mean(target)), float(np.std(target)) or 1.0)
    wanted = np.asarray(target) if levels else (np.asarray(target, np.float64) - offset) / scale
    if levels:
        estimator = _sure(wanted) or _classifier(model, settings, seed=seed)
    else:
        estimator = _regressor(model, settings, columns=rows.shape[1], seed=seed)
    with warnings.catch_warnings():
        from sklearn.exceptions import ConvergenceWarning  # noqa: PLC0415 - a second, and workers alone fit

        warnings.simplefilter("ignore", ConvergenceWarning)  # the network's last step is as good as its best
        estimator.fit(rows, wanted)
    return Fitted(estimator, mean, spread, offset, scale, levels)


def _sure(target: NDArray[Any]) -> Any | None:
    """What always says the same, where all rows of a sample are of one level."""
    from sklearn.dummy import DummyClassifier  # noqa: PLC0415

    return DummyClassifier() if len(np.unique(target)) == 1 else None


def _regressor(model: PredictorModel, settings: Settings, *, columns: int, seed: int) -> Any:
    match model:
        case "ridge":
            from sklearn.linear_model import Ridge  # noqa: PLC0415

            return Ridge(alpha=settings["alpha"], solver="cholesky")
        case "kernel":
            from sklearn.kernel_ridge import KernelRidge  # noqa: PLC0415

            gamma = 1 / (settings["width"] ** 2 * columns * 2)
            return KernelRidge(alpha=settings["alpha"], kernel="rbf", gamma=gamma)
        case "boosting":
            from sklearn.ensemble import HistGradientBoostingRegressor  # noqa: PLC0415

            return HistGradientBoostingRegressor(**_of_trees(settings, seed))
        case "mlp":
            from sklearn.neural_network import MLPRegressor  # noqa: PLC0415

            return MLPRegressor(**_of_networks(settings, seed))


def _classifier(model: PredictorModel, settings: Settings, *, seed: int) -> Any:
    match model:
        case "ridge":
            from sklearn.linear_model import LogisticRegression  # noqa: PLC0415

            return LogisticRegression(C=1 / settings["alpha"], max_iter=200)
        case "kernel":
            raise ValueError("a radial kernel predicts scores, not levels")
        case "boosting":
            from sklearn.ensemble import HistGradientBoostingClassifier  # noqa: PLC0415

            return HistGradientBoostingClassifier(**_of_trees(settings, seed))
        case "mlp":
            from sklearn.neural_network import MLPClassifier  # noqa: PLC0415

            return MLPClassifier(**_of_networks(settings, seed))


def _of_trees(settings: Settings, seed: int) -> dict[str, Any]:
    return {
        "max_iter": ROUNDS, "learning_rate": 0.05, "max_leaf_nodes": int(settings["leaves"]), "early_stopping": False,
        "l2_regularization": 1.0, "min_samples_leaf": 10, "random_state": seed,
    }  # fmt: skip


def _of_networks(settings: Settings, seed: int) -> dict[str, Any]:
    return {
        "hidden_layer_sizes": (HIDDEN,), "alpha": settings["alpha"], "max_iter": 200, "random_state": seed,
        "learning_rate_init": 3e-3,
    }  # fmt: skip
