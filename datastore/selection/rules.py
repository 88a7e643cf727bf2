"""Which parameters of a choice go together: what would do nothing is refused, and told where it belongs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from fractions import Fraction
from typing import get_args

from gradstore.types import AbilityStrategy, DedupeBy, ProblemItem, Quota, SelectionMethod, SelectionRecipe, Strategy

from datastore.errors import InvalidInput
from datastore.parameters import OF_NEARNESS, Query
from datastore.selection.diversity import MAX_CENTERS_AMONG

WITHOUT_FEATURES: frozenset[SelectionMethod] = frozenset(get_args(SelectionMethod)) - {"influence", "rds", "embedding"}
"""Methods that compare no features of the store."""
PLACING: frozenset[SelectionMethod] = frozenset({"cods"})
"""Those of them that have places for rows, which are compared as features are."""
OF_THE_CHOICE = frozenset({
    "pct", "k", "exclude", "exclude_ids", "selection_seed", "strategy", "among", "clusters", "tau", "quota", "dedupe",
    "dedupe_by", "match", "ngram", "decontaminate", "exclude_contaminated",
})  # fmt: skip
"""What of a query or recipe changes which rows are chosen, and no score."""


_UNDRAWN = "belongs to method=random, strategy=clusters, and nearness=kde and hull: nothing else is drawn"


def check(query: Query | SelectionRecipe) -> None:
    """Raise `InvalidInput` where parameters of the choice contradict each other, or one would do nothing."""
    if query.match is not None:
        _with_match(query)
    strategy = query.strategy or "top"
    _check_abilities(query, strategy)
    if strategy not in {"k-center", "clusters"}:
        _refuse(query, ("among", "clusters"), "belongs to strategy=k-center or strategy=clusters")
        if strategy == "nearest":
            _refuse(query, ("quota",), "says where rows come from, and so does strategy=nearest: leave one out")
    else:
        _refuse(query, ("quota",), f"and strategy={strategy} both say where rows come from: leave one out")
    if strategy == "k-center":
        _with_k_center(query)
    if strategy == "shots":
        _with_shots(query)
    else:
        _refuse(query, ("nearness", "bandwidth", "tau"), "belongs to strategy=shots")
    if not is_drawn(query):
        _refuse(query, ("selection_seed",), _UNDRAWN)
    if query.dedupe is None:
        _refuse(query, ("dedupe_by",), "says how rows are compared, and dedupe from which likeness on: give it, too")
    if dedupe_by(query) == "features" and query.dedupe is not None and query.dedupe >= 1:
        raise refused("dedupe", "no cosine exceeds 1: give a dedupe below it, such as 0.95, or dedupe_by=text")
    if query.method in WITHOUT_FEATURES - PLACING and (parameter := needs_features(query)) is not None:
        raise refused(parameter, f"method={query.method} reads no features to compare rows by: leave {parameter} out")
    if not query.tasks and not query.decontaminate:
        _refuse(query, ("exclude_contaminated", "ngram"), "compares rows with a task's: name one (task, decontaminate)")


def needs_task(query: Query | SelectionRecipe) -> bool:
    """Whether a selection is for a task: one that is drawn, or by capabilities that are named, is for none."""
    return query.method != "random" and not (query.method == "cods" and query.strategy == "capability")


def needs_features(query: Query | SelectionRecipe) -> str | None:
    """The parameter for which rows are compared by their features, where there is one."""
    if query.strategy in ("k-center", "clusters", "shots"):
        return "strategy"
    return "dedupe_by" if dedupe_by(query) == "features" else None


def is_drawn(query: Query | SelectionRecipe) -> bool:
    """Whether a seed decides anything."""
    return query.method == "random" or query.strategy == "clusters" or query.nearness in ("kde", "hull")


def dedupe_by(query: Query | SelectionRecipe) -> DedupeBy | None:
    """How rows are compared: by default by features where the method reads any."""
    if query.dedupe is None:
        return None
    return query.dedupe_by or ("text" if query.method in WITHOUT_FEATURES - PLACING else "features")


def quota(said: Sequence[str], origins: Collection[str]) -> Quota:
    """The quota that is meant by `equal`, `proportional`, or any number of `origin:fraction`. Raises `InvalidInput`."""
    if said[0] in {"equal", "proportional"}:
        if len(said) > 1:
            raise refused("quota", f"{said[0]} is a quota for all origins: give it alone, or a fraction for each")
        return "equal" if said[0] == "equal" else "proportional"
    found: dict[str, float] = {}
    for text in said:
        origin, _, share = text.rpartition(":")
        try:
            fraction = float(share)
        except ValueError:
            fraction = -1
        if not 0 <= fraction <= 1 or not origin:
            raise refused("quota", f"{text!r} is none: say equal, proportional, or origin:fraction, as dolly:0.25")
        if origin in found:
            raise refused("quota", f"the origin {origin!r} has two quotas")
        found[origin] = fraction
    check_shares(found, origins)
    return dict(sorted(found.items()))


def check_shares(quota: Mapping[str, float], origins: Collection[str]) -> None:
    """Raise `InvalidInput` where shares of the chosen rows by origin are none, or of origins that no row has."""
    if not quota:
        raise refused("quota", "there is no share in it: name an origin, or leave it out")
    for origin, share in quota.items():
        if origin not in origins:
            raise refused("quota", f"no row has the origin {origin!r}; there are {', '.join(sorted(origins))}")
        if not 0 <= share <= 1:
            raise refused("quota", f"{share:g} of {origin!r} is no fraction: it lies between 0 and 1")
    if sum(Fraction(repr(share)) for share in quota.values()) > 1:
        raise refused("quota", "the quotas are fractions of the chosen rows, and add up to more than 1")


def refused(parameter: str, detail: str) -> InvalidInput:
    """The error that names a parameter."""
    return InvalidInput(detail, errors=[ProblemItem(detail=detail, parameter=parameter)])


def named(parameter: str, reference: str, *, id: str) -> InvalidInput:
    """The error that a recipe, which holds ids, names something otherwise."""
    return refused(parameter, f"a recipe holds ids, and {reference!r} is the name of {id}")


def _check_abilities(query: Query | SelectionRecipe, strategy: Strategy) -> None:
    """Raise `InvalidInput` where something is said of an ability space that has no use there."""
    if query.method != "cods":
        _refuse(query, ("neighbours", "beta", "capabilities"), "belongs to method=cods")
        if strategy in get_args(AbilityStrategy):
            raise refused("strategy", f"strategy={strategy} belongs to method=cods")
        return
    if strategy == "capability":
        if not query.capabilities:
            raise refused("capabilities", "strategy=capability selects for capabilities: name one (capabilities)")
        _refuse(query, ("neighbours", "beta"), "compares rows with a task's: leave it out with strategy=capability")
        if query.tasks:
            raise refused("task", "strategy=capability selects for capabilities, not for a task: leave it out")
        return
    _refuse(query, ("capabilities",), "belongs to strategy=capability")
    if strategy == "prototype":
        _refuse(query, ("neighbours",), "belongs to strategy=nearest: a prototype is the mean of all references")


def _with_match(query: Query | SelectionRecipe) -> None:
    _refuse(query, ("pct", "k"), "is not needed: a matched draw has as many rows as the selection it matches")
    if query.method != "random":
        raise refused("match", "match belongs to method=random: it draws rows as long as a selection's")
    _refuse(query, ("quota", "dedupe"), "does nothing in a matched draw: lengths give its rows")
    if query.strategy not in (None, "top"):
        raise refused("strategy", "strategy does nothing in a matched draw: lengths give its rows")


def _with_k_center(query: Query | SelectionRecipe) -> None:
    _refuse(query, ("dedupe", "clusters"), "does nothing with strategy=k-center, which keeps rows apart by itself")
    for name in ("k", "among"):
        if (getattr(query, name) or 0) > MAX_CENTERS_AMONG:
            most = f"k-center compares all candidates with each other, at most {MAX_CENTERS_AMONG:,}"
            raise refused(name, f"{most}: ask for fewer, or take strategy=clusters")


def _with_shots(query: Query | SelectionRecipe) -> None:
    if query.method in PLACING:
        raise refused(
            "strategy", f"strategy=shots compares features: method={query.method} has strategy=nearest for it"
        )
    if query.method in WITHOUT_FEATURES:
        raise refused("strategy", f"method={query.method} reads no features to compare rows by: leave strategy out")
    _refuse(query, ("quota",), "says where rows come from, and so does strategy=shots: leave one out")
    _refuse(query, ("dedupe",), "does nothing with strategy=shots, which passes over what is alike: say tau")
    if query.nearness is None or query.tau is None:
        raise refused(
            "nearness" if query.nearness is None else "tau", "a recipe of strategy=shots has nearness and tau"
        )
    if query.aggregate != OF_NEARNESS[query.nearness]:
        raise refused("aggregate", f"nearness={query.nearness} goes with aggregate={OF_NEARNESS[query.nearness]}")
    if query.combine not in ("max", "mean"):
        raise refused("combine", "strategy=shots orders rows by one score: ask for max or mean, or for each task alone")
    if (query.bandwidth is None) == (query.nearness == "kde"):
        raise refused("bandwidth", "bandwidth belongs to nearness=kde, which has one")


def _refuse(query: Query | SelectionRecipe, names: Sequence[str], why: str) -> None:
    for name in names:
        value = getattr(query, name)
        if value is not None and value is not False and value not in ((), []):
            raise refused(name, f"{name} {why}")
