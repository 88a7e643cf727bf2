"""Every kind of features, with every projection, in every precision, on small models of every architecture.

The engine makes all kinds in one pass over rows of different lengths in several batches. Without a projection its
features are compared with float64 autograd of one example alone (tests/architectures.py); with one, with the map's
matrix made number by number from its documentation (tests/bruteforce.py) times those without. `logodds`, which takes a
pass for itself, is held against float64 autograd here too, and with projections in tests/test_logodds.py.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests import bruteforce
from tests.architectures import (
    ADAPTERS,
    EXPERTS,
    PAD,
    direction,
    log_odds_of,
    reference,
    relative_error,
    rows,
    trainable,
    trained,
)
from tests.engines import KINDS, only, run, settled, whole
from worker.batches import IGNORED
from worker.directions import Kind
from worker.features import Features
from worker.gradients import GradientEngine
from worker.projection import ProjectionName

DIMS = [40, 280]  # less and more than most parameters have
SEED = 5

PRECISIONS = {"float32": 1e-5, "float16": 0.05, "bfloat16": 0.2}
"""The largest relative error of a feature that rounding may make: 10⁻⁵ for float32, and for the others more than was
measured, 0.030 and 0.12 (the cosines were then 0.9996 and 0.993). An error of e leaves a cosine of √(1 − e²) or more.
"""
SWITCHED = {("opt", "float16"): 0.15}
"""OPT's units are ReLUs, and rounding may switch one that is nearly zero. Where a CPU's float16 products sum in another
order one does: autograd of the plain model, one example alone, is then off by 0.118 in the same row, as the engine is.
"""


def allowed(name: str, precision: str) -> float:
    """The largest relative error of a model's features."""
    return SWITCHED.get((name, precision), PRECISIONS[precision])


everything = pytest.mark.parametrize(
    ("name", "precision"), [(name, precision) for name in ADAPTERS for precision in PRECISIONS]
)


def compute(name: str, precision: str, projection: ProjectionName, dims: list[int]) -> dict[Kind, Features]:
    """The features of `rows()` in several batches."""
    model, moments, _ = trained(name, getattr(torch, precision))
    engine = GradientEngine(model, kinds=KINDS, moments=moments, projection=projection, dims=dims, seed=SEED)
    heard: list[int] = []
    found = engine.features(rows(), pad_id=PAD, token_budget=80, on_batch=heard.append)
    assert len(heard) > 2
    assert bool(engine.one_at_a_time) == (name == EXPERTS)
    return found


@cache
def unprojected(name: str, precision: str) -> dict[Kind, Features]:
    _, _, truth = trained(name, getattr(torch, precision))
    return compute(name, precision, "none", [truth.gradients.shape[1]])


@cache
def matrix(name: str, projection: str, dim: int) -> NDArray[np.float64]:
    sizes = {parameter: values.numel() for parameter, values in trainable(trained(name)[0]).items()}
    return bruteforce.matrix(projection, dim, SEED, sizes)


@everything
def test_without_a_projection_a_feature_is_made_of_the_float64_gradient_of_its_example_alone(
    name: str, precision: str
) -> None:
    error = allowed(name, precision)
    _, moments, truth = trained(name, getattr(torch, precision))
    found = unprojected(name, precision)
    assert list(found) == KINDS
    for kind, features in found.items():
        assert features.reasons == [None] * len(rows())
        assert features.tokens.tolist() == [sum(label != IGNORED for label in row.labels) for row in rows()]
        np.testing.assert_allclose(features.losses, truth.losses, rtol=error)
        if kind.name in truth.hidden:
            wanted = raw = truth.hidden[kind.name]
        else:
            wanted, raw = direction(truth.gradients, kind.name, kind.adam, moments), truth.gradients
        got = torch.tensor(only(features)).double()
        if kind.name == "sign":
            wanted = settled(wanted, got, raw, error=error / 5)
        assert relative_error(got, wanted) < error, kind
        np.testing.assert_allclose(features.norms, wanted.norm(dim=1), rtol=error)
        np.testing.assert_allclose(features.raw_norms, raw.norm(dim=1), rtol=error)


@everything
def test_log_odds_and_their_gradient_are_those_of_the_float64_model_and_its_example_alone(
    name: str, precision: str
) -> None:
    error = allowed(name, precision)
    model, _, _ = trained(name, getattr(torch, precision))
    odds = reference(model, rows(), objective=log_odds_of)
    found = run(whole(model, Kind("logodds")), rows())
    assert found.reasons == [None] * len(rows())
    assert relative_error(only(found), odds.gradients) < error
    assert found.logodds is not None
    np.testing.assert_allclose(found.logodds, odds.losses, rtol=error, atol=error)


@everything
@pytest.mark.parametrize("projection", ["blocks", "sjlt", "fft", "rademacher", "reference"])
def test_with_a_projection_a_feature_is_its_documented_matrix_times_the_one_without(
    name: str, precision: str, projection: ProjectionName
) -> None:
    plain = unprojected(name, precision)
    for kind, features in compute(name, precision, projection, DIMS).items():
        np.testing.assert_allclose(features.norms, plain[kind].norms, rtol=1e-6)
        np.testing.assert_allclose(features.raw_norms, plain[kind].raw_norms, rtol=1e-6)
        if not kind.needs_gradient:
            np.testing.assert_array_equal(only(features), only(plain[kind]))
            continue
        assert list(features.by_dim) == DIMS
        for dim, got in features.by_dim.items():
            wanted = only(plain[kind]).astype(np.float64) @ matrix(name, projection, dim)
            assert relative_error(got, wanted) < 1e-5, (kind, dim)
