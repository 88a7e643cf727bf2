"""Arithmetic of losses and layouts: cross-entropy from logits of any precision in slices, and mean hidden states."""

from __future__ import annotations

import pytest
import torch

from worker.layouts import Layout, Packed, Padded, Pooling
from worker.losses import _CrossEntropy

ERRORS = {torch.float32: 1e-6, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""What writing the gradient in the logits' own precision may change of each number; the losses are always float32."""


@pytest.mark.parametrize("dtype", ERRORS)
@pytest.mark.parametrize("elements", [1, 100, 1 << 18])
def test_cross_entropy_is_computed_in_float32_whatever_the_logits_are(
    dtype: torch.dtype, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the model is sure of the target, p − 1 is what a p in half precision has lost."""
    monkeypatch.setattr("worker.losses.LOGIT_ELEMENTS", {"cpu": elements})
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(0, 40, (9,), generator=generator)
    logits = torch.randn(9, 40, generator=generator)
    logits[torch.arange(9), targets] += torch.arange(9.0)
    logits = logits.to(dtype).requires_grad_()
    weights = torch.rand(9, generator=generator)
    losses = _CrossEntropy.apply(logits, targets)  # type: ignore[no-untyped-call]  # torch's
    (found,) = torch.autograd.grad(losses, logits, weights)

    double = logits.detach().double().requires_grad_()
    wanted = double.logsumexp(1) - double[torch.arange(9), targets]
    (gradient,) = torch.autograd.grad(wanted, double, weights.double())
    assert losses.dtype == torch.float32
    assert found.dtype == dtype
    assert torch.allclose(losses.double(), wanted, rtol=1e-5, atol=1e-6)
    assert torch.allclose(found.double(), gradient, rtol=ERRORS[dtype], atol=1e-7)


LENGTHS = (300, 200)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", ERRORS)
@pytest.mark.parametrize("pooling", ["mean", "position"])
def test_the_mean_of_hidden_states_is_taken_in_float32_over_an_examples_own_tokens(
    dtype: torch.dtype, packed: bool, pooling: Pooling
) -> None:
    """A sum of 300 numbers near 1 has two digits in bfloat16."""
    states = (1 + torch.rand(2, 300, 4, generator=torch.Generator().manual_seed(0))).to(dtype)
    states[1, 200:] = float("nan")  # of padding
    own = [states[example, :length] for example, length in enumerate(LENGTHS)]
    layout: Layout = Packed(LENGTHS) if packed else Padded(states.shape[:2], torch.tensor(LENGTHS))
    found = layout.means(torch.cat(own).unsqueeze(0) if packed else states, pooling)
    assert found.dtype == torch.float32
    for mean, part in zip(found, own, strict=True):
        weights = torch.arange(1, len(part) + 1).double() if pooling == "position" else torch.ones(len(part)).double()
        assert torch.allclose(mean.double(), weights @ part.double() / weights.sum(), rtol=1e-6)
