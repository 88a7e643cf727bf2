"""The parameters of /select and /scores: what a query can say, and what of it a method or a kind has a use for.

They name features (`ASKED`), or say how rows are scored and chosen by them. Some must be the same in the features of a
pool and of its task (`SHARED`), and some say nothing about a kind. What fits a query is a `Fit`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from gradstore.types import (
    AdamForm,
    Aggregate,
    Combine,
    DedupeBy,
    FeatureDtype,
    FeatureKind,
    FeatureSet,
    LogoddsForm,
    Precision,
    ProblemItem,
    Quantisation,
    Reduction,
    Run,
    SelectionMethod,
    ShotNearness,
    StoredProjection,
    Strategy,
    TemplateName,
)

from datastore.errors import InvalidInput
from datastore.features import UNPROJECTED

FOREIGN = "foreign"
"""The projection of imported features."""
OWN = ("kind", "adam")
"""Parameters of a pool's features that its task's may have otherwise."""
SHARED = (
    "logodds_form", "weights", "reduction", "dim", "dtype", "converted_from", "projection", "projection_id",
    "projection_version", "seed", "template", "max_length", "precision", "quantisation",
)  # fmt: skip
"""Parameters in which the features of pool and task must agree: like is compared with like."""
ASKED = tuple(name for name in (*OWN, *SHARED) if name != "projection_version")
"""Parameters that a query can name."""
_NONE = ("quantisation", "converted_from")
"""Parameters whose absence can be asked for, as `none`."""
OF_GRADIENTS = ("adam", "logodds_form", "weights", "reduction", "dim", "projection", "projection_id", "seed")
"""Parameters that say nothing about hidden states; the dim of these is the model's."""
OWN_KINDS: tuple[Literal["rds", "embedding"], ...] = ("rds", "embedding")
"""Methods that compare the features of the kind of their name, which no other method takes."""
LEARNED: tuple[Literal["predicted", "cascade"], ...] = ("predicted", "cascade")
"""Methods whose scores something learned, for one task and with an aggregate of its own."""
WHEN_NAMED: frozenset[FeatureKind] = frozenset({*OWN_KINDS, "logodds", "output"})
"""Kinds of features that a query means only where it names the kind, by itself or by its method."""
OF_FEATURES = ("run", "checkpoints", *ASKED)
"""Parameters that name features: of no account where a method reads none."""
_UNUSED: dict[SelectionMethod, tuple[str, ...]] = {
    "influence": (),
    "rds": (),
    "embedding": (),
    "bm25": OF_FEATURES,
    "random": (*OF_FEATURES, "aggregate", "combine"),
    "predicted": (*OF_FEATURES, "combine"),
    "cascade": (*OF_FEATURES, "combine"),
    "gradex": (*OF_FEATURES, "aggregate"),
    "cods": (*OF_FEATURES, "aggregate"),
}
"""Parameters of a query that a method does nothing with."""
_OF_SOME: dict[str, tuple[SelectionMethod, ...]] = {
    "by": ("predicted", "cascade", "gradex", "cods"),
    "budget": ("cascade",),
    "neighbours": ("cods",),
    "beta": ("cods",),
    "capabilities": ("cods",),
}
"""Parameters that only these methods have."""
NEIGHBOURS = 5
"""References that give a row's score in an ability space."""
BANDWIDTH = 10.0
"""γ of the Gaussians around shots: the paper's best (ROCKET, arXiv 2408.15915)."""
TAU = 0.9
"""The cosine from which on rows like shots are too much like each other: it keeps some 90 % of them there."""
OF_NEARNESS: dict[ShotNearness, Aggregate | None] = {"max_cosine": "max", "centroid": "avg", "kde": None, "hull": None}
"""The aggregate that a nearness to shots is, where it is one."""


_AGGREGATES: dict[SelectionMethod, Aggregate | None] = {"influence": "less", "gradex": None}
"""How a method takes a task's rows together where nothing else is asked for; the others take the largest score."""


@dataclass(frozen=True)
class Query:
    """What a user says about the scores wanted; None and () leave it to what there is."""

    tasks: Sequence[str] = ()
    datasets: Sequence[str] = ()
    run: str | None = None
    checkpoints: Sequence[str] = ()
    weights: Sequence[str] | None = None
    kind: FeatureKind | None = None
    adam: AdamForm | None = None
    logodds_form: LogoddsForm | None = None
    reduction: Reduction | None = None
    dim: int | None = None
    dtype: FeatureDtype | None = None
    converted_from: FeatureDtype | Literal["none"] | None = None
    projection: StoredProjection | None = None
    projection_id: str | None = None
    seed: int | None = None
    template: TemplateName | None = None
    max_length: int | None = None
    precision: Precision | None = None
    quantisation: Quantisation | Literal["none"] | None = None
    method: SelectionMethod | None = None
    by: str | None = None
    budget: float | None = None
    aggregate: Aggregate | None = None
    combine: Combine | None = None
    neighbours: int | None = None
    beta: float | None = None
    capabilities: Sequence[str] = ()
    selection_seed: int | None = None
    pct: float | None = None
    k: int | None = None
    exclude: Sequence[str] = ()
    exclude_ids: Sequence[str] = ()
    strategy: Strategy | None = None
    among: int | None = None
    clusters: int | None = None
    nearness: ShotNearness | None = None
    bandwidth: float | None = None
    tau: float | None = None
    quota: Sequence[str] = ()
    dedupe: float | None = None
    dedupe_by: DedupeBy | None = None
    match: str | None = None
    ngram: int | None = None
    decontaminate: Sequence[str] = ()
    exclude_contaminated: bool | None = None


@dataclass(frozen=True)
class Fit:
    """A way to answer: pools, checkpoints and parameters for which every feature exists."""

    run: Run | None
    checkpoints: tuple[str, ...]
    parameters: dict[str, Any]
    pools: dict[str, list[FeatureSet]] = field(default_factory=dict)

    @property
    def is_foreign(self) -> bool:
        """Whether its features are imported."""
        return bool(self.parameters["projection"] == FOREIGN)


def with_method(query: Query) -> Query:
    """The query with its method, and how this takes rows and tasks together where nothing else is asked for.

    A kind that one method has to itself names the method. Raises `InvalidInput` where it names another.
    """
    by_kind = next((kind for kind in OWN_KINDS if kind == query.kind), None)
    method = query.method or by_kind or "influence"
    own = next((kind for kind in OWN_KINDS if kind == method), None)
    if own is not None and query.kind not in (None, own):
        detail = f"method={method} compares features of kind={own} only: leave kind out"
        raise InvalidInput(detail, errors=[ProblemItem(detail=detail, parameter="kind")])
    if by_kind and method == "influence":
        detail = f"features of kind={by_kind} are compared by method={by_kind}"
        raise InvalidInput(detail, errors=[ProblemItem(detail=detail, parameter="method")])
    if method in ("random", *LEARNED):
        return replace(query, method=method)
    if query.strategy == "shots":
        return _like_shots(replace(query, method=method, kind=own or query.kind))
    several = len(set(query.tasks)) > 1 and method != "influence"
    if method == "cods":
        return _in_an_ability_space(query, combine="round-robin" if several else "max")
    return replace(
        query,
        method=method,
        kind=own or query.kind,
        aggregate=query.aggregate or _AGGREGATES.get(method, "max"),
        combine=query.combine or ("round-robin" if several else "max"),
    )


def _like_shots(query: Query) -> Query:
    """The defaults of strategy=shots. Raises `InvalidInput` where the aggregate is named otherwise."""
    nearness = query.nearness or "max_cosine"
    if query.aggregate is not None:
        detail = "strategy=shots takes a task's rows together by their nearness: leave aggregate out, and say nearness"
        raise InvalidInput(detail, errors=[ProblemItem(detail=detail, parameter="aggregate")])
    return replace(
        query,
        nearness=nearness,
        aggregate=OF_NEARNESS[nearness],
        bandwidth=BANDWIDTH if query.bandwidth is None and nearness == "kde" else query.bandwidth,
        tau=TAU if query.tau is None else query.tau,
        combine=query.combine or "max",
    )


def _in_an_ability_space(query: Query, *, combine: Combine) -> Query:
    """The defaults of method=cods."""
    strategy = query.strategy or "nearest"
    return replace(
        query,
        method="cods",
        strategy=strategy,
        combine=query.combine or combine,
        neighbours=query.neighbours or (None if strategy in {"prototype", "capability"} else NEIGHBOURS),
        beta=0.0 if query.beta is None and strategy != "capability" else query.beta,
    )


def refuse_idle(query: Query) -> None:
    """Refuse what narrows nothing: what the method does without, and what no feature of the kind could ever have."""
    method = query.method or "influence"
    others = [name for name, methods in _OF_SOME.items() if method not in methods]
    unused = [name for name in (*_UNUSED[method], *others) if getattr(query, name) not in (None, (), [])]
    if unused:
        detail = f"method={method} does nothing with {' and '.join(unused)}: leave it out"
        parameters = {"checkpoints": "checkpoint"}
        raise InvalidInput(
            detail, errors=[ProblemItem(detail=detail, parameter=parameters.get(name, name)) for name in unused]
        )
    own: dict[str, tuple[str, ...]] = {
        **dict.fromkeys(UNPROJECTED, OF_GRADIENTS),
        "adam": ("logodds_form",),
        "sgd": ("adam", "logodds_form"),
        "sign": ("adam", "logodds_form"),
        "logodds": ("adam",),
        "output": ("adam", "logodds_form", "weights"),
    }
    idle = own.get(query.kind or "", ())
    named = [name for name in idle if getattr(query, name) is not None]
    if named:
        detail = f"features of kind={query.kind} have no {' and no '.join(named)}: leave it out"
        raise InvalidInput(detail, errors=[ProblemItem(detail=detail, parameter=name) for name in named])


def telling(parameters: dict[str, Any]) -> dict[str, Any]:
    """The parameters without those that say nothing about their kind."""
    hidden = parameters.get("kind") in UNPROJECTED
    return {name: value for name, value in parameters.items() if not (hidden and name in OF_GRADIENTS)}


def said(name: str, value: Any) -> Any:
    """A parameter as a query names it: features without quantisation, or conversion, can be asked for, too."""
    return "none" if name in _NONE and value is None else value
