"""GradEx: what training on a subset of a pool would give, from projected gradients and no training (arXiv 2409.19458).

At a trained checkpoint θ*, an example with the log-odds z_i of its answer and their gradient g_i has, after a small
step Δ, the log-odds z_i + g_iᵀΔ. What training on a subset S would add to θ* is taken from a logistic regression on the
projected gradients g̃_i = Pᵀg_i of its rows, all of which are to become right answers:

    ŵ = argmin_w ½‖w‖² + C Σ_{i∈S} log(1 + exp(−wᵀg̃_i))                                     (one class, no intercept)

The published code has a two-class solver do it, with labels drawn at random whose 0 turns a row's sign: without an
intercept that is the same problem for any draw. Then Δ = Pŵ is made `scale`·‖θ*‖ long, and a target's rows, of which
z_j and g̃_j are known, have the log-odds ẑ_j = z_j + κ g̃_jᵀŵ with κ = scale·‖θ*‖/‖Pŵ‖: their mean log(1 + exp(−ẑ_j)) is
the estimated loss, and the share of ẑ_j > 0 stands for accuracy. P is not needed: E‖Pŵ‖² = (p/d)‖ŵ‖² for any projection
with E[PPᵀ] = I, p parameters and d dims.

Everything here is arrays: float64, since weights are found to ten digits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
Members = NDArray[np.bool_]
"""Which groups are in each subset (subsets, groups)."""
Groups = NDArray[np.int64]
"""The group of each row (n,), from 0; `UNGROUPED` of a row that is in none."""

UNGROUPED = -1
TOLERANCE = 1e-10
"""How far weights may be from the optimum, relative to their length."""
BLOCK_ROWS = 256
"""Rows that are multiplied at once: their margins for a thousand subsets fit into the core's caches."""
POOLED_ROWS = 64
"""Groups of fewer rows share a block, in which a row counts for the subsets that have its group."""
BATCH_BYTES = 256 << 20
"""Bytes of the Hessians of the subsets that are solved together."""
GRAMS_AT_ONCE = 64
"""Groups whose Gram matrices are held at once."""
SHRINK = 0.1
"""A Hessian is kept as long as a step with it leaves no more than this of the gradient."""
DECREASE = 1e-4
"""Share of the decrease that the slope promises which a step must bring (Armijo)."""
HALVINGS = 40
"""So often is a step halved before the values' rounding is all that is left."""
MAX_STEPS = 200


@dataclass(frozen=True)
class Pool:
    """Rows with a feature and a group, ordered by their groups."""

    features: Numbers
    """(rows, d)"""
    bounds: NDArray[np.int64]
    """Where each group's rows begin, and the number of rows (groups + 1,)."""
    blocks: list[_Block] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", list(_blocks(self.bounds)))

    @classmethod
    def of(cls, features: NDArray[np.floating], groups: Groups, *, count: int) -> Pool:
        """The rows (n, d) whose group is one of `count`; a group may be empty."""
        order = np.argsort(groups, kind="stable")
        order = order[np.searchsorted(groups[order], 0) :]
        bounds = np.searchsorted(groups[order], np.arange(count + 1))
        return cls(np.ascontiguousarray(features[order], np.float64), bounds)

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Rows of each group (groups,)."""
        return np.diff(self.bounds)


@dataclass(frozen=True)
class Fits:
    """What the regressions came to."""

    weights: Numbers
    """ŵ of each subset (subsets, d)."""
    losses: Numbers
    """Mean of log(1 + exp(−wᵀg̃)) over the rows of each subset; log 2 before anything is learnt (subsets,)."""
    steps: int
    """Steps of the subset that took the most."""


@dataclass(frozen=True)
class _Block:
    """Rows that are multiplied at once: of one group, or of several small ones."""

    rows: slice
    groups: slice
    of_rows: NDArray[np.int64] | None
    """The group of each row, counted from the first; None where there is one group."""


def fit(pool: Pool, members: Members, *, c: float, start: Numbers | None = None) -> Fits:
    """The one-class logistic regression of each subset of groups, in batches that are solved together.

    Newton's method with a line search, from `start` (subsets, d) or from 0. The first Hessian bounds all others (σ(1−σ)
    ≤ 1/4; Böhning and Lindsay 1988) and is the sum of the groups' Gram matrices, so a step with it always descends and
    costs no pass of its own; a subset gets its own Hessian only where that one shrinks the gradient too slowly. The
    objective is 1-strongly convex, so ‖∇‖ bounds the distance from the optimum: that is when a subset is done.
    """
    d = pool.features.shape[1]
    at_once = max(1, BATCH_BYTES // (8 * d * d))
    starts = np.zeros((len(members), d)) if start is None else start
    parts = [
        _Batch(pool, members[first : first + at_once], c).solve(starts[first : first + at_once])
        for first in range(0, len(members), at_once)
    ]
    rows = np.maximum(members @ pool.sizes, 1)
    weights, sums = (np.concatenate(found) for found in zip(*((one, two) for one, two, _ in parts), strict=True))
    return Fits(weights, sums / rows, steps=max((steps for _, _, steps in parts), default=0))


class _Batch:
    """Subsets whose regressions are solved together."""

    def __init__(self, pool: Pool, members: Members, c: float) -> None:
        self._pool, self._members, self._c = pool, members, c
        self._d = pool.features.shape[1]
        lengths = np.linalg.norm(pool.features, axis=1)
        of_groups = np.array([lengths[start:stop].sum() for start, stop in pairwise(pool.bounds)])
        self._rounding = np.finfo(np.float64).eps * c * (members @ of_groups)
        """What rounding leaves of a gradient."""

    def solve(self, start: Numbers) -> tuple[Numbers, Numbers, int]:
        """Weights (subsets, d), the sums of the rows' losses (subsets,), and the steps that were taken."""
        weights = start.copy()
        active = np.arange(len(weights))
        values, gradients = self._objective(active, weights)
        inverses = self._inverses(active, None)
        steps = 0
        active = active[self._unfinished(active, weights, gradients)]
        while len(active) and steps < MAX_STEPS:
            steps += 1
            before = np.linalg.norm(gradients[active], axis=1)
            moved = self._step(active, weights, values, gradients, inverses)
            after = np.linalg.norm(gradients[active], axis=1)
            going_on = moved & self._unfinished(active, weights, gradients)
            slow = active[going_on & (after > SHRINK * before)]
            if len(slow):
                inverses[slow] = self._inverses(slow, weights[slow])
            active = active[going_on]
        sums = (values - 0.5 * np.einsum("sd,sd->s", weights, weights)) / self._c
        return weights, sums, steps

    def _unfinished(self, active: NDArray[np.int64], weights: Numbers, gradients: Numbers) -> NDArray[np.bool_]:
        near = np.maximum(TOLERANCE * np.linalg.norm(weights[active], axis=1), self._rounding[active])
        return np.asarray(np.linalg.norm(gradients[active], axis=1) > near)

    def _step(
        self, active: NDArray[np.int64], weights: Numbers, values: Numbers, gradients: Numbers, inverses: Numbers
    ) -> NDArray[np.bool_]:
        """Move the active subsets' weights along their directions; says which could be moved (active,)."""
        directions = -np.einsum("sde,se->sd", inverses[active], gradients[active])
        slopes = np.einsum("sd,sd->s", directions, gradients[active])
        slack = 1e-13 * np.abs(values[active])  # what rounding makes of a value
        moved = np.zeros(len(active), bool)
        waiting, length = np.arange(len(active)), 1.0
        for _ in range(HALVINGS):
            chosen = active[waiting]
            tried = weights[chosen] + length * directions[waiting]
            found, slopes_there = self._objective(chosen, tried)
            fine = found <= values[chosen] + DECREASE * length * slopes[waiting] + slack[waiting]
            weights[chosen[fine]], values[chosen[fine]] = tried[fine], found[fine]
            gradients[chosen[fine]] = slopes_there[fine]
            moved[waiting[fine]] = True
            waiting, length = waiting[~fine], length / 2
            if not len(waiting):
                break
        return moved

    def _objective(self, subsets: NDArray[np.int64], weights: Numbers) -> tuple[Numbers, Numbers]:
        """The value (s,) and the gradient (s, d) of each subset's objective at its weights (s, d)."""
        sums, gradients = np.zeros(len(subsets)), np.zeros_like(weights)
        for block, columns, inside in self._blocks(subsets):
            rows = self._pool.features[block.rows]
            margins = weights[columns] @ rows.T
            losses, wrong = _softplus_and_slope(margins)
            if inside is not None:
                losses *= inside
                wrong *= inside
            sums[columns] += losses.sum(axis=1)
            gradients[columns] += wrong @ rows
        values = 0.5 * np.einsum("sd,sd->s", weights, weights) + self._c * sums
        return values, weights - self._c * gradients

    def _inverses(self, subsets: NDArray[np.int64], weights: Numbers | None) -> Numbers:
        """The inverse Hessians (s, d, d) at these weights; without any, that of the bound σ(1−σ) ≤ 1/4."""
        upper = np.triu_indices(self._d)
        packed = self._bounds(subsets) if weights is None else self._curvatures(subsets, weights)
        hessians = np.empty((len(subsets), self._d, self._d))
        hessians[:, upper[0], upper[1]] = hessians[:, upper[1], upper[0]] = self._c * packed
        hessians += np.eye(self._d)
        return np.asarray(np.linalg.inv(hessians), np.float64)

    def _curvatures(self, subsets: NDArray[np.int64], weights: Numbers) -> Numbers:
        """Σ σ(1−σ) g̃g̃ᵀ over each subset's rows: the upper triangles (s, d(d+1)/2)."""
        packed = np.zeros((len(subsets), self._d * (self._d + 1) // 2))
        for block, columns, inside in self._blocks(subsets):
            rows = self._pool.features[block.rows]
            _, wrong = _softplus_and_slope(weights[columns] @ rows.T)
            curvature = wrong * (1 - wrong)
            packed[columns] += (curvature if inside is None else curvature * inside) @ _outer(rows)
        return packed

    def _bounds(self, subsets: NDArray[np.int64]) -> Numbers:
        """The same with the largest σ(1−σ) there is, 1/4, from the Gram matrices of the groups."""
        packed = np.zeros((len(subsets), self._d * (self._d + 1) // 2))
        bounds = self._pool.bounds
        for first in range(0, len(bounds) - 1, GRAMS_AT_ONCE):
            last = min(first + GRAMS_AT_ONCE, len(bounds) - 1)
            grams = [_gram(self._pool.features[start:stop]) for start, stop in pairwise(bounds[first : last + 1])]
            packed += self._members[subsets, first:last] @ (0.25 * np.stack(grams))
        return packed

    def _blocks(self, subsets: NDArray[np.int64]) -> Iterator[tuple[_Block, NDArray[np.int64], Numbers | None]]:
        """Each block, which of the subsets have rows in it, and where not all rows count, which of them (s, rows)."""
        for block in self._pool.blocks:
            own = self._members[subsets, block.groups]
            columns = np.flatnonzero(own.any(axis=1))
            if len(columns):
                inside = None if block.of_rows is None else own[columns][:, block.of_rows].astype(np.float64)
                yield block, columns, inside


def _softplus_and_slope(margins: Numbers) -> tuple[Numbers, Numbers]:
    """log(1 + exp(−m)) and σ(−m) of each margin, without overflow."""
    small = np.exp(-np.abs(margins))
    losses = np.log1p(small) + np.maximum(-margins, 0)
    wrong = np.where(margins > 0, small, 1.0) / (1 + small)
    return losses, wrong


def _gram(rows: Numbers) -> Numbers:
    """The upper triangle of Σ g̃g̃ᵀ (d(d+1)/2,)."""
    found: Numbers = (rows.T @ rows)[np.triu_indices(rows.shape[1])]
    return found


def _outer(rows: Numbers) -> Numbers:
    """The upper triangle of each row's outer product with itself (n, d(d+1)/2), as `numpy.triu_indices` orders it."""
    n, d = rows.shape
    found = np.empty((n, d * (d + 1) // 2))
    reached = 0
    for first in range(d):
        np.multiply(rows[:, first : first + 1], rows[:, first:], out=found[:, reached : reached + d - first])
        reached += d - first
    return found


def _blocks(bounds: NDArray[np.int64]) -> Iterator[_Block]:
    """Cut large groups into blocks, and put small ones that follow each other into one."""
    first = 0
    groups = len(bounds) - 1
    while first < groups:
        last = first + 1
        while last < groups and bounds[last + 1] - bounds[first] <= POOLED_ROWS:
            last += 1
        start, stop = int(bounds[first]), int(bounds[last])
        if last - first > 1:
            of_rows = np.repeat(np.arange(last - first), np.diff(bounds[first : last + 1]))
            if stop > start:
                yield _Block(slice(start, stop), slice(first, last), of_rows)
        else:
            for begin, end in pairwise([*range(start, stop, BLOCK_ROWS), stop]):
                yield _Block(slice(begin, end), slice(first, last), None)
        first = last


@dataclass(frozen=True)
class TargetRows:
    """The rows of a target, and what they are counted for."""

    log_odds: Numbers
    """z of each row at the checkpoint (rows,)."""
    features: Numbers
    """g̃ of each row (rows, d)."""
    labels: NDArray[np.int64]
    """The subtask of each row (rows,), from 0."""
    subtasks: int

    @property
    def counted(self) -> Numbers:
        """Which rows count for each subtask, and in the last column, that all do (rows, subtasks + 1)."""
        found = np.zeros((len(self.labels), self.subtasks + 1))
        found[np.arange(len(self.labels)), self.labels] = 1
        found[:, -1] = 1
        return found


def unprojected_lengths(weights: Numbers, *, parameters: int) -> Numbers:
    """‖Pŵ‖ of each ŵ (subsets,) without P: √(p/d)‖ŵ‖, its root mean square over projections.

    Exactly so where the projection is orthogonal.
    """
    found: Numbers = np.sqrt(parameters / weights.shape[1]) * np.linalg.norm(weights, axis=1)
    return found


def step_factors(found: Numbers, *, scale: float | None, length: float) -> tuple[Numbers, Numbers]:
    """What each ŵ is multiplied with, κ (subsets,), and how long the step ‖Δ‖ then is (subsets,).

    `found` is ‖Pŵ‖ (subsets,). `length` is ‖θ*‖, or 1 where `scale` is the step's length itself; without a scale the
    step is Pŵ as it is.
    """
    if scale is None:
        return np.ones(len(found)), found
    wanted = scale * length
    factors = np.divide(wanted, found, out=np.zeros_like(found), where=found > 0)
    return factors, np.where(found > 0, wanted, 0.0)


def estimated(target: TargetRows, weights: Numbers, factors: Numbers) -> tuple[Numbers, Numbers]:
    """The estimated loss and accuracy of each subset, by subtask and of all rows: (subsets, subtasks + 1) each.

    A subtask without a row has NaN. The last column is the mean over all rows.
    """
    counted = target.counted
    with np.errstate(invalid="ignore"):  # a subtask without a row
        counted /= counted.sum(axis=0)
    log_odds = target.log_odds + factors[:, None] * (weights @ target.features.T)
    losses, _ = _softplus_and_slope(log_odds)
    return losses @ counted, (log_odds > 0).astype(np.float64) @ counted


def measured(target: TargetRows, log_odds: Numbers) -> tuple[Numbers, Numbers]:
    """The loss and the accuracy of `estimated`, from log-odds (rows,) that were measured: (subtasks + 1,) each.

    NaN does not count.
    """
    losses, _ = _softplus_and_slope(log_odds)
    return means(target, losses), means(target, np.where(np.isfinite(log_odds), log_odds > 0, np.nan))


def means(target: TargetRows, values: Numbers) -> Numbers:
    """The mean of values (rows,) over each subtask and over all rows (subtasks + 1,); NaN does not count."""
    known, counted = np.isfinite(values), target.counted
    with np.errstate(invalid="ignore"):  # a subtask without a value
        found: Numbers = (np.where(known, values, 0) @ counted) / (known @ counted)
    return found


def ensemble(values: Numbers, members: Members) -> tuple[Numbers, NDArray[np.int64], Numbers]:
    """T_i, the mean value of the subsets that have a group; how many these are; and its standard error: (groups,) each.

    NaN for a group that no subset has, and for the error of one that only one has.
    """
    counts = members.sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = (values @ members) / counts
        squares = ((values[:, None] - means) ** 2 * members).sum(axis=0)
        errors = np.sqrt(squares / (counts - 1) / counts)
    errors[counts < 2] = np.nan
    return means, counts, errors


def ridge(values: Numbers, members: Members, *, alpha: float = 1.0) -> Numbers:
    """The coefficients (groups,) of the values' ridge regression on 0/1 membership, without an intercept."""
    inside = members.astype(np.float64)
    gram = inside.T @ inside
    gram[np.diag_indices_from(gram)] += alpha
    return np.asarray(np.linalg.solve(gram, inside.T @ values), np.float64)


def relative_rss(estimates: Numbers, values: Numbers) -> float:
    """Σ(f̂ − f)² / Σf²."""
    return float(np.square(estimates - values).sum() / np.square(values).sum())
