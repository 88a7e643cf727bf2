"""The ability space: the network, its losses and its training, against numpy and loops over rows."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from gradstore.types import ProjectorConfig
from numpy.typing import NDArray
from scipy.special import erf, expit
from torch.nn.utils import clip_grad_norm_

from datastore.errors import Conflict
from worker.ability_space import (
    AbilitySpace,
    Dims,
    classification_loss,
    contrastive_loss,
    gram_error,
    parameter_count,
    repulsion_loss,
)
from worker.ability_training import Split, Standard, Streams, fit

SMALL = ProjectorConfig(width=32, blocks=1, dim=16, heads=4, epochs=2, adjustment_epochs=1)
Array = NDArray[Any]


def rows_of(capabilities: int, *, rows: int = 200, columns: int = 24, experts: int = 5, seed: int = 0) -> Any:
    """Streams in which each capability has a direction of its own, and the labels; a row calls for one or two."""
    rng = np.random.default_rng(seed)
    labels = np.zeros((rows, capabilities), bool)
    labels[np.arange(rows), rng.integers(capabilities, size=rows)] = True
    labels[np.arange(rows), rng.integers(capabilities, size=rows)] = True
    directions = rng.standard_normal((capabilities, columns)).astype(np.float32)
    gradients = labels @ directions + 0.3 * rng.standard_normal((rows, columns)).astype(np.float32)
    routing = rng.random((rows, experts), np.float32)
    return Streams(gradients.astype(np.float32), routing), labels


def space_of(dims: Dims, config: ProjectorConfig = SMALL, *, seed: int = 0) -> AbilitySpace:
    torch.manual_seed(seed)
    return AbilitySpace(dims, config)


# The network ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("columns", "routing", "expected"), [(8192, 7, 7_088_110), (8192 + 20_480, 7, 17_573_870)])
def test_the_network_has_as_many_parameters_as_the_published_one(columns: int, routing: int, expected: int) -> None:
    with torch.device("meta"):
        space = AbilitySpace(Dims(columns, routing, 13), ProjectorConfig())
    assert parameter_count(space) == expected


@pytest.mark.parametrize("routing", [5, 0])
def test_a_row_is_where_the_formulas_put_it(routing: int) -> None:
    dims = Dims(24, routing, 6)
    space = space_of(dims).double().eval()
    with torch.no_grad():
        for parameter in space.parameters():  # else norms and biases are 1 and 0, and a formula without them passes
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    rng = np.random.default_rng(1)
    gradients, routed = rng.standard_normal((7, 24)), rng.standard_normal((7, 5)) if routing else None
    placed = space(torch.from_numpy(gradients), None if routed is None else torch.from_numpy(routed))
    weights = {name: value.numpy() for name, value in space.state_dict().items()}
    u, similarity, logits = forward(weights, gradients, routed)
    np.testing.assert_allclose(placed.embedding.detach(), u, atol=1e-12)
    np.testing.assert_allclose(placed.similarity.detach(), similarity, atol=1e-12)
    np.testing.assert_allclose(placed.logits.detach(), logits, atol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(placed.embedding.detach(), axis=1), 1, atol=1e-12)


def forward(weights: dict[str, Array], gradients: Array, routing: Array | None) -> tuple[Array, Array, Array]:
    """u, similarity and logits of rows by the specification's ten steps, in numpy."""

    def linear(name: str, x: Array) -> Array:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(name: str, x: Array) -> Array:
        centred = x - x.mean(axis=1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-5)
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def gelu(x: Array) -> Array:
        return x * (1 + erf(x / math.sqrt(2))) / 2

    def relu(x: Array) -> Array:
        return np.maximum(x, 0)

    def branch(name: str, x: Array) -> Array:
        x = relu(norm(f"{name}.1", linear(f"{name}.0", x)))
        return norm(f"{name}.5", linear(f"{name}.4", x))

    def hidden(name: str, first: int, x: Array) -> Array:
        return gelu(norm(f"{name}.{first + 1}", linear(f"{name}.{first}", x)))

    parts = [] if routing is None else [branch("encoder.routing", routing)]
    x = hidden("encoder.fusion", 0, np.concatenate([*parts, branch("encoder.gradients", gradients)], axis=1))
    blocks = sorted({name.split(".")[2] for name in weights if name.startswith("encoder.blocks.")})
    for number in blocks:
        at = f"encoder.blocks.{number}"
        a = linear(f"{at}.linears.0", gelu(norm(f"{at}.norms.0", x)))
        b = linear(f"{at}.linears.1", gelu(norm(f"{at}.norms.1", a)))
        x = x + b * expit(linear(f"{at}.gate.2", relu(linear(f"{at}.gate.0", b))))
    x = norm("encoder.output.5", linear("encoder.output.4", hidden("encoder.output", 0, x)))
    x = hidden("sphere", 4, hidden("sphere", 0, x))
    x = norm("sphere.9", linear("sphere.8", x))
    u = x / np.linalg.norm(x, axis=1, keepdims=True)
    dim = u.shape[1]
    value = weights["attention.in_proj_weight"][2 * dim :]  # of one token the attention is the map W_o W_v u + b
    attended = u @ value.T + weights["attention.in_proj_bias"][2 * dim :]
    attended = attended @ weights["attention.out_proj.weight"].T + weights["attention.out_proj.bias"]
    v = norm("attention_norm", u + attended)
    base = weights["base"] / np.linalg.norm(weights["base"], axis=1, keepdims=True)
    similarity = v @ base.T * np.clip(weights["temperature"], 0.1, 5)
    logits = linear("classifier.8", hidden("classifier", 4, hidden("classifier", 0, v)))
    return u, similarity, logits + 0.3 * similarity


def test_base_vectors_begin_orthonormal_and_are_unit_rows_where_there_are_too_many() -> None:
    few, many = (space_of(Dims(8, 0, count)).gram() for count in (16, 40))
    assert gram_error(few) < 1e-5
    np.testing.assert_allclose(many.diagonal().detach(), 1, atol=1e-6)
    assert gram_error(many) > 1


def test_a_stage_trains_its_own_parts_alone_and_others_have_no_gradient_to_clip_by() -> None:
    space = space_of(Dims(24, 5, 6))
    names = {id(parameter): name for name, parameter in space.named_parameters()}
    encoder = {name for name in names.values() if name.startswith("encoder.")}
    for stage, still in ((1, {"base", "temperature"}), (2, encoder)):
        learning = space.learning(stage)
        assert {names[id(each)] for each in learning} == set(names.values()) - still
        space(torch.randn(4, 24), torch.randn(4, 5)).logits.sum().backward()
        assert all(p.grad is None for name, p in space.named_parameters() if name in still)
        whole = clip_grad_norm_(list(space.parameters()), 1e9)
        assert whole == clip_grad_norm_(learning, 1e9)


# The losses -------------------------------------------------------------------------------------------------------


def test_the_focal_loss_is_the_one_written_down() -> None:
    rng = np.random.default_rng(2)
    logits, labels = rng.normal(0, 12, (6, 5)), rng.random((6, 5)) < 0.4
    expected = []
    for x, y in zip(logits.ravel(), labels.ravel(), strict=True):
        p = 1 / (1 + math.exp(-min(max(x, -20), 20)))
        right = p if y else 1 - p
        expected.append(-(0.25 if y else 0.75) * (1 - right) ** 2 * math.log(right))
    found = classification_loss(torch.from_numpy(logits), torch.from_numpy(labels.astype(float)), alpha=0.25)
    assert float(found) == pytest.approx(np.mean(expected), rel=1e-9)


def test_the_contrastive_loss_is_the_one_written_down() -> None:
    rng = np.random.default_rng(3)
    u = rng.standard_normal((9, 4))
    u /= np.linalg.norm(u, axis=1, keepdims=True)
    labels = rng.random((9, 12)) < 0.35
    labels[0] = False  # no companion
    expected = []
    for i in range(9):
        others = [j for j in range(9) if j != i]
        companions = [
            j
            for j in others
            if labels[i].any()
            and labels[j].any()
            and (labels[i] & labels[j]).sum() / (labels[i].sum() * labels[j].sum()) > 0.1
        ]
        if companions:
            close = {j: math.exp(u[i] @ u[j] / 0.1) for j in others}
            part = sum(close[j] for j in companions) / (sum(close.values()) + 1e-8)
            expected.append(-math.log(part + 1e-8))
    assert 0 < len(expected) < 9
    found = contrastive_loss(torch.from_numpy(u), torch.from_numpy(labels.astype(float)))
    assert float(found) == pytest.approx(np.mean(expected), rel=1e-9)


def test_a_batch_without_companions_has_no_contrastive_loss() -> None:
    u = torch.nn.functional.normalize(torch.randn(4, 3), dim=1).requires_grad_()
    loss = contrastive_loss(u, torch.eye(4))
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(loss.detach()) == 0
    assert u.grad is not None
    assert not u.grad.any()


def test_base_vectors_repel_each_other_beyond_a_margin() -> None:
    base = np.random.default_rng(4).standard_normal((5, 3))
    base /= np.linalg.norm(base, axis=1, keepdims=True)
    pairs = [(i, j) for i in range(5) for j in range(5) if i != j]
    expected = sum(max(0, abs(base[i] @ base[j]) - 0.1) for i, j in pairs) / 20
    assert float(repulsion_loss(torch.from_numpy(base @ base.T))) == pytest.approx(expected)
    assert float(repulsion_loss(torch.eye(5))) == 0
    assert float(repulsion_loss(torch.ones(1, 1))) == 0


# Training ---------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_projector_and_another_seed_another() -> None:
    streams, labels = rows_of(6)
    first, again, other = (fit(streams, labels, SMALL, seed=seed) for seed in (1, 1, 2))
    place = first.projector.place(streams).embedding
    np.testing.assert_array_equal(place, again.projector.place(streams).embedding)
    assert first.epochs == again.epochs
    assert np.abs(place - other.projector.place(streams).embedding).max() > 0.01


def test_training_leaves_torchs_generator_as_it_was() -> None:
    streams, labels = rows_of(6)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    fit(streams, labels, SMALL, seed=0)
    assert torch.rand(1) == expected


def test_base_vectors_stay_unit_and_move_in_stage_two_only() -> None:
    streams, labels = rows_of(6)
    config = SMALL.model_copy(update={"repulsion_weight": 100.0})
    trained = fit(streams, labels, config, seed=0)
    norms = trained.projector.space.base.norm(dim=1)
    np.testing.assert_allclose(norms.detach(), 1, atol=1e-6)
    first, second, third = trained.epochs
    assert first.gram_error == pytest.approx(second.gram_error, abs=1e-5)
    assert first.temperature == second.temperature == 1
    assert third.gram_error > first.gram_error + 1e-4
    assert third.temperature != 1
    assert [(epoch.stage, epoch.epoch) for epoch in trained.epochs] == [(1, 1), (1, 2), (2, 1)]
    assert first.contrastive_loss is None
    assert third.loss == pytest.approx(
        third.classification_loss + 0.1 * (third.contrastive_loss or 0) + 100 * (third.repulsion_loss or 0), rel=1e-5
    )


def test_noise_takes_part_in_training() -> None:
    streams, labels = rows_of(6)
    still = SMALL.model_copy(update={"dropout": 0.0, "gradient_noise": 0.0, "routing_noise": 0.0})
    plain = fit(streams, labels, still, seed=0).projector.place(streams).embedding
    for name in ("gradient_noise", "routing_noise"):
        moved = fit(streams, labels, still.model_copy(update={name: 1.0}), seed=0).projector.place(streams).embedding
        assert np.abs(plain - moved).max() > 0.01, name


def test_rows_that_judge_have_no_part_in_the_statistics_nor_in_the_weights() -> None:
    streams, labels = rows_of(6)
    split = Split.of(len(streams), fraction=0.2, seed=3)
    assert len(split.validation) == 40
    assert sorted([*split.train, *split.validation]) == list(range(200))
    changed = Streams(streams.gradients.copy(), None if streams.routing is None else streams.routing.copy())
    changed.gradients[split.validation] += 100
    assert changed.routing is not None
    changed.routing[split.validation] *= -3
    first, second = (fit(each, labels, SMALL, seed=3).projector for each in (streams, changed))
    np.testing.assert_array_equal(first.gradients.mean, second.gradients.mean)
    np.testing.assert_array_equal(first.gradients.deviation, second.gradients.deviation)
    assert first.routing is not None
    assert second.routing is not None
    np.testing.assert_array_equal(first.routing.mean, second.routing.mean)
    for name, weight in first.space.state_dict().items():
        torch.testing.assert_close(weight, second.space.state_dict()[name], rtol=0, atol=0)


def test_statistics_are_of_the_rows_that_are_not_all_zero_and_unbiased() -> None:
    streams, labels = rows_of(6)
    streams.gradients[::7] = 0
    streams.gradients[:, 3] = 2  # the same in all rows that count, and not in the zero ones
    streams.gradients[::7] = 0
    trained = fit(streams, labels, SMALL, seed=0)
    train = trained.split.train
    counted = train[train % 7 != 0]
    assert trained.zero_rows == len(train) - len(counted) > 0
    expected = streams.gradients[counted].astype(np.float64)
    np.testing.assert_allclose(trained.projector.gradients.mean, expected.mean(axis=0), atol=1e-6)
    deviation = expected.std(axis=0, ddof=1) + 1e-8
    deviation[3] = 1
    np.testing.assert_allclose(trained.projector.gradients.deviation, deviation, rtol=1e-6)
    assert streams.routing is not None
    assert trained.projector.routing is not None
    np.testing.assert_allclose(
        trained.projector.routing.deviation, streams.routing[train].std(axis=0, ddof=1) + 1e-8, rtol=1e-5
    )


def test_too_few_rows_are_refused() -> None:
    streams, labels = rows_of(6, rows=9)
    with pytest.raises(Conflict, match="9 rows"):
        fit(streams, labels, SMALL, seed=0)
    nothing = Streams(np.zeros((20, 4), np.float32))
    with pytest.raises(Conflict, match="not zero"):
        fit(nothing, np.ones((20, 2), bool), SMALL, seed=0)


def test_a_row_is_placed_by_itself() -> None:
    streams, labels = rows_of(6)
    projector = fit(streams, labels, SMALL, seed=0).projector
    together = projector.place(streams)
    assert streams.routing is not None
    alone = projector.place(Streams(streams.gradients[7:8], streams.routing[7:8]))
    np.testing.assert_allclose(alone.embedding[0], together.embedding[7], atol=1e-6)
    np.testing.assert_allclose(alone.probabilities[0], together.probabilities[7], atol=1e-6)
    heard: list[int] = []
    projector.place(streams, on_rows=heard.append)
    assert heard[-1] == 200


def test_planted_capabilities_are_found_again_in_rows_not_trained_on() -> None:
    streams, labels = rows_of(6, rows=400, columns=64)
    config = ProjectorConfig(width=64, blocks=1, epochs=10, adjustment_epochs=2)
    trained = fit(replace(streams, routing=None), labels, config, seed=0)
    assert trained.projector.routing is None
    true = labels[trained.split.validation]
    right = (trained.predicted & true).sum(axis=0)
    f1 = 2 * right / (trained.predicted.sum(axis=0) + true.sum(axis=0))
    assert f1.min() >= 0.9
    assert trained.epochs[-1].f1 >= 0.9


def test_a_standard_of_one_row_is_refused() -> None:
    with pytest.raises(Conflict):
        Standard.of(np.ones((3, 2), np.float32), np.array([1]))
