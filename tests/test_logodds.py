"""Log-odds and their gradients against float64 autograd of one example alone, in both forms; what must not matter.

Every architecture in every precision is tests/test_engine_matrix.py.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from peft import PeftModel

from tests import bruteforce
from tests.architectures import (
    BROKEN_TOKEN,
    EXPERTS,
    PAD,
    Reference,
    adapt,
    base_model,
    log_odds_of,
    reference,
    relative_error,
    rows,
    trainable,
    trained,
)
from tests.engines import SGD, features, only, run, whole
from worker.batches import IGNORED, Encoded
from worker.directions import Kind, LogoddsForm
from worker.features import GRADIENT_ZERO, LOSS_NOT_FINITE, NOTHING_SUPERVISED, Features
from worker.gradients import GradientEngine
from worker.losses import _LogOdds, stabilised
from worker.projection import ProjectionName

FORMS: tuple[LogoddsForm, ...] = ("exact", "reference")
EXACT = Kind("logodds")

forms = pytest.mark.parametrize("form", FORMS)


def reference_log_odds_of(model: torch.nn.Module, row: Encoded) -> torch.Tensor:
    """As GradEx's code for instructions has it, token by token: p − 0.01 where p > 0.9, p + 0.01 where p < 0.001."""
    probabilities = model(input_ids=torch.tensor([row.input_ids]), use_cache=False).logits[0, :-1].softmax(1)
    parts = []
    for place, label in enumerate(row.labels[1:]):
        if label != IGNORED:
            p = probabilities[place, label]
            moved = p - 0.01 if p > 0.9 else p + 0.01 if p < 0.001 else p
            parts.append(torch.log(moved / (1 - moved)))
    return torch.stack(parts).mean()


def truth(model: PeftModel, examples: Sequence[Encoded], form: LogoddsForm) -> Reference:
    """z and its gradient in float64, one example at a time; z are the `losses`."""
    return reference(model, examples, objective=log_odds_of if form == "exact" else reference_log_odds_of)


def certain() -> PeftModel:
    """A model that is sure of nearly everything, right or wrong: p runs from 1e-30 to 1 − 1e-30."""
    model = adapt(base_model("llama")).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight *= 25
    return model


def check(found: Features, wanted: Reference, *, error: float = 1e-5) -> None:
    assert found.reasons == [None] * len(wanted.losses)
    assert found.logodds is not None
    np.testing.assert_allclose(found.logodds, wanted.losses, rtol=error, atol=1e-5)
    assert relative_error(only(found), wanted.gradients) < error
    np.testing.assert_allclose(found.norms, wanted.gradients.norm(dim=1), rtol=error)
    np.testing.assert_array_equal(found.norms, found.raw_norms)


# Against float64 autograd ---------------------------------------------------------------------------------------------


@forms
@pytest.mark.parametrize("name", ["llama", "gpt2", EXPERTS])
def test_a_feature_is_the_float64_gradient_of_the_mean_log_odds_of_its_example_alone(
    name: str, form: LogoddsForm
) -> None:
    model, _, losses = trained(name)
    found = run(whole(model, Kind("logodds", logodds=form)), rows())
    check(found, truth(model, rows(), form))
    np.testing.assert_allclose(found.losses, losses.losses, rtol=1e-5)
    assert found.tokens.tolist() == [sum(label != IGNORED for label in row.labels[1:]) for row in rows()]


@forms
def test_a_model_that_is_sure_gives_numbers_and_not_nan(form: LogoddsForm) -> None:
    """Where p is 0 or 1 to float32 the exact log-odds go on; those of GradEx's code end, and so does their gradient."""
    model = certain()
    examples = [*greedy(model, rows()), *rows()]
    found = run(whole(model, Kind("logodds", logodds=form)), examples)
    wanted = truth(model, examples, form)
    assert found.logodds is not None
    np.testing.assert_allclose(found.logodds, wanted.losses, rtol=1e-5, atol=1e-5)
    alive = wanted.gradients.norm(dim=1) > 1e-12
    assert [found.reasons[row] for row in np.flatnonzero(alive)] == [None] * int(alive.sum())
    # where p is small the reference's gradient is in proportion to it, and log-odds of −30 are right to 1e-5
    assert relative_error(only(found)[alive], wanted.gradients[alive]) < (2e-5 if form == "exact" else 1e-3)
    ends = float(wanted.losses.min()), float(wanted.losses.max())
    if form == "exact":
        assert alive.all()
        assert ends[0] < -30
        assert ends[1] > 20
    else:
        assert 0 < (~alive).sum() < 5
        assert {found.reasons[row] for row in np.flatnonzero(~alive)} <= {None, GRADIENT_ZERO}
        assert -math.log(999) < ends[0] < -4
        assert ends[1] == pytest.approx(math.log(99), rel=1e-4)


def greedy(model: PeftModel, examples: Sequence[Encoded]) -> list[Encoded]:
    """The examples with what the model itself would say at every place that is learnt from."""
    said = []
    for row in examples:
        ids, labels = list(row.input_ids), list(row.labels)
        for place in range(1, len(ids)):
            if labels[place] != IGNORED:
                with torch.no_grad():
                    ids[place] = labels[place] = int(
                        model(input_ids=torch.tensor([ids[:place]])).logits[0, -1].argmax()
                    )
        said.append(Encoded(tuple(ids), tuple(labels)))
    return said


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("elements", [1, 100, 1 << 18])
def test_log_odds_are_made_in_float32_and_in_slices_whatever_the_logits_are(
    dtype: torch.dtype, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.losses.LOGIT_ELEMENTS", {"cpu": elements})
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(0, 40, (9,), generator=generator)
    logits = torch.randn(9, 40, generator=generator)
    logits[torch.arange(9), targets] += 8 * torch.arange(-4.0, 5.0)
    logits = logits.to(dtype).requires_grad_()
    weights = torch.rand(9, generator=generator)
    found = _LogOdds.apply(logits, targets)  # type: ignore[no-untyped-call]  # torch's
    (gradient,) = torch.autograd.grad(found, logits, weights)

    double = logits.detach().double().requires_grad_()
    own = torch.nn.functional.one_hot(targets, 40).bool()
    wanted = double[own] - double.masked_fill(own, -torch.inf).logsumexp(1)
    (expected,) = torch.autograd.grad(wanted, double, weights.double())
    rounding = {torch.float32: 1e-6, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[dtype]
    assert (found.dtype, gradient.dtype) == (torch.float32, dtype)
    assert torch.allclose(found.double(), wanted, rtol=1e-6, atol=1e-6)
    assert torch.allclose(gradient.double(), expected, rtol=rounding, atol=1e-7)


def test_the_reference_form_is_the_published_shift_of_probabilities() -> None:
    """Compared over p in float64, from where float32 knows p to where it only knows 1 − p."""
    logits = torch.linspace(-40, 40, 1601, dtype=torch.float64)
    p = logits.sigmoid()
    moved = torch.where(p > 0.9, p - 0.01, torch.where(p < 0.001, p + 0.01, p))
    wanted = torch.log(moved) - torch.log1p(-moved)
    single = logits.float().requires_grad_()
    found = stabilised(single, "reference")
    assert torch.allclose(found.double(), wanted, rtol=1e-5, atol=1e-6)
    (slope,) = torch.autograd.grad(found.sum(), single)
    expected = p * (-logits).sigmoid() / (moved * (1 - moved))
    assert torch.allclose(slope.double(), expected, rtol=1e-5, atol=0)
    assert float(found.detach().max()) == pytest.approx(math.log(99), rel=1e-6)
    assert float(found.detach().min()) > -math.log(999)


# What must not matter -------------------------------------------------------------------------------------------------


@forms
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_batch_size_and_order_change_neither_log_odds_nor_their_gradient(architecture: str, form: LogoddsForm) -> None:
    model, _, _ = trained(architecture)
    engine = GradientEngine(model, kinds=[Kind("logodds", logodds=form)], dims=[512])
    examples = rows()
    usual = run(engine, examples)
    assert usual.logodds is not None
    for order in (range(len(examples)), (6, 2, 4, 0, 5, 3, 1)):
        for token_budget in (1, 40, 10_000):
            again = run(engine, [examples[row] for row in order], token_budget=token_budget)
            assert again.logodds is not None
            assert relative_error(only(again), only(usual)[list(order)]) < 1e-5
            np.testing.assert_allclose(again.logodds, usual.logodds[list(order)], rtol=1e-5, atol=1e-6)


def test_the_same_plan_twice_gives_the_same_bytes() -> None:
    model, _, _ = trained("llama")
    first, second = (run(GradientEngine(copy.deepcopy(model), kinds=[EXACT], dims=[64]), rows()) for _ in range(2))
    assert only(first).tobytes() == only(second).tobytes()
    assert first.logodds is not None
    assert second.logodds is not None
    assert first.logodds.tobytes() == second.logodds.tobytes()


def test_hidden_states_come_beside_them_as_they_come_without() -> None:
    model, _, _ = trained("llama")
    both = features(GradientEngine(model, kinds=[Kind("rds"), EXACT], dims=[64]), rows())
    alone = run(GradientEngine(model, kinds=[EXACT], dims=[64]), rows())
    hidden = run(GradientEngine(model, kinds=[Kind("rds")], dims=[]), rows())
    np.testing.assert_array_equal(only(both[EXACT]), only(alone))
    np.testing.assert_array_equal(only(both[Kind("rds")]), only(hidden))
    assert both[Kind("rds")].logodds is None


def test_the_gradient_of_the_loss_is_that_of_the_log_odds_less_each_tokens_share() -> None:
    """−log p = log(1 + exp(−z)), so a row of one token has the loss's gradient −(1 − p) times the log-odds'."""
    model, _, _ = trained("llama")
    row = rows([12])[0]
    single = Encoded(row.input_ids, (*[IGNORED] * 11, row.input_ids[-1]))
    loss, odds = run(whole(model), [single]), run(whole(model, EXACT), [single])
    assert odds.logodds is not None
    np.testing.assert_allclose(odds.losses, loss.losses, rtol=1e-5)
    np.testing.assert_allclose(loss.losses, np.logaddexp(0, -odds.logodds), rtol=1e-5)
    share = 1 - np.exp(-loss.losses[0])
    assert relative_error(only(loss), -share * only(odds)) < 1e-5


@pytest.mark.parametrize("projection", ["blocks", "sjlt", "fft", "rademacher", "reference"])
def test_a_projected_feature_is_the_documented_matrix_times_the_one_without(projection: ProjectionName) -> None:
    model, _, _ = trained("llama")
    plain = run(whole(model, EXACT), rows())
    sizes = {name: parameter.numel() for name, parameter in trainable(model).items()}
    engine = GradientEngine(model, kinds=[EXACT], projection=projection, dims=[40, 280], seed=5)
    (found,) = engine.features(rows(), pad_id=PAD, token_budget=80).values()
    for dim, got in found.by_dim.items():
        wanted = only(plain).astype(np.float64) @ bruteforce.matrix(projection, dim, 5, sizes)
        assert relative_error(got, wanted) < 1e-5
    np.testing.assert_array_equal(found.norms, plain.norms)


# Rows without a feature, and what is refused --------------------------------------------------------------------------


def test_a_row_that_is_not_finite_is_named_and_touches_no_other() -> None:
    model = adapt(base_model("llama"))
    examples = [*rows(), Encoded((5, 6), (IGNORED, IGNORED))]
    healthy = run(whole(model, EXACT), examples)
    with torch.no_grad():
        model.get_input_embeddings().weight[BROKEN_TOKEN] = float("nan")
    broken = Encoded((BROKEN_TOKEN, *examples[1].input_ids[1:]), examples[1].labels)
    found = run(whole(model, EXACT), [*examples, broken], token_budget=10_000)
    assert found.reasons == [*[None] * 7, NOTHING_SUPERVISED, LOSS_NOT_FINITE]
    assert found.logodds is not None
    assert healthy.logodds is not None
    np.testing.assert_allclose(found.logodds[:8], healthy.logodds, rtol=1e-5, atol=1e-6)
    assert not found.logodds[7:].any()


def test_log_odds_share_a_pass_with_no_other_gradient_and_have_no_sum() -> None:
    model, _, _ = trained("llama")
    for kinds in ([EXACT, SGD], [EXACT, Kind("logodds", logodds="reference")]):
        with pytest.raises(ValueError, match="without other kinds"):
            GradientEngine(model, kinds=kinds, dims=[16])
    with pytest.raises(ValueError, match="no reduction=sum"):
        GradientEngine(model, kinds=[EXACT], dims=[16], reduction="sum")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@forms
def test_a_gpu_gives_the_same_log_odds_and_features(form: LogoddsForm) -> None:
    model, _, _ = trained("llama")
    kind = Kind("logodds", logodds=form)
    wanted = run(GradientEngine(model, kinds=[kind], dims=[512]), rows())
    got = run(GradientEngine(copy.deepcopy(model).to("cuda"), kinds=[kind], dims=[512]), rows())
    assert relative_error(only(got), only(wanted)) < 1e-5
    assert got.logodds is not None
    assert wanted.logodds is not None
    np.testing.assert_allclose(got.logodds, wanted.logodds, rtol=1e-5, atol=1e-5)
