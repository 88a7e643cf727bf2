"""Which groups to keep, searched step by step with an estimate for each subset that is tried: arrays in, a trace out.

`forward-scan` is GradEx's selection as it was published: each group once, in their order, kept where the value is at
least as good as the best so far; K estimates, and the order matters. `stepwise` adds, in each round, the group that
does best, and `backward` removes the one that is missed least, K(K+1)/2 estimates each; both go on to the end, so that
every group has a place, and the best subset on the way is what they choose. Ties go to the first group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Search = Literal["forward-scan", "stepwise", "backward"]
Evaluate = Callable[[NDArray[np.bool_]], NDArray[np.float64]]
"""How good each subset of groups is (subsets, groups) → (subsets,): more is better."""


@dataclass(frozen=True)
class Step:
    """A group that was added to, or removed from, the subset."""

    group: int
    value: float
    """How good the subset is with the change."""
    kept: bool
    """Whether the change was kept."""


@dataclass(frozen=True)
class Found:
    """What a search came to."""

    chosen: NDArray[np.bool_]
    """(groups,)"""
    value: float
    scores: NDArray[np.float64]
    """The order in which groups are preferred: more is better (groups,)."""
    trace: Sequence[Step]


def forward_scan(groups: int, evaluate: Evaluate) -> Found:
    """Each group once, in order; a group's score is how much better the subset is with it than the best before."""
    chosen, best = np.zeros(groups, bool), -np.inf
    scores, trace = np.zeros(groups), list[Step]()
    for group in range(groups):
        tried = chosen.copy()
        tried[group] = True
        [value] = evaluate(tried[None]).tolist()
        kept = value >= best
        scores[group] = 0.0 if np.isinf(best) else value - best
        trace.append(Step(group, value, kept))
        if kept:
            chosen, best = tried, value
    if groups:
        scores[0] = max(scores.max(), 0.0)  # the first one is compared with nothing, and always kept
    return Found(chosen, best, scores, trace)


def stepwise(groups: int, evaluate: Evaluate) -> Found:
    """The best addition of each round; a group's score is higher the earlier it was added."""
    chosen = np.zeros(groups, bool)
    best, best_value, scores, trace = chosen, -np.inf, np.zeros(groups), list[Step]()
    for place in range(groups):
        group, value = _best_change(chosen, evaluate, to=True)
        chosen = _changed(chosen, group)
        scores[group] = groups - place
        trace.append(Step(group, value, kept=True))
        if value > best_value:
            best, best_value = chosen, value
    return Found(best, best_value, scores, _marked(trace, best, to=True))


def backward(groups: int, evaluate: Evaluate) -> Found:
    """The best removal of each round, from all groups to one; a group's score is higher the later it was removed."""
    chosen = np.ones(groups, bool)
    [value] = evaluate(chosen[None]).tolist()
    best, best_value, scores, trace = chosen, value, np.full(groups, float(groups)), list[Step]()
    for place in range(groups - 1):
        group, value = _best_change(chosen, evaluate, to=False)
        chosen = _changed(chosen, group)
        scores[group] = place + 1
        trace.append(Step(group, value, kept=True))
        if value >= best_value:  # as good with fewer groups is better
            best, best_value = chosen, value
    return Found(best, best_value, scores, _marked(trace, best, to=False))


SEARCHES: dict[Search, Callable[[int, Evaluate], Found]] = {
    "forward-scan": forward_scan,
    "stepwise": stepwise,
    "backward": backward,
}


def _best_change(chosen: NDArray[np.bool_], evaluate: Evaluate, *, to: bool) -> tuple[int, float]:
    """The group whose addition, or removal, does best, and the value with it."""
    candidates = np.flatnonzero(chosen != to)
    tried = np.repeat(chosen[None], len(candidates), axis=0)
    tried[np.arange(len(candidates)), candidates] = to
    values = evaluate(tried)
    place = int(np.argmax(values))
    return int(candidates[place]), float(values[place])


def _changed(chosen: NDArray[np.bool_], group: int) -> NDArray[np.bool_]:
    found = chosen.copy()
    found[group] = not found[group]
    return found


def _marked(trace: Sequence[Step], best: NDArray[np.bool_], *, to: bool) -> list[Step]:
    """The steps, those that lead to the best subset marked as kept."""
    return [Step(step.group, step.value, kept=bool(best[step.group]) == to) for step in trace]
